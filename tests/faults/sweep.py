"""Has an operation meet every fault at every call it makes, and tells where something was lost or did not recover.

`python -m tests.faults.sweep OPERATION PLACE [--sample N] [--seed S]`, with the library preloaded: see `run`. For each
point a forked child does the operation and meets the fault; then another one, which meets none, does it again. It
prints a JSON object for every complaint, and one at the end: points by mode, calls, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from mrrope_gguf.errors import MrropeError
from tests.faults.injector import ROOT, STDIO, Call, Injector, Mode, compiled
from tests.faults.operation import BUS, DONE, HUNG, KILLED, RAISED, REFUSED, Met, Operation

_PATIENCE = 120  # seconds for one operation
_PRELOADED = "MRROPE_FAULTS"


@dataclass
class Swept:
    """What a sweep found: calls the operation makes and the way it took, points by mode, complaints, seconds."""

    calls: int
    points: dict[str, int]
    complaints: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    way: str = ""

    @property
    def n_points(self) -> int:
        return sum(self.points.values())


def run(
    operation: str,
    place: Path,
    *,
    sample: int = 0,
    seed: int = 7,
    only: tuple[str, str] | None = None,
    timeout: float = 3600,
) -> Swept:
    """Sweep in a process of its own.

    sample: so many points only, of all modes in turn, chosen by the seed. only: one point, by the number of its call
    or the name, which means the first of that name, and by its mode.
    """
    lib = str(compiled())
    command = [sys.executable, "-m", "tests.faults.sweep", operation, str(place)]
    command += ["--sample", str(sample), "--seed", str(seed), *(["--only", *only] if only else [])]
    preloaded = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), lib]))  # a sanitizer's comes first
    env = {**os.environ, "LD_PRELOAD": preloaded, _PRELOADED: lib, "MRROPE_ENGINE": "stock"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    *complaints, last = map(json.loads, done.stdout.splitlines())
    return Swept(**last, complaints=complaints)


class Sweep:
    """One operation, in a process that the library is preloaded into."""

    def __init__(self, operation: Operation, injector: Injector) -> None:
        self.operation, self.injector = operation, injector
        self.way = ""

    def calls(self) -> list[Call]:
        """What the operation does where nothing goes wrong. What it leaves is what it is to leave."""
        self.operation.prepare()
        met = self._child(None, again=False)
        assert met.how == DONE, met
        self.way = met.said
        calls = self.injector.calls()
        self.operation.finished()
        return calls

    def point(self, call: Call, mode: Mode) -> tuple[Met, list[str]]:
        """One fault at one call: what came of it, and what is wrong about that."""
        self.operation.prepare()
        met = self._child((call.n, mode), again=False)
        wrong = []
        if met.how in (RAISED, HUNG) or (met.how == BUS and not self.operation.victim):
            wrong.append(f"it {met.how}: {met.said}")
        if not self.injector.calls()[call.n - 1 : call.n]:
            wrong.append("that call was never reached")
        if mode.kills and met.how != KILLED:
            wrong.append(f"it was to be killed, and it {met.how}: {met.said}")
        # Linux has closed a file whose close was interrupted, and nobody tries again
        if mode.name in ("short", "EINTR") and met.how == REFUSED and call.kind != "f":
            wrong.append(f"it was no reason to give up: {met.said}")
        # what could not be deleted lies there
        wrong += [
            f"afterwards {word}"
            for word in self.operation.look(met, mode)
            if call.kind != "u" or not word.startswith("left over")
        ]
        later = self._child(None, again=True)
        if later.how != DONE:
            wrong.append(f"the next run {later.how}: {later.said}")
        wrong += [f"after the next run {word}" for word in self.operation.recovered()]
        return met, wrong

    def _child(self, fault: tuple[int, Mode] | None, *, again: bool) -> Met:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os._exit(self._act(fault, again, write))
        os.close(write)
        with open(read, "rb") as pipe:
            said = pipe.read().decode()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            by = os.WTERMSIG(status)
            how = {signal.SIGKILL: KILLED, signal.SIGALRM: HUNG, signal.SIGBUS: BUS}.get(signal.Signals(by), RAISED)
            return Met(how, "" if how == KILLED else f"signal {by}")
        return Met(**json.loads(said))

    def _act(self, fault: tuple[int, Mode] | None, again: bool, write: int) -> int:
        signal.alarm(_PATIENCE)
        operation = self.operation
        if not again:
            n, mode = fault or (0, None)
            self.injector.arm(operation.place, n, mode, operation.victim)
        try:
            operation.again() if again else operation.act()
            met = Met(DONE, operation.way)
        except MrropeError as error:
            met = Met(REFUSED, str(error))
        except BaseException as error:
            self.injector.disarm()
            import traceback

            met = Met(RAISED, f"{error!r} {''.join(traceback.format_tb(error.__traceback__)[-4:])}")
        self.injector.disarm()
        os.write(write, json.dumps(asdict(met)).encode())
        return 0


def thinned(calls: list[Call]) -> list[Call]:
    """Of many calls of C's streams in a row, which a buffer gathers anyway, the first and last and some between."""
    found: list[Call] = []
    for (name, _), group in groupby(calls, key=lambda call: (call.name, call.kind)):
        row = list(group)
        if name in STDIO and len(row) > 12:
            row = [*row[:3], *row[3 : -3 : max(1, len(row) // 8)], *row[-3:]]
        found += row
    return found


def chosen(calls: list[Call], modes: Mapping[str, Mode], sample: int, seed: int) -> list[tuple[Call, Mode]]:
    """Every fault at every call it fits, or `sample` of them, all modes in turn."""
    by_mode = {mode.name: [(call, mode) for call in calls if mode.fits(call)] for mode in modes.values()}
    if not sample:
        return [point for points in by_mode.values() for point in points]
    rng, found = random.Random(seed), list[tuple[Call, Mode]]()
    while len(found) < sample and any(by_mode.values()):
        for points in by_mode.values():
            if points and len(found) < sample:
                found.append(points.pop(rng.randrange(len(points))))
    return found


def main() -> None:
    from tests.faults.operations import OPERATIONS

    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("place", type=Path)
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", nargs=2, metavar=("CALL", "MODE"))
    args = parser.parse_args()
    start = time.monotonic()
    operation = OPERATIONS[args.operation](args.place)
    sweep = Sweep(operation, Injector(os.environ[_PRELOADED]))
    calls = sweep.calls()
    points = chosen(thinned(calls), operation.modes, args.sample, args.seed)
    if args.only:
        met_at = next(call for call in calls if args.only[0] in (str(call.n), call.name))
        points = [(met_at, operation.modes[args.only[1]])]
    outcomes, n_points = Counter[str](), Counter[str]()
    for call, mode in points:
        met, wrong = sweep.point(call, mode)
        outcomes[met.how] += 1
        n_points[mode.name] += 1
        if wrong:
            shown = {"n": call.n, "call": call.name, "mode": mode.name, "met": asdict(met), "wrong": wrong}
            print(json.dumps(shown), flush=True)
    operation.close()
    last = {"calls": len(calls), "way": sweep.way, "points": dict(n_points), "outcomes": dict(outcomes)}
    print(json.dumps({**last, "seconds": round(time.monotonic() - start, 1)}))


if __name__ == "__main__":
    main()
