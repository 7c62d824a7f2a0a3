"""A sequence kept on disk goes on as if it had never left; a prose haystack holds every needle between sentences."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.errors import EngineTrouble
from mrrope_gguf.evals import snapshot
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.needles import KEYS, NEEDLE, haystack
from mrrope_gguf.model import load
from tests import tiny

pytestmark = pytest.mark.engine

PROSE = "It was a fine\nday. Nobody came! Was it so? The train left at noon, and no one was on it. "


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tiny.make(tmp_path_factory.mktemp("snapshot") / "m.gguf", n_ctx=8192)
    model = load(path, n_batch=64, flash_attn=False)
    yield model
    model.close()


def test_a_restored_sequence_goes_on_bit_for_bit(llm: Any, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(3, 259, 300).tolist()
    with Decoder(llm) as decoder:
        list(decoder.logits(tokens[:200], every=False))
        snapshot.save(decoder, tmp_path / "s.state")
        wanted = np.concatenate([x.copy() for x in decoder.logits(tokens[200:])])
    with Decoder(llm) as decoder:
        snapshot.restore(decoder, tmp_path / "s.state")
        assert decoder.n_past == 200
        found = np.concatenate([x.copy() for x in decoder.logits(tokens[200:])])
    assert np.array_equal(found, wanted)
    assert {p.name for p in tmp_path.iterdir()} - {"key"} == {"s.state"}


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_was_not_written_whole_is_gone(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    (tmp_path / "s.state").write_bytes(b"old")

    def fail(_: int) -> None:
        raise trouble

    with Decoder(llm) as decoder:
        list(decoder.logits([5, 6, 7], every=False))
        monkeypatch.setattr("mrrope_gguf.evals.snapshot.os.fsync", fail)
        with pytest.raises(type(trouble)):
            snapshot.save(decoder, tmp_path / "s.state")
    assert {p.name for p in tmp_path.iterdir()} - {"key"} == {"s.state"}
    assert (tmp_path / "s.state").read_bytes() == b"old"


@pytest.mark.parametrize("change", ["cut", "empty", "n_past", "state", "proof", "another user's"])
def test_what_is_not_as_it_was_written_never_reaches_llama_cpp(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "s.state"
    with Decoder(llm) as decoder:
        list(decoder.logits([5, 6, 7], every=False))
        snapshot.save(decoder, path)
    data = bytearray(path.read_bytes())
    if change == "another user's":
        (tmp_path / "key").write_bytes(bytes(32))
    else:
        data[{"n_past": 0, "state": len(data) // 2, "proof": -1}.get(change, 0)] ^= 1
    path.write_bytes({"cut": bytes(data[:-20]), "empty": b""}.get(change, bytes(data)))
    with Decoder(llm) as decoder:
        monkeypatch.setattr(decoder.api, "llama_state_seq_set_data", lambda *_: pytest.fail("it was read"))
        with pytest.raises(EngineTrouble, match="not restored"):
            snapshot.restore(decoder, path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_state_is_the_users_alone(llm: Any, tmp_path: Path) -> None:
    with Decoder(llm) as decoder:
        list(decoder.logits([5, 6, 7], every=False))
        snapshot.save(decoder, tmp_path / "s.state")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"s.state": 0o600, "key": 0o600}


def test_needles_lie_between_sentences_of_prose(llm: Any) -> None:
    hay = haystack(llm, 4000, prose=PROSE * 200)
    assert len(hay.tokens) == 4000
    text = llm.detokenize(list(hay.tokens)).decode()
    assert "grass" not in text
    assert "a fine day." in text
    for key in KEYS:
        needle = NEEDLE.format(key=key, value=hay.values[key])
        assert text.count(needle) == 1
        assert text[: text.index(needle)].rstrip()[-1] in ".!?"
    gaps = np.diff(sorted(hay.positions.values()))
    assert gaps.max() - gaps.min() < 120  # evenly spread, to a sentence


def test_short_prose_is_refused(llm: Any) -> None:
    with pytest.raises(ValueError, match="tokens too short"):
        haystack(llm, 4000, prose=PROSE)
