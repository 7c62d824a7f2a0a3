"""What `mrrope eval` does with its arguments: plan, estimate, measure, report."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileTrouble, MrropeError, Refused
from .kind_options import Options, require_meaning
from .progress import Bar, clock
from .said import put
from .said import say as _say
from .text import printable

if TYPE_CHECKING:
    from .evals.plans import Request


def run(args: argparse.Namespace) -> int:
    """Run the suite that was asked for, or go on with it; returns the exit code."""
    from . import engine
    from .evals import plans
    from .evals.cluster import connect
    from .evals.suite import Suite, calibrate, estimate, open_host, within
    from .meter import Meter

    began, seconds = time.monotonic(), _budget(args.budget)
    request = _request(args)
    spec, lengths, window = plans.make_spec(args.model, request, _say)
    with open_host(spec, _say) as host:
        passes = plans.make_passes(host.plain(), spec, request, lengths, window, _say)
        suite = Suite(spec, passes, Path(args.out))
        done = suite.open(host)
        if not suite.left(done):
            _say(f"all {sum(len(task.keys) for task in passes)} cells are in {printable(args.out)} already")
            if not args.estimate:
                suite.run(host, Meter())  # tidies up, if a process was killed at its very end
            return _report(args)
        if not args.estimate:
            _check_out(Path(args.out))
        meter = Meter()
        calibrate(host, meter)
        _say(f"{host.name}: {engine.loaded_library().kind} engine, {estimate(passes, done, meter)}")
        if seconds is not None:
            suite.passes = within(passes, done, meter, seconds - (time.monotonic() - began))
            if not suite.left(done):
                raise _too_little(passes, done, meter, seconds)
            _say(f"in {clock(seconds)}: {estimate(suite.passes, done, meter)}; the same command goes on from there")
        if args.estimate:
            return 0
        if args.cluster:
            host.close()
            bar = _EvalBar()
            with connect(args.cluster) as executor, bar:
                suite.submit(executor, bar.cells)
        else:
            deadline = None if seconds is None else began + seconds
            bar = _EvalBar()
            with bar:
                suite.run(host, meter, deadline=deadline, on_progress=bar.time)
        suite.passes = passes
        left = suite.left(suite.done())
        if left:
            _say(f"{len(left)} of {len(passes)} passes are not finished: give the same command again to go on")
    return _report(args)


def _request(args: argparse.Namespace) -> Request:
    from .evals.plans import Request

    _check(args)
    options: dict[str, Any] = {"flash_attn": args.flash_attn == "on"}
    given = {"n_threads": args.threads, "n_gpu_layers": args.gpu_layers}
    given |= {"type_k": args.cache_type_k, "type_v": args.cache_type_v}
    options |= {name: value for name, value in given.items() if value is not None}
    options |= {"swa_full": True} if args.swa_full else {}
    kept = {"seed": args.seed, "hay": args.hay, "keys": args.keys}
    kept |= {"depths": args.depths and tuple(percent / 100 for percent in args.depths)}
    return Request(
        args.what, methods=args.methods, scale=args.scale, lengths=args.lengths, texts=args.texts,
        samples=args.samples, tasks=args.tasks, files=args.files, squad=args.squad, hotpotqa=args.hotpotqa,
        force=args.force, options=options, **{name: value for name, value in kept.items() if value is not None},
    )  # fmt: skip


# options that only some kinds have, and what they are in `args`; `all` has them all
_OPTIONS: Options = {
    "--text": ("texts", ("ppl", "kl", "ruler")),
    "--samples": ("samples", ("needle", "ruler", "retrieval")),
    "--seed": ("seed", ("needle", "ruler", "retrieval")),
    "--hay": ("hay", ("needle",)),
    "--depths": ("depths", ("needle",)),
    "--keys": ("keys", ("needle",)),
    "--tasks": ("tasks", ("ruler", "retrieval")),
    "--squad": ("squad", ("ruler",)),
    "--hotpotqa": ("hotpotqa", ("ruler",)),
    "--file": ("files", ("retrieval",)),
}


def _check_options(args: argparse.Namespace) -> None:
    """Refused for options that nothing would come of."""
    if args.what != "all":
        fixes = {"--text": "--hay TEXT hides needles in a text"} if args.what == "needle" else {}
        require_meaning(args, "eval", args.what, _OPTIONS, fixes)
    if args.depths and (args.keys or 1) > 1:
        raise Refused(
            "eval needle: --depths means nothing beside --keys",
            why=f"the {args.keys} numbers of a text lie all over it",
            fix="leave one of the two out",
        )


def _check(args: argparse.Namespace) -> None:
    """Refused for numbers that no suite can be made of, and for options that nothing would come of."""
    from .evals.needles import KEYS

    _check_options(args)
    wrong = {
        f"--samples {args.samples}": args.samples is not None and args.samples < 1,
        f"--keys {args.keys}": args.keys is not None and not 1 <= args.keys <= len(KEYS),
        "--out is empty": not args.out,
        f"--threads {args.threads}": args.threads is not None and args.threads < 1,
        f"--depths {args.depths}": args.depths is not None
        and not (args.depths and all(0 <= percent <= 100 for percent in args.depths)),
    }
    for said, bad in wrong.items():
        if bad:
            raise Refused(
                said,
                why="nothing can be measured so",
                fix=f"1 sample or more, 1 to {len(KEYS)} keys, depths from 0 to 100, and a folder for the results",
            )


def _check_out(out: Path) -> None:
    """FileTrouble where a folder of results cannot be: told before anything is measured. Nothing is made yet."""
    place = next(each for each in (out, *out.absolute().parents) if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise FileTrouble(
            f"{out}: results cannot be kept there",
            why=f"{place} is {'read-only, or belongs to someone else' if place.is_dir() else 'no folder'}",
            fix="--out with a folder that can be written",
        )


def _budget(text: str | None) -> float | None:
    from .meter import duration

    if text is None:
        return None
    try:
        return duration(text)
    except ValueError as error:
        raise MrropeError(f"--budget {text}", why=str(error), fix="--budget 30m") from None


def _too_little(passes: list[Any], done: Mapping[str, Any], meter: Any, seconds: float) -> MrropeError:
    spans = [span for task in passes for span in task.spans(done)]
    whole = clock(meter.seconds(spans))
    return Refused(
        f"a budget of {clock(seconds)} is too small",
        why=f"not even the next length of one task fits in it for every method; all that is left takes {whole}",
        fix="a larger --budget, fewer --methods, or shorter --lengths",
    )


def _report(args: argparse.Namespace) -> int:
    from .evals.report import report

    done = report(args.out)
    for line in filter(None, done.missing.split("\n")):
        _say(line)
    put(json.dumps(done.to_json(), indent=2) if args.json else done.render())
    return 0


class _EvalBar(Bar):
    """What runs, how much of the time is over, and how long still."""

    def __init__(self) -> None:
        super().__init__("", ("s", 1))
        self.what = ""

    def time(self, what: str, spent: float, whole: float) -> None:
        """Seconds spent, and in all as far as is known."""
        self._tell(what)
        self(round(spent), max(round(whole), 1))

    def cells(self, what: str, made: int, whole: int) -> None:
        """Cells made, and in all; `what` was finished last."""
        self._tell(what)
        self(made, max(whole, 1))

    def line(self, done: int, total: int, seconds: float, columns: int = 200) -> str:
        share = done / total if total else 1.0
        left = f"{clock((total - done) / done * seconds)} left" if done else ""
        return f"{printable(self.what, limit=60)}  {share:4.0%}  {left}"[:columns]

    def _tell(self, what: str) -> None:
        """One line a pass where there is no terminal to draw on."""
        if what != self.what and not self.shown:
            _say(what)
        self.what = what
