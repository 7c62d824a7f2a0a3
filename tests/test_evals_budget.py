"""Time: what work will take, what of it fits, and that what is left out is left out for every way."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.evals.passes import LossPass, Pass, TaskPass, loss_passes
from mrrope_gguf.evals.plans import make_spec
from mrrope_gguf.evals.suite import MARGIN, Suite, calibrate, estimate, expected, open_host, within
from mrrope_gguf.evals.ways import STATIC
from mrrope_gguf.meter import Meter, Span, duration
from tests.engine_worker import Worker
from tests.eval_suite import CHUNKS, Counting, blocks_of, budgeted, cells, lines, model, planned, prose, request, run
from tests.patched import environment

WAYS = ("none", "yarn", "truncate", "mrrope-uni", "elastic", "yarn@B")
EVERY = ",".join(["none", "truncate", *STATIC, *(f"{method}@B" for method in STATIC)])


def losses(window: int = 8192, lengths: tuple[int, ...] = (8192, 32768)) -> list[Pass]:
    ways = ("none", "truncate", "yarn", "yarn@B")
    return [p for way in ways for p in loss_passes("ppl", "t", way, lengths, window, by_length=way.endswith("@B"))]


def needles(lengths: tuple[int, ...] = (8192, 16384)) -> list[Pass]:
    cost = tuple((Span(0, n),) for n in lengths)
    return [
        TaskPass("needle/noise", way, lengths, ("0-42",), 42, 1, 8192, (0.0,), cost=cost) for way in ("none", "yarn")
    ]


def ends(passes: list[Pass]) -> dict[str, int]:
    """The last position or length of each way that is left."""
    found: dict[str, int] = {}
    for task in passes:
        end = task.end if isinstance(task, LossPass) else task.lengths[-1]
        found[task.way] = max(end, found.get(task.way, 0))
    return found


@pytest.mark.parametrize("window", [8192, 32768, 2048])
def test_every_way_has_the_same_cells(window: int) -> None:
    """Also where truncation's cells are longer than those of the others."""
    passes = losses(window, (window, 4 * window))
    meter = Counting()
    free = expected(passes, {})  # what truncation has from the original
    whole = meter.seconds(span for task in passes for span in task.spans(free))
    seen = set()
    for share in range(1, 25):
        kept = within(passes, {}, meter, whole * share / 20)
        assert meter.seconds(s for task in kept for s in task.spans(free)) <= MARGIN * whole * share / 20
        last = ends([task for task in kept if task.way != "yarn@B"])
        assert len(set(last.values())) <= 1
        if last:
            assert set(last) == {"none", "truncate", "yarn"}
            seen.add(last["none"])
        cut = {task.goes_on for task in kept if isinstance(task, LossPass) and not task.length}
        assert cut <= {last.get("none") != 4 * window}
    assert len(seen) > 4
    assert max(seen) == 4 * window
    assert within(passes, {}, meter, 0.5) == []
    assert within(passes, {}, meter, whole / MARGIN + 1) == passes


def test_lengths_are_left_out_for_every_way() -> None:
    passes = needles()
    assert ends(within(passes, {}, Counting(), 2 * 8.2 / MARGIN)) == {"none": 8192, "yarn": 8192}
    assert ends(within(passes, {}, Counting(), 2 * 24.6 / MARGIN)) == {"none": 16384, "yarn": 16384}
    (first, second) = within(passes, {}, Counting(), 2 * 8.2 / MARGIN)
    assert isinstance(first, TaskPass)
    assert first.cost == ((Span(0, 8192),),)
    assert first.keys == ["needle/noise/none/8192/0-42"]
    # what is finished costs nothing
    done: dict[str, Any] = {key: {} for task in (first, second) for key in task.keys}
    assert ends(within(passes, done, Counting(), 2 * 16.4 / MARGIN)) == {"none": 16384, "yarn": 16384}


def test_short_rounds_of_another_task_fill_what_is_left() -> None:
    kept = within([*losses(), *needles((512,))], {}, Counting(), 2.0)
    assert {task.describe() for task in kept} == {"needle/noise none at 512", "needle/noise yarn at 512"}


@pytest.mark.engine
def test_a_budget_and_the_next_call(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path)
    asked = request("ppl", ",".join(WAYS), (512, 1024), texts=[str(prose(tmp_path / "t.txt"))], options=CHUNKS)
    whole = engine.call(run, path, asked, tmp_path / "whole")
    out = tmp_path / "out"
    assert engine.call(budgeted, path, asked, out, None, late=True)[0] == 0  # no time at all
    made, left, read = engine.call(budgeted, path, asked, out, 6.0)
    assert made > 0
    assert left > 0
    cut = {way: max(int(key.rsplit("-", 1)[1]) for key in lines(out) if f"/{way}/" in key) for way in WAYS}
    assert cut == {**dict.fromkeys(WAYS, 768), "yarn@B": 512}
    before = lines(out)
    made, left, again = engine.call(budgeted, path, asked, out, None)
    assert left == 0
    assert lines(out)[: len(before)] == before
    assert blocks_of(out) == {key: cell["blocks"] for key, cell in cells(whole).items()}
    # nothing was read twice: the caches of the first call were kept for the second
    assert read + again == engine.call(budgeted, path, asked, tmp_path / "third", None)[2]


