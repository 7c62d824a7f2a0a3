"""The trie scheduler against each prompt alone: tokens counted, and seconds, in the same run.

    python -m benchmarks.trie [--lengths 256,512,1024] [--kv-length 1600] [--rounds 3]     (200,000 tokens)
    python -m benchmarks.trie --only retriever [--tiny-lengths 256,512,...,8192] [--threads 1]

Counted without running anything: a needle grid of 4K to 128K tokens at 11 depths, 20 questions on one JSON object.
Timed on SmolLM2: the same at the lengths given. Timed on the tiny retriever of tests/data: a grid of as many doubling
lengths as the counted one has, which takes SmolLM2 hours; its count stands beside its seconds. Each way once in every
round after a short warm-up; the results must be the same. What --only leaves out stays as it was in the results.
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

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "trie.json"
RETRIEVER = ROOT / "tests" / "data" / "retriever-256.gguf"
DEPTHS = [i / 10 for i in range(11)]
LENGTHS, KV_LENGTH = [4096 << i for i in range(6)], 4096
TINY_LENGTHS = [256 << i for i in range(len(LENGTHS))]
QUESTIONS = 20
GENERATE = {"needle grid": 128, "key-value": 50}  # RULER's and InfiniteBench's, for the counts
FLOORS = {"needle grid": 1.6, "key-value": 8.0}


def grid(llm: Any, lengths: list[int], generate: int = 0) -> list[Prompt]:
    """Each has an answer whose loss is asked for, and a text of `generate` tokens."""
    return [cell.prompt(generate) for cell in needle_grid(llm, lengths, DEPTHS, generate=generate)]


def suites(llm: Any, lengths: list[int], kv_length: int, generate: dict[str, int]) -> dict[str, list[Prompt]]:
    """Both kinds of prompts."""
    task = TaskPass("retrieval/kv", "", (kv_length,), (), SEED, 1, kv_length)
    items = sample_items(llm, task, retrieval(llm, "kv", kv_length, n=1, questions=QUESTIONS))
    asked = [replace(item.prompt, generate=generate["key-value"]) for item in items]
    return {"needle grid": grid(llm, lengths, generate["needle grid"]), "key-value": asked}


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


def counted(path: Path) -> dict[str, Any]:
    """Both kinds of prompts at the lengths that are too long to be timed."""
    made = suites(load(path, vocab_only=True), LENGTHS, KV_LENGTH, GENERATE)
    facts = {"model": path.name, "lengths": LENGTHS, "kv_length": KV_LENGTH, "generate": GENERATE}
    return facts | {name: count(prompts) for name, prompts in made.items()}


def opened(path: Path, n_ctx: int, threads: int | None) -> Any:
    """The model in a context of that many tokens, past its own too: how fast it reads does not depend on that."""
    chosen: dict[str, Any] = {} if threads is None else {"n_threads": threads, "n_threads_batch": threads}
    return load(path, n_ctx, flash_attn=False, past_window=True, **chosen)


def about(llm: Any, path: Path) -> dict[str, Any]:
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    return {"machine": machine, "model": path.name, "threads": llm.n_threads_batch}


def shown(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name}, timed: {row['times fewer tokens']:.2f}x fewer tokens, "
        f"{row['times faster']:.2f}x faster ({row['seconds, naive']:.1f} s to {row['seconds, trie']:.1f} s)"
    )


def smollm2(path: Path, lengths: list[int], kv_length: int, rounds: int, threads: int | None) -> dict[str, Any]:
    llm = opened(path, max(*lengths, kv_length), threads)
    prompts = suites(llm, lengths, kv_length, {"needle grid": 0, "key-value": 0})
    rows = {name: measure(llm, name, each, rounds) for name, each in prompts.items()}
    for name, row in rows.items():
        print(shown(name, row), flush=True)
    return {**about(llm, path), "lengths": lengths, "kv_length": kv_length, "rounds": rounds, **rows}


def retriever(lengths: list[int], rounds: int, threads: int | None) -> dict[str, Any]:
    llm = opened(RETRIEVER, max(lengths), threads)
    row = measure(llm, "needle grid", grid(llm, lengths), rounds)
    print(shown("needle grid, tiny retriever", row), flush=True)
    return {**about(llm, RETRIEVER), "lengths": lengths, "rounds": rounds, "needle grid": row}


def integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=integers, default=[256, 512, 1024], help="of SmolLM2's prompts, in tokens")
    parser.add_argument("--kv-length", type=int, default=1600, help="of its questions")
    parser.add_argument("--tiny-lengths", type=integers, default=TINY_LENGTHS, help="of the tiny retriever's prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: llama-cpp-python's")
    parser.add_argument("--only", choices=("smollm2", "retriever"), help="time this model alone")
    given = parser.parse_args()
    os.environ["MRROPE_ENGINE"] = "stock"
    path = fetch.fetch(fetch.SMOLLM2)
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = counted(path)
    result |= {"depths": DEPTHS, "questions": QUESTIONS, "counted": found}
    for name in FLOORS:
        print(f"{name}, counted: {found[name]['times fewer tokens']:.2f}x fewer tokens", flush=True)
    if given.only != "retriever":
        result["timed"] = smollm2(path, given.lengths, given.kv_length, given.rounds, given.threads)
    if given.only != "smollm2":
        result["timed, tiny retriever"] = retriever(given.tiny_lengths, given.rounds, given.threads)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(found[name]["times fewer tokens"] >= floor for name, floor in FLOORS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
