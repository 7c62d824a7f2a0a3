"""A suite of passes: what is left to do, how long it takes, and doing it, each finished cell on disk at once.

The same suite goes on where it stopped. A budget keeps whole rounds, a round being the same cells for every way, so
that what is left out is left out for all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import EngineTrouble, FileTrouble, MrropeError, Refused
from ..meter import Meter, Span, size
from ..progress import clock
from ..text import printable
from .host import Host
from .identity import Head, check, engine_identity, make_head, model_identity, open_head, read_head
from .passes import Emit, LossPass, Pass, Result, Tick, half_window
from .run_losses import LossRun, States
from .run_tasks import run_task
from .runlog import RunLog
from .spec import Spec

NAME = "results.jsonl"
SINGLE = 8  # tokens read one at a time to see what that costs
MARGIN = 0.9  # of a budget is planned for: an estimate that is a little off must not cost the last way its round
Say = Callable[[str], object]
OnCells = Callable[[str, int, int], object]  # what was finished, cells made, and in all
OnProgress = Callable[[str, float, float], object]  # what runs, seconds done and seconds in all, as far as is known


@dataclass(frozen=True)
class Outcome:
    """cells: finished by this call; left: not begun, for want of time."""

    cells: int
    left: int


def run_pass(
    host: Host, spec: Spec, task: Pass, emit: Emit, tick: Tick, done: dict[str, Result], meter: Meter | None = None
) -> None:
    """Make a pass's missing cells on a host that is open."""
    if isinstance(task, LossPass):
        LossRun(host, spec, task, emit, tick, meter).run(done)
    else:
        run_task(host, spec, task, emit, tick, done, meter)


def open_host(spec: Spec, say: Say | None = None) -> Host:
    """The host of a suite. Raises as Host does."""
    return Host(spec.model, n_ctx=spec.n_ctx, force=spec.force, say=say, **spec.options)


class Suite:
    """Passes that belong together, and the folder that their results go to."""

    def __init__(self, spec: Spec, passes: Sequence[Pass], out: Path) -> None:
        self.spec, self.passes, self.log = spec, list(passes), RunLog(out / NAME)
        self._head: Head = {}

    def open(self, host: Host) -> dict[str, Result]:
        """See that the folder's results belong to this suite, and give what is finished. Nothing is written.

        Raises Refused where the folder's results belong to something else, and what Host.check raises.
        """
        ways = [self.spec.way(name) for name in dict.fromkeys(task.way for task in self.passes)]
        host.check(ways)
        model = model_identity(self.spec.model, force=self.spec.force)
        head = make_head(
            model, host.facts, ways, engine=engine_identity(), scale=self.spec.scale,
            texts={text.name: text.sha256 for text in (*self.spec.texts, *self.spec.files)},
            settings=self.spec.settings, force=self.spec.force,
        )  # fmt: skip
        self._head = json.loads(json.dumps(head))  # what a log would give back
        if (before := read_head(self.log)) is not None:
            check(before, self._head, printable(str(self.log.path)))
        return self.done()

    def done(self) -> dict[str, Result]:
        """Finished cells by name. What truncation shares with the original counts as soon as that is there."""
        runs = self.log.runs()
        return {**self._shared(runs), **runs}

    def _shared(self, runs: dict[str, Result]) -> dict[str, Result]:
        """Cells of truncation that are cells of the original, and are not among `runs` yet."""
        pairs = ((task, key, task.twin(key)) for task in self.passes for key in task.keys if key not in runs)
        return {key: {**runs[twin], "way": task.way} for task, key, twin in pairs if twin in runs}

    def _begin(self) -> None:
        """Write the head of the results, or what joins it."""
        out = self.log.path.parent
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileTrouble(
                f"{out}: the folder of results cannot be made",
                why=error.strerror or str(error),
                fix="--out with a folder that can be written",
            ) from None
        open_head(self.log, self._head)

    def _finish(self) -> None:
        """Write the cells that truncation shares with the original: a report reads nothing but the file."""
        for key, cell in self._shared(self.log.runs()).items():
            self.log.add(key, cell)

    def left(self, done: dict[str, Result]) -> list[Pass]:
        """Passes that have cells to make."""
        return [task for task in self.passes if any(key not in done for key in task.keys)]

    def run(
        self, host: Host, meter: Meter, *, deadline: float | None = None, on_progress: OnProgress | None = None
    ) -> Outcome:
        """Run what is left on `host`, in order, after `open`. deadline: time.monotonic() when reading ends.

        Ctrl-C leaves every finished cell; so does anything that is raised.
        """
        clocked = _Clock(meter, on_progress, deadline)
        made: list[str] = []
        self._begin()

        def emit(key: str, cell: Result) -> None:
            self.log.add(key, cell)
            made.append(key)

        try:
            for task in self.left(self.done()):
                done = self.done()  # another process may have been at it, or truncation have found its twin
                if all(key in done for key in task.keys):
                    continue
                ahead = expected(self.passes, done)
                rest = [span for each in self.left(ahead) if each is not task for span in each.spans(ahead)]
                clocked.begin(task.describe(), task.spans(done), rest)
                run_pass(host, self.spec, task, emit, clocked.tick, done, meter)
                clocked.end()
        except _OutOfTime:
            pass
        finally:
            self._finish()
        done = self.done()
        self._forget_states(host, done)
        return Outcome(len(made), _count(self.left(done), done))

    def _forget_states(self, host: Host, done: dict[str, Result]) -> None:
        """Remove what a process that was killed left of a pass that is finished now."""
        for task in self.passes:
            if isinstance(task, LossPass) and task.task == "ppl" and not task.goes_on and not task.missing(done):
                States(host, self.spec, task).remove()

    def submit(self, executor: Executor, on_progress: OnCells | None = None) -> Outcome:
        """Run what is left on an executor's workers, whole passes at a time, results written here as they come.

        Truncation goes last, since it shares cells with the original. A pass whose worker died is the executor's to
        repeat; nothing of it was written. Raises what a pass raised, after the others are finished.
        """
        made, trouble = 0, None
        self._begin()
        left = self.left(self.done())
        for batch in ([t for t in left if t.way != "truncate"], [t for t in left if t.way == "truncate"]):
            done = self.done()
            futures: dict[Future[Any], Pass] = {
                executor.submit(
                    work, self.spec, task, frozenset(done).intersection(task.keys), self._head["engine"]
                ): task
                for task in self.left(done)
                if task in batch
            }
            for future in as_completed(futures):
                if (error := future.exception()) is not None:
                    trouble = trouble or _told(error, futures[future])
                    continue
                for key, result in future.result():
                    self.log.add(key, result)
                    made += 1
                if on_progress:
                    done = self.done()
                    on_progress(futures[future].describe(), made, made + _count(self.left(done), done))
            self._finish()
        if trouble is not None:
            raise trouble
        return Outcome(made, 0)


