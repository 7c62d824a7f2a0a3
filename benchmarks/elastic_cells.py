"""What benchmarks.elastic measured, as cells of `mrrope eval ppl` and `needle --keys 10`: nothing is read twice.

    python -m benchmarks.elastic_cells MODEL DIR        MODEL: smollm2 or gemma3; DIR: --out of `mrrope eval`

DIR must hold results already (`mrrope eval kl`, say): their first line says what they belong to. The cells are the
same numbers: both read a text once from its beginning in one context, f16 cache, plain attention (`-fa off`), and keep
mean losses of 256 positions; both hide the same ten numbers at the same places of the noise (their prose differs, and
is left out). So is truncation on Gemma: there the benchmark reads a whole window for each 4096 positions, and `mrrope
eval` one for each 16,384.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.elastic import RESULTS
from benchmarks.elastic_models import MODELS, widened
from benchmarks.elastic_plan import DEFAULT, PRO
from mrrope_gguf.evals.needles import KEYS
from mrrope_gguf.evals.passes import TaskPass
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.evals.tasks import key_items
from mrrope_gguf.model import load

BUCKET = 4096
NAMES = {
    "none": "none",
    "truncate": "truncate",
    DEFAULT: "elastic",
    PRO: "elastic:mrrope-pro",
    "static,method=linear,scale=4": "linear",
    "static,method=ntk,scale=4": "ntk",
    "static,method=yarn,scale=4": "yarn",
    "static,method=yarn-turns,scale=4": "yarn-turns",
    "static,method=uni,scale=4": "mrrope-uni",
    "static,method=pro,scale=4": "mrrope-pro",
}
Depths = Callable[[int, int], Sequence[float | None]]


def needle_cells(runs: dict[str, dict[str, Any]], model: str, depths: Depths) -> Iterator[dict[str, Any]]:
    """Each needle run of a model as ten cells. The benchmark kept no answers, only whether the number was in them."""
    for name, run in runs.items():
        kind, of, *rest = name.split("/")
        if (kind, of) != ("needle", model) or rest[0] != "noise" or rest[3] not in NAMES:
            continue
        task, seed, length, way = "needle-keys/noise", int(rest[1]), int(rest[2]), NAMES[rest[3]]
        for i, (loss, recalled) in enumerate(zip(run["losses"], run["recalled"], strict=True)):
            place = {"task": task, "way": way, "length": length, "depth": depths(seed, length)[i], "seed": seed}
            found = {"score": float(recalled), "exact": recalled, "loss": loss}
            yield {"run": f"{task}/{way}/{length}/{i}-{seed}-of-10", **place, **found}


def depths_of(model: str) -> Depths:
    """Where each of the ten numbers stands, in per cent of the text: the haystacks are made again, nothing is run."""
    llm = load(widened(MODELS[model].resource), vocab_only=True)
    window = MODELS[model].n_ctx_orig

    @cache
    def places(seed: int, length: int) -> list[float | None]:
        task = TaskPass("needle-keys/noise", "", (length,), (), seed, 1, window, keys_per_text=len(KEYS))
        return [item.depth for item in key_items(llm, task, length, None)]

    return places


def cells(runs: dict[str, dict[str, Any]], model: str) -> Iterator[dict[str, Any]]:
    """Each perplexity run of a model as a cell. Within the window elastic and truncation are `none`, bit for bit."""
    for name in runs:
        kind, of, *rest = name.split("/")
        if (kind, of) != ("ppl", model) or rest[1] not in NAMES:
            continue
        text, way, end = rest[0], NAMES[rest[1]], int(rest[2])
        if model == "gemma3" and way == "truncate":
            continue
        same = ("elastic", "truncate") if way == "none" and end <= MODELS[model].n_ctx_orig else ()
        for each in (way, *same):
            place = {"task": "ppl", "text": text, "way": each, "start": end - BUCKET, "end": end}
            yield {"run": f"ppl/{text}/{each}/{end - BUCKET}-{end}", **place, "blocks": runs[name]["blocks"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic_cells")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("dir", type=Path)
    args = parser.parse_args()
    log = RunLog(args.dir / "results.jsonl")
    there = log.runs()
    if not there:
        print(f"error: {args.dir}: no results yet; run `mrrope eval kl ... --out {args.dir}` first", file=sys.stderr)
        return 1
    runs = RunLog(RESULTS).runs()
    found = [*cells(runs, args.model), *needle_cells(runs, args.model, depths_of(args.model))]
    new = [cell for cell in found if cell["run"] not in there]
    for cell in new:
        log.add(cell.pop("run"), cell)
    print(f"{len(new)} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
