"""The growth that benchmarks.elastic drives from Python is the engine's own, bit for bit; results read back right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.elastic_cells import cells, needle_cells
from benchmarks.elastic_drift import READ, SCORED, Drift
from benchmarks.elastic_growth import Reader, parse
from benchmarks.elastic_models import MODELS
from benchmarks.elastic_plan import CANDIDATE, GROUPS
from benchmarks.elastic_report import Results, pictures, short
from mrrope_gguf.engine import set_elastic_policy
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load
from tests import tiny
from tests.engine_worker import Worker

WAYS = (CANDIDATE, "elastic,method=pro,step=2,room=1,t=1")


def test_stages_and_scales() -> None:
    growth = parse(CANDIDATE, 8192)
    assert [end for end, _ in growth.stages()] == [8192, 9742, 11585, 13777, 16384, 19484, 23170, 2**31]
    assert growth.stage(8192) == (8192, 1.0)
    assert growth.stage(8193)[1] == growth.stage(9742)[1] == pytest.approx(1.33 * 2**0.25, rel=1e-6)
    assert growth.stage(23171)[1] == 4.0
    by_tokens = parse("elastic,method=uni,step=+1024,room=1,t=1", 8192)
    assert [end for end, _ in by_tokens.stages()] == [*range(8192, 32768, 1024), 2**31]
    assert by_tokens.stage(9217) == (10240, 10240 / 8192)
    assert parse("static,method=yarn,scale=4", 8192).stage(1)[1] == 4.0
    assert parse("none", 8192).stage(9000)[1] == 1.0


@pytest.mark.engine
@pytest.mark.parametrize("way", WAYS)
def test_growth_from_python_is_the_engine_s_own(engine: Worker, tmp_path: Path, way: str) -> None:
    path = tiny.make(tmp_path / "m.gguf", n_ctx=64, n_layer=2)
    growth = parse(way, 64)
    longer = extend(path, tmp_path / "x.gguf", scale=4, method=growth.method, rendering="engine").path
    tokens = np.random.default_rng(0).integers(3, 259, 256).tolist()
    ours = engine.call(driven, path, way, tokens)
    assert len(ours) == 256
    assert np.array_equal(ours, engine.call(built_in, longer, way, tokens))
    assert not np.array_equal(ours[64:], engine.call(driven, path, "none", tokens)[64:])


def driven(path: Path, way: str, tokens: list[int]) -> Any:
    llm = load(path, n_ctx=256, past_window=True, flash_attn=False, n_batch=64, n_threads=1, n_threads_batch=1)
    with Decoder(llm) as decoder:
        reader = Reader(llm, path, decoder, parse(way, 64))
        return np.concatenate([x.copy() for x in reader.logits(tokens, every=True)])


def built_in(path: Path, way: str, tokens: list[int]) -> Any:
    """In the same pieces: what attention adds up depends on how a batch is cut."""
    growth = parse(way, 64)
    llm = load(path, elastic=True, flash_attn=False, n_batch=64, n_threads=1, n_threads_batch=1)
    set_elastic_policy(llm, step=float(growth.options["step"]), head_room=float(growth.options["room"]))
    found = []
    with Decoder(llm) as decoder:
        while decoder.n_past < len(tokens):
            end = min(growth.stage(decoder.n_past + 1)[0], decoder.n_past + 64)
            found += [x.copy() for x in decoder.logits(tokens[decoder.n_past : end])]
    return np.concatenate(found)


def test_results_take_the_window_s_buckets_from_the_plain_model() -> None:
    way = CANDIDATE
    runs: dict[str, dict[str, Any]] = {
        "ppl/smollm2/a/none/8192": {"blocks": [1.0, 3.0]},
        f"ppl/smollm2/a/{way}/12288": {"blocks": [1.0, 1.0]},
        "ppl/smollm2/a/static,method=uni,scale=4/12288": {"blocks": [1.5, 1.5]},
        "ppl/gemma3/a/none/36864": {"blocks": [9.0]},
        "needle/smollm2/noise/42/6144/none": {"loss": 0.5, "exact": 9},
    }
    results = Results(runs, "smollm2", way)
    assert results.window == 8192
    assert results.perplexity("a", way, 8192) == pytest.approx(math.exp(2))
    assert results.perplexity("a", "none", 12288) is None
    found = results.difference("static,method=uni,scale=4", 12288, ["a"])
    assert found is not None
    assert found[0].mean == pytest.approx(-0.5)
    assert found[1] == 1
    assert short(way) == "elastic uni, step 1.19, head-room 1.33"


def test_perplexity_is_drawn_over_octaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    seen: dict[str, Any] = {}
    monkeypatch.setattr(figure, "savefig", lambda self, path: seen.update({Path(path).name: self.axes[0]}))
    runs = {f"ppl/smollm2/a/none/{4096 * i}": {"blocks": [float(i)]} for i in (1, 2)}
    runs[f"ppl/smollm2/a/{CANDIDATE}/12288"] = {"blocks": [2.0]}
    made = pictures(Results(runs, "smollm2", CANDIDATE), ["none", CANDIDATE], tmp_path, "elastic")
    assert [path.name for path in made] == ["elastic-perplexity.png"]
    axes = seen["elastic-perplexity.png"]
    assert axes.get_xscale() == "log"
    assert list(axes.lines[0].get_xdata()) == [2048, 6144]
    assert axes.lines[-1].get_xdata()[0] == 8192


def test_every_planned_run_has_a_name_that_can_be_read() -> None:
    for group in GROUPS.values():
        for run in (run for chain in group() for run in chain):
            kind, model, *rest = run.split("/")
            assert model in MODELS
            if kind != "drift" and "truncate" not in rest:
                parse(rest[1] if kind == "ppl" else rest[3], MODELS[model].n_ctx_orig)


def test_runs_as_cells_of_mrrope_eval(tmp_path: Path) -> None:
    """The report reads them at their positions; within the window elastic and truncation are the model as it is."""
    inside, past, pro = [[x + i / 100 for i in range(16)] for x in (1.0, 2.0, 3.0)]
    runs: dict[str, dict[str, Any]] = {
        "ppl/smollm2/t/none/8192": {"blocks": inside, "seconds": 1.0},
        f"ppl/smollm2/t/{CANDIDATE}/12288": {"blocks": past, "seconds": 1.0},
        "ppl/smollm2/t/static,method=pro,scale=4/12288": {"blocks": pro, "seconds": 1.0},
        f"needle/smollm2/noise/42/12288/{CANDIDATE}": {"losses": [i / 10 for i in range(10)], "recalled": [True] * 10},
        f"needle/smollm2/voyage-out/42/12288/{CANDIDATE}": {"losses": [], "recalled": []},
        "ppl/gemma3/t/truncate/36864": {"blocks": inside},
    }
    log = RunLog(tmp_path / "results.jsonl")
    depths = [5.0 + 10 * i for i in range(10)]
    for cell in [*cells(runs, "smollm2"), *needle_cells(runs, "smollm2", lambda seed, length: depths)]:
        log.add(cell.pop("run"), cell)
    assert list(cells(runs, "gemma3")) == []
    (task, answers), *more = read(tmp_path).answers.items()
    assert (task, more) == ("needle-keys/noise", [])
    assert [(a.sample, a.depth, a.loss) for a in answers][:2] == [("0-42-of-10", 5.0, 0.0), ("1-42-of-10", 15.0, 0.1)]
    assert {(a.way, a.length, a.score, a.exact) for a in answers} == {("elastic", 12288, 1.0, True)}
    found = read(tmp_path).ppl["t"]
    at = {start: list(range(start, start + 4096, 256)) for start in (4096, 8192)}
    assert found["none"] == found["truncate"] == dict(zip(at[4096], inside, strict=True))
    assert found["elastic"] == dict(zip(at[4096] + at[8192], inside + past, strict=True))
    assert found["mrrope-pro"] == dict(zip(at[8192], pro, strict=True))


@pytest.mark.engine
def test_drift_grows_with_the_turns_and_with_the_type(engine: Worker, tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", n_ctx=8192, n_layer=1, head_dim=32)
    once, often = engine.call(drifted, path, "f16", 1), engine.call(drifted, path, "f16", 24)
    assert 1e-4 < once["keys"] < 6e-4
    assert 2 * once["keys"] < often["keys"] < 6e-3
    assert engine.call(drifted, path, "q8_0", 1)["keys"] > 5 * once["keys"]


def drifted(path: Path, kind: str, stages: int) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(3, 259, READ + SCORED + 1).tolist()
    return Drift(path, kind, tokens, threads=1).measure("stages", stages)
