"""Extended and reverted, any model is what it was, byte for byte, in place or beside; and ggml reads it in between."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from mrrope_gguf import extend, revert
from mrrope_gguf.errors import Refused
from mrrope_gguf.gguf.index import open_split
from tests import ggml_oracle
from tests.any_model import Model, models
from tests.ggml_reader import GgmlReader
from tests.hunt import hunt

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(ggml_oracle.libggml() is None, reason="llama-cpp-python is not installed"),
]
quick = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small files are written here, and none has to outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def tensors(paths: list[Path], ggml: GgmlReader) -> dict[bytes, tuple[Any, ...]]:
    """Every tensor as ggml finds it, with its data."""
    found: dict[bytes, tuple[Any, ...]] = {}
    for path in paths:
        reading, data = ggml.read(path), path.read_bytes()
        assert reading is not None, f"ggml refuses {path.name}"
        for t in reading.tensors:
            at = reading.data_start + t.offset
            assert len(data) >= at + t.nbytes
            assert t.name not in found
            found[t.name] = (t.dims, t.type, data[at : at + t.nbytes])
    return found


def check_identity(model: Model, folder: Path, ggml: GgmlReader) -> str:
    """The way there and back, by every route; how the model was rendered, or "refused"."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = model.write(folder)
    before, names = contents(paths), {path.name for path in folder.iterdir()}
    held = tensors(paths, ggml)
    try:
        done = extend(paths[-1], folder / "new.gguf", **model.options)
    except Refused:
        assert contents(paths) == before
        assert {path.name for path in folder.iterdir()} == names
        return "refused"
    assert contents(paths) == before
    check_tensors(held, tensors(open_split(done.path), ggml), done.rendering.reexpress is not None)
    back = revert(done.path, folder / "back.gguf").path
    assert contents(open_split(back)) == before
    again = extend(done.path, folder / "again.gguf", **model.again).path
    assert contents(open_split(revert(again, folder / "back.gguf", force=True).path)) == before
    for options in (model.options, model.again):
        extend(paths[0], in_place=True, **options)
    assert tensors(paths, ggml) == tensors(open_split(again), ggml)  # padding in place may be more
    revert(paths[0])
    assert contents(paths) == before
    shards = "" if len(paths) == 1 else ", in shards"
    return f"{model.arch} {done.rendering.kind}{', re-expressed' * bool(done.rendering.reexpress)}{shards}"


def check_tensors(old: dict[bytes, Any], new: dict[bytes, Any], moved: bool) -> None:
    """The same tensors but for the table's; where rows moved, with the same bytes in another order."""
    factors = {name for name in new if name.startswith(b"rope_f")}
    assert new.keys() - factors == old.keys() - factors
    for name in old.keys() - factors:
        if moved and b"attn" in name:
            assert new[name][:2] == old[name][:2]
            assert sorted(new[name][2]) == sorted(old[name][2])
        else:
            assert new[name] == old[name]


@quick
@given(model=models())
def test_extended_and_reverted_is_what_it_was(tmp_path: Path, ggml: GgmlReader, model: Model) -> None:
    check_identity(model, tmp_path / "m", ggml)


@pytest.mark.hard
def test_extended_and_reverted_for_ten_minutes(
    tmp_path: Path, ggml: GgmlReader, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: Counter[str] = Counter()

    def say(words: str) -> None:
        with capsys.disabled():
            print(f"\nextend: {words}", flush=True)

    def check(model: Model) -> None:
        seen[check_identity(model, tmp_path / "m", ggml)] += 1

    n = hunt(models(), check, say)
    say(f"{n} models; {dict(sorted(seen.items()))}")
    for kind in ("portable", "engine", "re-expressed", "in shards"):
        assert any(kind in what for what in seen), kind
