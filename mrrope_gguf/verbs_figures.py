"""`mrrope figure KIND MODEL`: make one of the paper's figures for a model, print its numbers, draw it."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .figures.common import Figure, check_data, picture_paths, write_data, write_picture
from .kind_options import Options, require_meaning
from .progress import Bar
from .said import put

Say = Callable[[str], None]


def figure(args: argparse.Namespace, say: Say) -> int:
    """Numbers to stdout (as a table, or JSON), the picture to --out and the numbers to --data."""
    require_meaning(args, "figure", args.kind, _OPTIONS)
    data = check_data(args.data) if args.data else None
    pictures = picture_paths(args.out, args.kind) if args.out else []
    made = _MAKERS[args.kind](args, say)
    put(json.dumps(made.to_json(), indent=1) if args.json else made.render())
    if data:
        write_data(made, data)
        say(f"numbers: {data}")
    for path in pictures:
        write_picture(made, path)
        say(f"picture: {path}")
    return 0


# options that only some kinds have, and what they are in `args`
_OPTIONS: Options = {
    "--at": ("at", ("radix",)),
    "--ctx-size": ("ctx_size", ("attention", "bands")),
    "--text": ("text", ("attention", "bands")),
    "--threads": ("threads", ("attention", "bands")),
    "--layers": ("layers", ("attention",)),
    "--queries": ("queries", ("attention",)),
    "--beta-fast": ("beta_fast", ("bands",)),
    "--beta-slow": ("beta_slow", ("bands",)),
    "--needle": ("needle", ("bands",)),
}


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep the figure's own defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _radix(args: argparse.Namespace, _: Say) -> Figure:
    from .figures.radix import radix

    return radix(args.model, scale=args.scale, **_given(methods=args.methods, at=args.at))


def _factors(args: argparse.Namespace, _: Say) -> Figure:
    from .figures.factors import factors

    return factors(args.model, scale=args.scale, **_given(methods=args.methods))


def _bound(args: argparse.Namespace, _: Say) -> Figure:
    from .figures.bound import bound

    return bound(args.model, scale=args.scale, **_given(methods=args.methods))


def _measured(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """What both kinds that run the model take; the engine is named first."""
    from . import engine
    from .figures.common import figure_ways, model_facts
    from .figures.words import DEFAULT, read_words

    gc.enable()  # a run of an hour makes cycles
    model_facts(args.model)  # a model that cannot be measured is refused before anything slow
    figure_ways(args.methods or "none", args.scale)
    words = read_words(args.text or DEFAULT, say)
    engine.announce(say, needs_patch=True)
    options = _given(methods=args.methods, length=args.ctx_size, n_threads=args.threads)
    return {"scale": args.scale, "words": words, "say": say, **options}


def _attention(args: argparse.Namespace, say: Say) -> Figure:
    from .figures.attention import attention

    options = _measured(args, say)
    with Bar("reading", ("tok", 1)) as bar:
        return attention(args.model, progress=bar, **options, **_given(queries=args.queries, layers=args.layers))


def _bands(args: argparse.Namespace, say: Say) -> Figure:
    from .evals.runlog import RunLog
    from .figures.bands import bands

    options = _measured(args, say)
    options |= _given(beta_fast=args.beta_fast, beta_slow=args.beta_slow)
    log = RunLog(log_path(args.out)) if args.out else None
    if log is None:
        say("note: without --out nothing is kept of a sweep that is interrupted")
    with Bar("reading", ("tok", 1)) as bar:
        return bands(args.model, needle=args.needle, log=log, progress=bar, **options)


def log_path(out: str) -> Path:
    """Where the finished runs of a sweep lie: beside its picture, or in its folder."""
    path = Path(out)
    return path / "figure-bands.runs.jsonl" if path.is_dir() else path.with_suffix(".runs.jsonl")


_MAKERS: dict[str, Callable[[argparse.Namespace, Say], Figure]] = {
    "radix": _radix, "factors": _factors, "bound": _bound, "attention": _attention, "bands": _bands,
}  # fmt: skip
