"""The command line of `mrrope figure`; cli.py puts it into the whole."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .cli import Verbs

T = TypeVar("T")

KINDS = {
    "radix": "positions as digits (Fig. 2)",
    "factors": "how much slower each pair turns (3)",
    "bound": "how far a table sees (5)",
    "attention": "scores of the middle pairs by distance, measured (6)",
    "bands": "perplexity as the band's bounds move, measured (7, 8)",
}


def add_figure(verbs: Verbs, model: Callable[[argparse.ArgumentParser], None], tokens: Callable[[str], int]) -> None:
    p = verbs.add_parser("figure", help="the MrRoPE paper's figures for a model: what its tables are, and what they do")
    p.add_argument("kind", choices=KINDS, metavar="KIND", help="; ".join(f"{k}: {v}" for k, v in KINDS.items()))
    model(p)
    p.add_argument("--methods", metavar="LIST", help="none, linear, ntk, yarn, yarn-turns, mrrope-uni, mrrope-pro")
    p.add_argument("-s", "--scale", type=float, default=4.0, metavar="S", help="default: 4")
    p.add_argument("--out", metavar="PNG|DIR", help="the picture (.png, .svg, .pdf), or a folder for PNG and SVG")
    p.add_argument("--data", metavar="FILE", help="write the numbers too (.json or .csv)")
    p.add_argument("--json", action="store_true", help="print the numbers as JSON")
    radix = p.add_argument_group("radix")
    radix.add_argument("--at", type=tokens, metavar="N", help="the position to write (default: the last one)")
    measured = p.add_argument_group("attention and bands")
    measured.add_argument("-c", "--ctx-size", type=tokens, metavar="N", help="default: 1.25 x the original context")
    measured.add_argument("--text", metavar="TEXT", help="a name of `mrrope texts` or a file (default: britannica)")
    measured.add_argument("-t", "--threads", type=int, metavar="N", help="default: all cores")
    attention = p.add_argument_group("attention")
    attention.add_argument("--layers", type=_list_of(int), metavar="LIST", help="default: four, evenly spread")
    attention.add_argument("--queries", type=int, metavar="N", help="the last N positions (default: 1024)")
    bands = p.add_argument_group("bands (with --out the same command goes on where it stopped)")
    bands.add_argument("--beta-fast", type=_list_of(float), metavar="LIST", help="default: 8,16,32,64")
    bands.add_argument("--beta-slow", type=_list_of(float), metavar="LIST", help="default: 0.5,1,2,4")
    bands.add_argument("--needle", action="store_true", help="ask for ten hidden numbers too")


def _list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 8,16,32") from None

    return parse