# --- the clock ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that reads about 700 tokens a second on a free core, and texts."""
    folder = tmp_path_factory.mktemp("slow")
    model(folder, n_ff=150_000, n_ctx=512)
    for seed in range(4):
        prose(folder / f"t{seed}.txt", 700, seed)
    return folder


def command(slow: Path, out: Path, lib: Path, *more: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds on the clock, and what the command said."""
    texts = [str(slow / f"t{seed}.txt") for seed in range(4)]
    words = ["eval", "ppl", str(slow / "m.gguf"), "--scale", "4", "--lengths", "2048", "--text", *texts, "-fa", "off"]
    env = {**environment(lib), "MRROPE_CACHE": str(out.parent / "cache")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mrrope_gguf", *words, "-t", "1", "--methods", EVERY, "--out", str(out), *more],
        env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    return time.monotonic() - began, done


@pytest.mark.engine
@pytest.mark.slow
def test_the_command_ends_in_time(patched: Path, slow: Path, tmp_path: Path) -> None:
    """Work of minutes. What a start and a report take is measured here too: a busy machine has less of it done."""
    out = tmp_path / "out"
    start, done = command(slow, out, patched, "--estimate")
    assert done.returncode == 0, done.stderr
    budget = round(3 * start) + 5
    took, done = command(slow, out, patched, "--budget", f"{budget}s")
    assert done.returncode == 0, done.stderr
    assert "passes are not finished: give the same command again" in done.stderr
    assert lines(out)
    assert took < budget + 2 * start + 10


class Free(Meter):
    """A meter for which nothing takes any time, whatever it is told; it remembers that."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[float] = []

    def add(self, span: Span, seconds: float) -> None:
        self.told.append(seconds)


@pytest.mark.engine
def test_reading_ends_when_time_is_up(slow: Path, tmp_path: Path) -> None:
    """However wrong the estimate was."""
    asked = request("ppl", "none,truncate", (2048,), texts=[str(slow / "t0.txt"), str(slow / "t1.txt")])
    spec, _, _ = make_spec(slow / "m.gguf", asked)
    meter, passes = Free(), planned(slow / "m.gguf", asked)
    assert within(passes, {}, meter, 2.0) == passes
    with open_host(spec) as host:
        suite = Suite(spec, passes, tmp_path / "out")
        suite.open(host)
        began = time.monotonic()
        outcome = suite.run(host, meter, deadline=began + 2.0)
        took = time.monotonic() - began
    assert outcome.left > 0
    assert meter.told
    assert 2.0 <= took < 2.0 + 2 * max(meter.told) + 3.0


class Clock(Meter):
    """A meter that adds up what it was told."""

    seconds_read = 0.0

    def add(self, span: Span, seconds: float) -> None:
        self.seconds_read += seconds


# --- estimates ---------------------------------------------------------------------------------------------------


def test_the_meter_learns_what_tokens_cost() -> None:
    rng = random.Random(0)
    meter = Meter()
    assert meter.seconds([Span(0, 100)]) == meter.rate == 0
    for at in range(0, 4096, 512):
        meter.add(Span(at, 512), 512 * (2e-3 + 1e-6 * (at + 256)) * rng.uniform(0.9, 1.1))
    meter.add(Span(512, 8), 8 * 0.03)
    whole = [Span(0, 32768), Span(1000, 100, single=True)]
    true = 32768 * (2e-3 + 1e-6 * 16384) + 100 * (2e-3 + 1e-6 * 1050)
    assert meter.seconds(whole) == pytest.approx(true, rel=0.25)
    meter.add(Span(512, 8, single=True), 8 * 0.03)
    assert meter.seconds([Span(512, 100, single=True)]) == pytest.approx(3.0, rel=0.05)
    assert meter.rate == pytest.approx(500, rel=0.25)


def test_no_noise_makes_time_run_backwards() -> None:
    meter = Meter()
    meter.add(Span(0, 512), 2.0)
    meter.add(Span(512, 512), 1.0)  # the first was slow for another reason
    assert meter.seconds([Span(0, 512)]) == pytest.approx(meter.seconds([Span(100_000, 512)])) == pytest.approx(1.5)
    meter = Meter()
    meter.add(Span(0, 512), 0.01)
    meter.add(Span(512, 512), 1.0)
    assert meter.seconds([Span(0, 512)]) >= 0


@pytest.mark.parametrize("text", ["", "soon", "-3m", "1x", "0", "0m", "1h-5m", "nan", "inf", ".", "1.2.3m"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no time|leaves no time|could not convert"):
        duration(text)


@pytest.mark.engine
def test_an_estimate_is_near_the_truth(tmp_path: Path) -> None:
    """Within a factor of six here, where a batch takes milliseconds and other work goes on."""
    path = model(tmp_path, n_layer=3, n_ctx=512)
    asked = request("ppl", "none", (4096,), texts=[str(prose(tmp_path / "t.txt", 1600))])
    spec, _, _ = make_spec(path, asked)
    meter = Meter()
    with open_host(spec) as host:
        calibrate(host, meter)
    (task,) = [each for each in planned(path, asked) if each.way == "none"]
    guess = meter.seconds(task.spans({}))
    line = estimate([task], {}, meter)
    assert line.startswith("16 cells in 1 passes, 4,096 tokens to read: about ")
    assert guess > 0
    clock = Clock()
    with open_host(spec) as host:
        suite = Suite(spec, [task], tmp_path / "out")
        suite.open(host)
        suite.run(host, clock)
    assert guess / 6 < clock.seconds_read < guess * 6
