"""What results belong to: a changed model, table, text or setting is named and refused; new ways and texts join."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from mrrope_gguf.errors import Refused
from mrrope_gguf.evals import identity
from mrrope_gguf.evals.identity import (
    Head,
    check,
    make_head,
    model_identity,
    open_head,
    read_head,
    text_sha256,
)
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.evals.ways import parse
from mrrope_gguf.extend import extend
from mrrope_gguf.facts import rope_facts
from mrrope_gguf.gguf.digest import MIB, samples
from mrrope_gguf.gguf.index import open_gguf
from tests import tiny
from tests.engine_models import YARN

SETTINGS = {"n_threads": 1, "flash_attn": False, "type_k": None, "seed": 42}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "m.gguf", "llama", n_layer=1, n_ctx=64)


def head_of(path: Path, ways: str = "none,yarn", texts: str = "a", scale: float = 4.0, **settings: Any) -> Head:
    with open_gguf(path) as index:
        facts = rope_facts(index)
    hashes = {text[0]: text_sha256(text) for text in texts.split(",")}
    return make_head(
        model_identity(path), facts, parse(ways, scale), engine="stock", scale=scale, texts=hashes,
        settings={**SETTINGS, **settings},
    )  # fmt: skip


# --- a model -----------------------------------------------------------------------------------------------------


def test_a_model_is_known_by_its_bytes(model: Path, tmp_path: Path) -> None:
    first = model_identity(model)
    assert (first["name"], first["n_ctx_orig"], first["arch"]) == ("m.gguf", 64, "llama")
    moved = model.rename(tmp_path / "other.gguf")
    assert model_identity(moved) == {**first, "name": "other.gguf"}
    data = bytearray(moved.read_bytes())
    for at in (len(data) // 2, len(data) - 1):  # weights alone
        data[at] ^= 1
        moved.write_bytes(data)
        assert model_identity(moved)["sha256"] != first["sha256"]
        data[at] ^= 1
    renamed = tiny.make(tmp_path / "n.gguf", "llama", n_layer=1, n_ctx=64, extra={"general.name": "tinier llama"})
    assert model_identity(renamed)["sha256"] != first["sha256"]


def test_context_of_a_trained_scaling(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "llama", n_layer=1, n_ctx=256, extra=YARN)
    assert [model_identity(path, force=force)["n_ctx_orig"] for force in (False, True)] == [256, 64]


@pytest.mark.parametrize("split", [0, 3])
@pytest.mark.parametrize(("arch", "rendering"), [("llama", "portable"), ("llama", "engine"), ("qwen2", "portable")])
def test_an_extended_file_is_its_original(tmp_path: Path, arch: str, rendering: Any, split: int) -> None:
    path = tiny.make(tmp_path / "m.gguf", arch, n_layer=1, n_ctx=64, split=split)
    done = extend(path, tmp_path / "long.gguf", scale=4, rendering=rendering)
    wanted, found = model_identity(path), model_identity(done.path)
    assert found == {**wanted, "name": done.path.name}


def test_samples() -> None:
    assert samples(10, 10) == []
    assert samples(5, 64 * MIB + 5)[-1] == (63 * MIB + 5, 64 * MIB + 5)
    large = samples(7, 40 << 30)
    assert len(large) == 64
    assert {end - start for start, end in large} == {MIB}
    assert (large[0][0], large[-1][1]) == (7, 40 << 30)
    gaps = {b[0] - a[0] for a, b in pairwise(large)}
    assert max(gaps) - min(gaps) <= 1


def test_of_a_large_file_only_samples_are_read(tmp_path: Path) -> None:
    wide = tiny.make(tmp_path / "m.gguf", "llama", n_layer=1, n_ctx=64, n_ff=400_000)
    size = os.path.getsize(wide)
    assert size > 3 * 64 * MIB
    with open_gguf(wide) as index:
        start = index.data_start
    kept = samples(start, size)
    first = model_identity(wide)["sha256"]
    with open(wide, "r+b") as file:
        for at, noticed in ((kept[20][1] + 5, False), (kept[20][0] + 5, True), (size - 1, True)):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
            file.flush()
            assert (model_identity(wide)["sha256"] != first) is noticed
            file.seek(at)
            file.write(bytes([byte]))
            file.flush()


@pytest.mark.engine
def test_engine_is_named_without_a_path() -> None:
    said = identity.engine_identity()
    assert said.startswith("stock llama.cpp ")
    assert "CPU" in said
    assert os.sep not in said


# --- a head ------------------------------------------------------------------------------------------------------


def test_the_same_again(model: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "results.jsonl")
    head = head_of(model)
    assert read_head(log) is None
    assert open_head(log, head) == head == open_head(log, head) == read_head(log)
    assert list(log.runs()) == ["#head"]
    assert set(head) == {"version", "model", "engine", "scale", "ways", "texts", "settings"}


def test_new_ways_and_texts_join(model: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "results.jsonl")
    open_head(log, head_of(model, "none", "a"))
    log.add("ppl/a/none/0-64", {"task": "ppl"})
    whole = open_head(log, head_of(model, "yarn", "a,b"))
    assert (list(whole["ways"]), list(whole["texts"])) == (["none", "yarn"], ["a", "b"])
    assert open_head(log, head_of(model, "ntk,none", "b")) == read_head(log)
    assert [key.split("/")[0] for key in log.runs()] == ["#head", "ppl", "#head", "#head"]
    with pytest.raises(Refused, match="the text b was"):  # what joined later is held to as well
        open_head(log, head_of(model, "none", "bb"))


def test_two_processes_begin_at_once(model: Path, tmp_path: Path) -> None:
    path, barrier = tmp_path / "results.jsonl", Barrier(2)

    def begin(ways: str) -> Head:
        head = head_of(model, ways)
        barrier.wait()
        return open_head(RunLog(path), head)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            list(pool.map(begin, ("none", "yarn,ntk")))
            whole = read_head(RunLog(path))
            assert whole
            assert set(whole["ways"]) == {"none", "yarn", "ntk"}
            path.unlink()


def test_a_moved_model_is_the_same(model: Path, tmp_path: Path) -> None:
    head = head_of(model)
    assert check(head, head_of(model.rename(tmp_path / "x.gguf"))) == {"ways": {}, "texts": {}}


def test_what_changed_is_named(model: Path, tmp_path: Path) -> None:
    head = head_of(model)
    longer = tiny.make(tmp_path / "n.gguf", "llama", n_layer=1, n_ctx=128)
    faster = tiny.make(tmp_path / "f.gguf", "llama", n_layer=1, n_ctx=64, freq_base=5e4)
    cases = {
        "the model n.gguf: its n_ctx_orig was 64 and is 128": head_of(longer),
        "the scale was 4.0 and is 2.0": head_of(model, scale=2.0),
        "the way yarn: its table_sha256 was ": head_of(faster),
        "the text a was ": head_of(model, texts="a!"),
        "the setting n_threads was 1 and is 2": head_of(model, n_threads=2),
        "the setting type_k was not set and is q8_0": head_of(model, type_k="q8_0"),
        "the engine was stock and is patched": {**head, "engine": "patched"},
        "the setting seed was 42 and is not set": {**head, "settings": {"n_threads": 1, "flash_attn": False}},
        "version was 1 and is 2": {**head, "version": 2},
    }
    for said, now in cases.items():
        with pytest.raises(Refused) as caught:
            check(head, now, "DIR")
        assert said in caught.value.why, (said, caught.value.why)
    with pytest.raises(Refused) as caught:
        check(head, head_of(model, texts="a!"), "DIR")
    assert caught.value.what.startswith("DIR")
    assert ";" not in caught.value.why  # nothing else is named


def test_nothing_is_written_when_refused(model: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "results.jsonl")
    open_head(log, head_of(model))
    before = log.path.read_bytes()
    with pytest.raises(Refused):
        open_head(log, head_of(model, "none,ntk", n_threads=2))
    assert log.path.read_bytes() == before


def test_results_without_a_head(model: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "results.jsonl")
    log.add("needle/none/64/0", {"task": "needle"})
    with pytest.raises(Refused, match="1 results and no #head"):
        open_head(log, head_of(model))


def test_a_head_cut_off_is_written_again(model: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "results.jsonl")
    open_head(log, head_of(model))
    log.path.write_bytes(log.path.read_bytes()[:100])
    assert open_head(log, head_of(model, "none")) == read_head(log) == head_of(model, "none")
