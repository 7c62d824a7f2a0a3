"""The options of `mrrope eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

KINDS = {
    "ppl": "perplexity by position, of each way and of truncation",
    "kl": "how far each way is from the original model inside its own context",
    "needle": "a number hidden at every depth of every length",
    "ruler": "RULER's tasks: the core that needs no text, all that work offline, or those named",
    "retrieval": "InfiniteBench's PassKey, Number and KV; its own files and LongBench v2's with --file",
    "all": "all of these, in the time there is (--budget)",
}


def add_eval(verbs: Any, tokens: Callable[[str], int], kv_types: tuple[str, ...]) -> None:
    """The verb. tokens: reads 32k as a number; kv_types: the cache types there are."""
    p = verbs.add_parser(
        "eval",
        help="measure methods on one model: perplexity, KL, needles, RULER, retrieval; resumes, reports",
        usage="mrrope eval WHAT MODEL [options]",
        description="Measure ways to run one model past its context. The same command goes on where it stopped.",
        epilog="WHAT is one of: " + "; ".join(f"{name} ({about})" for name, about in KINDS.items()),
    )
    # "?", since it may stand anywhere: cli_order finds it, and cli.py asks for it where it is missing
    p.add_argument("what", nargs="?", metavar="WHAT", help="|".join(KINDS))
    p.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file (any shard of a split one)")
    p.add_argument("-m", dest="model_flag", metavar="FILE", help="the same, as llama.cpp's tools name it")
    p.add_argument(
        "--methods", type=_list_of(str), default=[], metavar="A,B,...",
        help="none, truncate, linear, ntk, yarn, yarn-turns, mrrope-uni, mrrope-pro, METHOD@B (a table for each "
        "length), elastic, elastic:METHOD (default: none,truncate,yarn,mrrope-uni,mrrope-pro and, if the engine can, "
        "elastic)",
    )  # fmt: skip
    p.add_argument("--scale", type=float, default=4.0, metavar="S", help="times the model's own context (default: 4)")
    p.add_argument(
        "--lengths",
        type=_list_of(tokens),
        default=[],
        metavar="N,...",
        help="in tokens: 4k,8k,32k (default: up to S)",
    )
    p.add_argument(
        "--text", dest="texts", nargs="+", action="extend", default=[], metavar="TEXT",
        help="prose to read: names of `mrrope texts`, or UTF-8 files (default: voyage-out); needles lie in --hay's",
    )  # fmt: skip
    p.add_argument("--out", default="eval", metavar="DIR", help="results and report (default: ./eval)")
    p.add_argument("--budget", metavar="TIME", help="30m, 2h: measure what fits, the same for every method")
    p.add_argument("--estimate", action="store_true", help="say what would run and how long it takes, run nothing")
    tasks = p.add_argument_group("needles, RULER and retrieval")
    tasks.add_argument(
        "--samples", type=int, metavar="N",
        help="texts of each length (default: needle 1, others 5, a benchmark's file all it has; in all 2)",
    )  # fmt: skip
    tasks.add_argument("--seed", type=int, metavar="N", help="default: 42")
    tasks.add_argument("--hay", metavar="TEXT", help="around needles: noise (default), or a text")
    tasks.add_argument(
        "--depths",
        type=_list_of(float),
        metavar="P,...",
        help="needle: per cent of the text before it (default: 0,10,..)",
    )
    tasks.add_argument(
        "--keys", type=int, metavar="N",
        help="needle: N named numbers in one text, each asked for: fast, and another task than one (at most 10)",
    )  # fmt: skip
    tasks.add_argument(
        "--tasks", type=_list_of(str), default=[], metavar="A,...", help="RULER's (core, offline, names) or retrieval's"
    )
    tasks.add_argument("--squad", metavar="JSON", help="SQuAD's file, for RULER's qa_1")
    tasks.add_argument("--hotpotqa", metavar="JSON", help="HotpotQA's file, for RULER's qa_2")
    tasks.add_argument(
        "--file", dest="files", nargs="+", action="extend", default=[], metavar="JSONL",
        help="retrieval: InfiniteBench's or LongBench v2's own files",
    )  # fmt: skip
    run = p.add_argument_group("how the model runs")
    run.add_argument("-t", "--threads", type=int, metavar="N", help="default: this machine's cores")
    run.add_argument("-ngl", "--gpu-layers", type=int, metavar="N", help="layers on a GPU (-1: all)")
    run.add_argument("-ctk", "--cache-type-k", choices=kv_types, help="default: f16")
    run.add_argument("-ctv", "--cache-type-v", choices=kv_types, help="default: f16")
    run.add_argument("-fa", "--flash-attn", choices=("on", "off"), default="on", help="default: on")
    run.add_argument(
        "--swa-full", action="store_true",
        help="of a model with sliding windows, keep every key: more memory, and what questions share is read once",
    )  # fmt: skip
    run.add_argument("--cluster", metavar="ADDRESS", help="a Dask scheduler whose workers share the passes")
    p.add_argument("-f", "--force", action="store_true", help="replace a RoPE scaling the model was trained with")
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _list_of(kind: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    def read(text: str) -> list[_T]:
        try:
            found = [kind(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers parted by commas") from None
        if not found:  # as if the option had not been given, which may take hours
            raise argparse.ArgumentTypeError(f"{text!r} names nothing")
        return found

    return read