def work(spec: Spec, task: Pass, finished: Iterable[str], engine: str) -> list[tuple[str, Result]]:
    """One pass without its finished cells, in a process of its own: what an executor is given.

    The host is kept for the next pass. Raises Refused where this machine's engine is not the suite's.
    """
    found: list[tuple[str, Result]] = []
    with _turn:  # a worker may have several threads
        if (here := engine_identity()) != engine:
            raise Refused(
                "a worker runs another engine than this suite's",
                why=f"it has {here}, and the results are of {engine}",
                fix="install the same release on every machine, and `mrrope build` there too",
            )
        done: dict[str, Result] = {key: {} for key in finished}
        run_pass(_worker_host(spec), spec, task, lambda key, cell: found.append((key, cell)), lambda *_: None, done)
    return found


def _told(error: BaseException, task: Pass) -> BaseException:
    """What a pass raised, or, where its workers died, an error that says so."""
    if isinstance(error, MrropeError) or not isinstance(error, Exception):
        return error
    return EngineTrouble(
        f"{task.describe()}: no worker finished it",
        why=f"{type(error).__name__}: {error}",
        fix="see the workers' logs, then give the same command again: what is finished is kept",
    )


_turn = Lock()
_hosts: list[tuple[Spec, Host]] = []  # of this process: one at most


def _worker_host(spec: Spec) -> Host:
    spec.check_model()  # before every pass: the file may have been replaced since the one before
    if _hosts and _hosts[0][0] == spec:
        return _hosts[0][1]
    while _hosts:
        _hosts.pop()[1].close()
    _hosts.append((spec, open_host(spec)))
    return _hosts[0][1]


def _count(passes: Iterable[Pass], done: dict[str, Result]) -> int:
    return sum(key not in done for task in passes for key in task.keys)


