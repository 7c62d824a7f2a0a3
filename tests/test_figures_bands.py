"""The sweep over the band's two bounds: every table is the one it is named after, and no run is made twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf import engine as mrrope_engine
from mrrope_gguf.errors import EngineTrouble, MrropeError, Refused
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.figures.bands import Bands, Measured, Point, bands, sweep
from mrrope_gguf.figures.common import write_data, write_picture
from mrrope_gguf.figures.words import Words, read_words
from mrrope_gguf.kernels import nll
from mrrope_gguf.model import load
from mrrope_gguf.tables import rope_table
from mrrope_gguf.verbs_figures import log_path
from tests.engine_models import model
from tests.engine_worker import Worker

TEXT = "Two bounds mark the band of middle pairs, and either may be moved a little way. " * 60
WORDS = Words("words", TEXT)
ORIG = 64
Seen = dict[str, Any]


def swept(path: Path, log: Path | None = None, words: Words = WORDS, **options: Any) -> tuple[Bands, list[int]]:
    """A sweep of two points a method, and the counts that its progress was told."""
    told: list[int] = []
    wanted: dict[str, Any] = {
        "methods": "none,yarn,mrrope-pro", "beta_fast": (8.0, 2.0), "beta_slow": (1.0, 0.25), "length": 200,
        "n_threads": 1, "log": RunLog(log) if log else None, **options,
    }  # fmt: skip
    found = bands(path, words=words, progress=lambda done, total: told.append(done), **wanted)
    return found, told


def by_hand(path: Path, method: str, fast: float, slow: float) -> float:
    """Perplexity of positions 64 to 200 under a table of the same band, set by hand, in one pass with all logits."""
    llm = load(path, 256, past_window=True, flash_attn=False, n_threads=1, n_threads_batch=1)
    if method != "none":
        table = rope_table(
            method, n_rot=16, freq_base=1e4, n_ctx_orig=ORIG, scale=4, beta_fast=fast, beta_slow=slow
        )  # fmt: skip
        mrrope_engine.set_table(llm, table)
    tokens = WORDS.tokens(llm, 201)
    with Decoder(llm) as decoder:
        (logits,) = decoder.logits(tokens[:-1])
        losses = nll(logits, tokens[1:])
    return float(np.exp(losses[ORIG:].mean(dtype=np.float64)))


@pytest.mark.engine
def test_every_point_is_the_perplexity_under_its_table(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=ORIG)
    found, told = engine.call(swept, path)
    assert [m.point for m in found.points[:4]] == [
        ("none", 32, 1), ("yarn", 8, 1), ("yarn", 2, 1), ("yarn", 32, 1)
    ]  # fmt: skip
    assert (found.start, found.end, len(found.points)) == (64, 200, 9)
    for m in found.points:
        assert m.perplexity == pytest.approx(engine.call(by_hand, path, *m.point), rel=1e-4), m.point
    assert len({round(m.perplexity, 3) for m in found.points}) > 5
    assert told[-1] == 9 * 200
    assert told == sorted(told)


@pytest.mark.engine
def test_a_sweep_goes_on_where_it_stopped(engine: Worker, tmp_path: Path) -> None:
    path, log = model(tmp_path, "llama", n_ctx=ORIG), tmp_path / "runs.jsonl"
    first, _ = engine.call(swept, path, log)
    lines = log.read_text().splitlines()
    assert len(lines) == 10  # a head and nine runs
    again, told = engine.call(swept, path, log)
    assert (again, told) == (first, [])
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])  # power went in the middle of a line
    again, told = engine.call(swept, path, log)
    assert (again, told[-1]) == (first, 200)
    more, told = engine.call(swept, path, log, beta_slow=(1.0, 0.25, 0.125))
    assert (len(more.points), told[-1]) == (11, 400)


@pytest.mark.engine
def test_a_log_of_something_else_is_refused(engine: Worker, tmp_path: Path) -> None:
    path, log = model(tmp_path, "llama", n_ctx=ORIG), tmp_path / "runs.jsonl"
    engine.call(swept, path, log, methods="none")
    before = log.read_bytes()
    with pytest.raises(Refused, match="the setting text"):
        engine.call(swept, path, log, Words("words", TEXT + "!"))
    with pytest.raises(Refused, match="the setting end was 200 and is 201"):
        engine.call(swept, path, log, length=201)
    with pytest.raises(Refused, match="the scale was"):
        engine.call(swept, path, log, scale=8.0)
    with pytest.raises(Refused, match="its sha256 was"):
        engine.call(swept, model(tmp_path, "llama", n_ctx=ORIG, seed=1), log)
    assert log.read_bytes() == before


@pytest.mark.engine
def test_needles(engine: Worker, tmp_path: Path) -> None:
    path, log = model(tmp_path, "llama", n_ctx=ORIG), tmp_path / "runs.jsonl"
    options: Seen = {"methods": "yarn", "beta_fast": (32.0,), "beta_slow": (1.0,), "length": 3200}
    found, _ = engine.call(swept, path, log, **options)
    assert [m.needle for m in found.points] == [None]
    found, told = engine.call(swept, path, log, needle=True, **options)
    assert told[-1] <= 3200  # the perplexity is there already
    (measured,) = found.points
    assert measured.needle is not None
    assert 0 < measured.needle < 20
    assert found.rows()[0]["needle_nll"] == measured.needle
    assert "needle NLL" in found.render()


@pytest.mark.engine
def test_what_is_refused(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=ORIG)
    with pytest.raises(EngineTrouble, match="a sweep over tables needs the patched engine"):
        stock.call(swept, path)
    with pytest.raises(Refused, match="64 tokens: the sweep is of what lies past the window"):
        engine.call(swept, path, length=64)
    with pytest.raises(MrropeError, match="words: the text is too short"):
        engine.call(swept, path, length=100_000)
    with pytest.raises(Refused, match="unknown method 'yern'"):
        engine.call(swept, path, methods="yern")


def test_points_of_a_sweep() -> None:
    points = sweep(["none", "yarn"], (8, 32, 64), (0.5, 1))
    assert points == [
        ("none", 32, 1), ("yarn", 8, 1), ("yarn", 32, 1), ("yarn", 64, 1), ("yarn", 32, 0.5)
    ]  # fmt: skip
    for fast, slow in (((1.0,), (1.0,)), ((8.0,), (40.0,)), ((float("nan"),), (1.0,)), ((8.0,), (0.0,))):
        with pytest.raises(Refused, match="beta_fast must be above beta_slow"):
            sweep(["yarn"], fast, slow)


def made() -> Bands:
    """A sweep whose losses are known."""
    points = [Point("none", 32, 1), *(Point("yarn", f, 1) for f in (64, 8, 32)), Point("yarn", 32, 2)]
    measured = [Measured(p, 1, 3, (3.0 + i / 8, 4.0), (256, 128), 1.0 + i) for i, p in enumerate(points)]
    return Bands("m.gguf", "words", 4.0, 64, 64, 448, tuple(measured))


def test_curves_and_their_numbers(tmp_path: Path) -> None:
    found = made()
    assert [m.point.beta_fast for m in found.curve("yarn", "beta_fast")] == [8, 32, 64]
    assert [m.point.beta_slow for m in found.curve("yarn", "beta_slow")] == [1, 2]
    assert found.points[0].perplexity == pytest.approx(np.exp((256 * 3.0 + 128 * 4.0) / 384))
    write_data(found, tmp_path / "b.json")
    points = json.loads((tmp_path / "b.json").read_text())["points"]
    assert [p["perplexity"] for p in points] == [pytest.approx(m.perplexity, abs=1e-4) for m in found.points]
    assert found.render().splitlines()[2].split() == ["none", "32", "1", "1", "3", "28.032", "1.000"]


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for suffix in ("png", "svg"):
        write_picture(made(), tmp_path / f"b.{suffix}")
    assert (tmp_path / "b.png").stat().st_size > 10_000
    drawn = (tmp_path / "b.svg").read_text()
    assert "the paper's alpha" in drawn
    assert "needles, nats a token" in drawn


def test_where_the_runs_are_kept(tmp_path: Path) -> None:
    assert log_path(str(tmp_path)) == tmp_path / "figure-bands.runs.jsonl"
    assert log_path(str(tmp_path / "b.png")) == tmp_path / "b.runs.jsonl"


def test_words(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Words.", encoding="utf-8")
    assert read_words(str(file)) == Words("text.txt", "Words.")
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(MrropeError, match="cannot be read as text"):
        read_words(str(file))
