"""The trie scheduler against each prompt alone: tokens counted, and seconds on SmolLM2, in the same run.

    python -m benchmarks.trie [--lengths 256,512,1024] [--kv-length 1600] [--rounds 3]     (200,000 tokens)

Counted without running anything: a needle grid of 4K to 128K tokens at 11 depths, 20 questions on one JSON object.
Timed: the same at the lengths given, each way once in every round after a short warm-up; the results must be the same.
Fails if the trie does not save 1.6x of the grid's tokens and 8x of the questions', continuations included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrrope_gguf import fetch
from mrrope_gguf.evals.grid import needle_grid
from mrrope_gguf.evals.passes import TaskPass
from mrrope_gguf.evals.retrieval import SEED, retrieval
from mrrope_gguf.evals.tasks import sample_items
from mrrope_gguf.evals.trie import Prompt, Result, plan, run
from mrrope_gguf.model import load
from mrrope_gguf.progress import Bar

RESULTS = Path(__file__).parent / "results" / "trie.json"
DEPTHS = [i / 10 for i in range(11)]
LENGTHS, KV_LENGTH = [4096 << i for i in range(6)], 4096
QUESTIONS = 20
GENERATE = {"needle grid": 128, "key-value": 50}  # RULER's and InfiniteBench's, for the counts
FLOORS = {"needle grid": 1.6, "key-value": 8.0}


def suites(llm: Any, lengths: list[int], kv_length: int, generate: dict[str, int]) -> dict[str, list[Prompt]]:
    """Both kinds of prompts. Each has an answer whose loss is asked for, and texts of `generate` tokens."""
    cells = needle_grid(llm, lengths, DEPTHS, generate=generate["needle grid"])
    task = TaskPass("retrieval/kv", "", (kv_length,), (), SEED, 1, kv_length)
    items = sample_items(llm, task, retrieval(llm, "kv", kv_length, n=1, questions=QUESTIONS))
    asked = [replace(item.prompt, generate=generate["key-value"]) for item in items]
    return {"needle grid": [cell.prompt(generate["needle grid"]) for cell in cells], "key-value": asked}


def count(prompts: list[Prompt]) -> dict[str, Any]:
    work = plan(prompts)
    return {
        "prompts": len(prompts),
        "tokens, trie": work.trie,
        "tokens, naive": work.naive,
        "tokens of continuations, at most": work.continuation,
        "times fewer tokens": work.ratio,
    }


def timed(llm: Any, name: str, prompts: list[Prompt], share: bool) -> tuple[float, list[Result]]:
    began = time.perf_counter()
    with Bar(f"{name}, {'trie' if share else 'naive'}", ("tok", 1)) as bar:
        found = run(llm, prompts, share=share, progress=bar)
    return time.perf_counter() - began, found


def measure(llm: Any, name: str, prompts: list[Prompt], rounds: int) -> dict[str, Any]:
    """Seconds each way, medians over the rounds; SystemExit if the results are not the same."""
    for share in (True, False):
        timed(llm, f"{name}, warm-up", prompts[:2], share)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        found = {}
        for share, taken in seconds.items():
            took, found[share] = timed(llm, name, prompts, share)
            taken.append(took)
        if found[True] != found[False]:
            raise SystemExit(f"{name}: the trie's results are not those of each prompt alone")
    trie, naive = (statistics.median(seconds[share]) for share in (True, False))
    ratios = [b / a for a, b in zip(seconds[True], seconds[False], strict=True)]
    return {
        **count(prompts),
        "seconds, trie": trie,
        "seconds, naive": naive,
        "times faster": naive / trie,
        "times faster, each round": ratios,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="256,512,1024", help="of the timed prompts, in tokens")
    parser.add_argument("--kv-length", type=int, default=1600, help="of the timed questions")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ["MRROPE_ENGINE"] = "stock"
    path, lengths = fetch.fetch(fetch.SMOLLM2), [int(n) for n in given.lengths.split(",")]
    counted = {name: count(p) for name, p in suites(load(path, vocab_only=True), LENGTHS, KV_LENGTH, GENERATE).items()}
    for name, row in counted.items():
        print(f"{name}, counted: {row['times fewer tokens']:.2f}x fewer tokens", flush=True)
    llm: Any = load(path, n_ctx=max(*lengths, given.kv_length), flash_attn=False)
    short = suites(llm, lengths, given.kv_length, {"needle grid": 0, "key-value": 0})
    measured = {name: measure(llm, name, prompts, given.rounds) for name, prompts in short.items()}
    for name, row in measured.items():
        print(
            f"{name}, timed: {row['times fewer tokens']:.2f}x fewer tokens, "
            f"{row['times faster']:.2f}x faster ({row['seconds, naive']:.1f} s to {row['seconds, trie']:.1f} s)"
        )
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "model": path.name,
        "depths": DEPTHS,
        "questions": QUESTIONS,
        "counted": {"lengths": LENGTHS, "kv_length": KV_LENGTH, "generate": GENERATE, **counted},
        "timed": {"lengths": lengths, "kv_length": given.kv_length, "rounds": given.rounds, **measured},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(counted[name]["times fewer tokens"] >= floor for name, floor in FLOORS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