def calibrate(host: Host, meter: Meter, seconds: float = 8.0) -> None:
    """Read chunks of nothing in particular for some seconds, and let `meter` learn from them what a token costs."""
    from .decode import Decoder

    llm = host.plain()
    with Decoder(llm) as decoder:
        chunk = [max(llm.token_bos(), 0)] * decoder.chunk
        for _ in decoder.logits(chunk[:-SINGLE]):  # also pages the weights in
            pass
        at, start = decoder.n_past, time.perf_counter()
        for token in chunk[-SINGLE:]:
            for _ in decoder.logits([token]):
                pass
        meter.add(Span(at, SINGLE, single=True), time.perf_counter() - start)
        decoder.clear()
        began = time.perf_counter()
        while decoder.n_past + len(chunk) <= host.n_ctx:
            at, start = decoder.n_past, time.perf_counter()
            for _ in decoder.logits(chunk):
                pass
            meter.add(Span(at, len(chunk)), time.perf_counter() - start)
            if time.perf_counter() - began > seconds:
                break


def expected(passes: Sequence[Pass], done: dict[str, Result]) -> dict[str, Result]:
    """Finished cells, and those that truncation will have from the original's, which are measured too."""
    twins = {key: task.twin(key) for task in passes for key in task.keys}
    return {**done, **{key: {} for key, twin in twins.items() if twin in twins}}


def estimate(passes: Sequence[Pass], done: dict[str, Result], meter: Meter) -> str:
    """One line: how many cells and tokens are left, and how long they will take at the rate that was measured."""
    done = expected(passes, done)
    left = [task for task in passes if any(key not in done for key in task.keys)]
    spans = [span for task in left for span in task.spans(done)]
    cells = _count(left, done)
    return (
        f"{cells} cells in {len(left)} passes, {size(spans):,} tokens to read: about {clock(meter.seconds(spans))} "
        f"(measured: {meter.rate:.0f} tokens/s at the start of a context)"
    )


def within(passes: Sequence[Pass], done: dict[str, Result], meter: Meter, seconds: float) -> list[Pass]:
    """The passes whose rounds fit in `seconds`, shortest lengths first, whole rounds alone.

    A round is one cell of a text (past the window, what half a window holds: truncation's cell), or one length of a
    task, for every way that is measured.
    """
    rounds: dict[tuple[str, int], list[tuple[Pass, Any]]] = {}
    for task in passes:
        if isinstance(task, LossPass):
            for cell in task.cells:
                rounds.setdefault((f"{task.task}/{task.text}", _round(task, cell[1])), []).append((task, cell))
        else:
            for length in task.lengths:
                rounds.setdefault((task.task, length), []).append((task, length))
    done = expected(passes, done)
    kept: dict[int, list[Any]] = {}
    closed: set[str] = set()
    for (name, _), parts in sorted(rounds.items(), key=lambda item: item[0][1]):
        trial = {known: list(its) for known, its in kept.items()}
        for task, part in parts:
            trial.setdefault(id(task), []).append(part)
        now = [_part(task, trial[id(task)]) for task in passes if id(task) in trial]
        if name not in closed and sum(meter.seconds(task.spans(done)) for task in now) <= MARGIN * seconds:
            kept = trial
        else:
            closed.add(name)  # a later part of a text would have to read this one all the same
    return [_part(task, kept[id(task)]) for task in passes if id(task) in kept]


def _round(task: LossPass, end: int) -> int:
    """The position where the round of a cell ends."""
    half = half_window(task.window)
    return end if end <= task.window else task.window + -(-(end - task.window) // half) * half


def _part(task: Pass, parts: list[Any]) -> Pass:
    """The pass with these cells or lengths alone."""
    if isinstance(task, LossPass):
        return replace(task, cells=tuple(sorted(parts)), goes_on=len(parts) < len(task.cells))
    kept = [i for i, length in enumerate(task.lengths) if length in parts]
    return replace(
        task, lengths=tuple(task.lengths[i] for i in kept), cost=tuple(task.cost[i] for i in kept if task.cost)
    )


class _OutOfTime(Exception):
    """The deadline has passed."""


class _Clock:
    """Tells how far a suite is in seconds, from what the meter expects and how far that was off so far."""

    def __init__(self, meter: Meter, on_progress: OnProgress | None, deadline: float | None) -> None:
        self.meter, self.on_progress, self.deadline = meter, on_progress, deadline
        self.began, self.label = time.monotonic(), ""
        self.spans: list[Span] = []
        self.others: list[Span] = []

    def begin(self, label: str, spans: list[Span], rest: list[Span]) -> None:
        self.label, self.spans, self.others = label, spans, rest
        self.tick(0, 1)

    def tick(self, read: int, total: int) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _OutOfTime
        if self.on_progress is None:
            return
        share = read / max(total, 1)
        ahead = (1 - share) * self.meter.seconds(self.spans) + self.meter.seconds(self.others)
        spent = time.monotonic() - self.began
        self.on_progress(self.label, spent, spent + ahead)

    def end(self) -> None:
        """The pass is finished: what it took counts, and it is ahead no more."""
        self.spans = []
