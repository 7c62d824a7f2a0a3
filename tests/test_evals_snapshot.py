"""A sequence kept on disk goes on as if it had never left; a prose haystack holds every needle between sentences."""

from __future__ import annotations

import errno
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
    assert [p.name for p in tmp_path.iterdir()] == ["s.state"]


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
    assert [p.name for p in tmp_path.iterdir()] == ["s.state"]
    assert (tmp_path / "s.state").read_bytes() == b"old"


def test_a_damaged_state_is_refused(llm: Any, tmp_path: Path) -> None:
    with Decoder(llm) as decoder:
        list(decoder.logits([5, 6, 7], every=False))
        snapshot.save(decoder, tmp_path / "s.state")
    (tmp_path / "s.state").write_bytes((tmp_path / "s.state").read_bytes()[:-20])
    with Decoder(llm) as decoder, pytest.raises(EngineTrouble, match="not restored"):
        snapshot.restore(decoder, tmp_path / "s.state")


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
