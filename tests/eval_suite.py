"""Suites of evaluations on a tiny model, as values that pickle: they run here, in a worker, or as a command."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrrope_gguf.evals import plans
from mrrope_gguf.evals.passes import Pass
from mrrope_gguf.evals.plans import Request
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.evals.suite import NAME, Suite, open_host, within
from mrrope_gguf.meter import Meter, Span
from tests import tiny

ORIG = 256  # the model's own context
OPTIONS: dict[str, Any] = {"n_threads": 1, "flash_attn": False}
# batches of one cell each, so that a pass in one piece reads the same ones
CHUNKS = {**OPTIONS, "n_batch": 256, "n_ubatch": 256}
Cells = dict[str, dict[str, Any]]


def model(folder: Path, **changes: Any) -> Path:
    return tiny.make(folder / "m.gguf", **{"n_layer": 1, "n_ctx": ORIG, **changes})


def prose(path: Path, n_words: int = 900, seed: int = 0) -> Path:
    """Words of letters that the tiny vocabulary knows, in sentences; about four tokens a word."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 6))) for _ in range(n_words)]
    ends = [f"{word}." if i % 9 == 8 else word for i, word in enumerate(words)]
    path.write_text(" ".join(ends) + ".\n")
    return path


def request(what: str, methods: str, lengths: tuple[int, ...] = (512, 1024), **others: Any) -> Request:
    given = {"scale": 4.0, "options": OPTIONS, **others}
    return Request(what, methods=methods.split(",") if methods else (), lengths=lengths, **given)


def run(path: Path, asked: Request, out: Path, stop: Callable[[], bool] | None = None) -> Cells:
    """What a suite finds, by name, with the head; `stop` ends it from within, as Ctrl-C does."""
    spec, lengths, window = plans.make_spec(path, asked)
    with open_host(spec) as host:
        suite = Suite(spec, plans.make_passes(host.plain(), spec, asked, lengths, window), out)
        suite.open(host)
        suite.run(host, Meter(), on_progress=lambda *_: _interrupt(stop))
        return suite.log.runs()


def _interrupt(stop: Callable[[], bool] | None) -> None:
    if stop and stop():
        raise KeyboardInterrupt


def planned(path: Path, asked: Request) -> list[Pass]:
    """The passes of a suite; nothing is run."""
    spec, lengths, window = plans.make_spec(path, asked)
    with open_host(spec) as host:
        return plans.make_passes(host.plain(), spec, asked, lengths, window)


class Counting(Meter):
    """A meter that knows beforehand: a token takes a millisecond. `read` counts the tokens of whole batches."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0
        super().add(Span(0, 1000), 1.0)

    def add(self, span: Span, seconds: float) -> None:
        self.read += span.n


def budgeted(path: Path, asked: Request, out: Path, seconds: float | None, late: bool = False) -> tuple[int, int, int]:
    """A suite cut to a budget by that meter: cells made, cells left of all, tokens read. late: time was up before."""
    spec, lengths, window = plans.make_spec(path, asked)
    meter = Counting()
    with open_host(spec) as host:
        passes = plans.make_passes(host.plain(), spec, asked, lengths, window)
        suite = Suite(spec, passes, out)
        done = suite.open(host)
        if seconds is not None:
            suite.passes = within(passes, done, meter, seconds)
        made = suite.run(host, meter, deadline=time.monotonic() - 1 if late else None).cells
        suite.passes = passes
        done = suite.done()
        return made, sum(key not in done for task in passes for key in task.keys), meter.read


def cells(runs: Cells) -> Cells:
    """Finished cells, without the head."""
    return {key: cell for key, cell in runs.items() if not key.startswith("#")}


def lines(out: Path) -> list[str]:
    """The names of all whole lines of a results file, heads left out, in order; one that stands twice comes twice."""
    found = []
    for line in (out / NAME).read_text(errors="replace").split("\n"):
        try:
            run = json.loads(line)
        except ValueError:
            continue
        if not run["run"].startswith("#"):
            found.append(run["run"])
    return found


def blocks_of(out: Path) -> dict[str, Any]:
    """The means of each cell of a results file."""
    return {key: cell["blocks"] for key, cell in cells(RunLog(out / NAME).runs()).items()}
