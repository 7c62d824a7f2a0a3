"""Gemma 3 270M (32768 tokens, every sixth layer global) extended to 131072, on the patched engine.

    python -m benchmarks.gemma_128k [--threads N] [WHAT ...]     (everything: hours on 2 cores)

WHAT is `perplexity/FILE`: perplexity of an encyclopaedia's article by buckets of 4096 positions, 40960 in all; or
`needles/FILE/TOKENS`: ten numbers hidden in a text of that many tokens, each asked for. FILE is `original`, the model
as it is, or the method of an extended one. Results go to benchmarks/results/gemma_128k.json, with the machine's load
at the time; a WHAT that has one is not measured again. --table prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mrrope_gguf import fetch
from mrrope_gguf.engine import loaded_library
from mrrope_gguf.evals.losses import perplexity, token_nll
from mrrope_gguf.evals.needles import ask, haystack
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load

WINDOW, SCALE, BUCKET = 32768, 4.0, 4096
LENGTH = 40960
RESULTS = Path(__file__).parent / "results" / "gemma_128k.json"
FILES = ("original", "mrrope-pro")
WHATS = (
    *(f"perplexity/{name}" for name in FILES),
    *(f"needles/{name}/{tokens}" for tokens in (24576, 40960, 65536) for name in FILES),
)


def model(name: str, folder: Path) -> Path:
    """The file to run."""
    original = fetch.fetch(fetch.GEMMA3)
    if name == "original":
        return original
    return extend(original, folder / f"{name}.gguf", scale=SCALE, method=name, elastic=False, rendering="engine").path


def open_model(path: Path, threads: int) -> Any:
    """With the whole 131072 tokens of context, those past the window of the original included."""
    return load(path, n_ctx=round(WINDOW * SCALE), past_window=True, n_threads=threads, n_threads_batch=threads)


def measure_perplexity(path: Path, threads: int) -> dict[str, Any]:
    """Perplexity of each bucket of positions."""
    text = fetch.article(fetch.fetch(fetch.BRITANNICA))
    llm = open_model(path, threads)
    tokens = llm.tokenize(text.encode(), add_bos=True, special=False)[: LENGTH + 1]
    losses = token_nll(llm, tokens, progress=_progress)
    return {
        "buckets": [round(perplexity(losses, at, at + BUCKET), 3) for at in range(0, LENGTH, BUCKET)],
        "within_window": round(perplexity(losses, 0, WINDOW), 3),
        "past_window": round(perplexity(losses, WINDOW), 3),
    }


def measure_needles(path: Path, threads: int, n_tokens: int) -> dict[str, Any]:
    """How many of ten numbers the model says, and the mean loss of the true ones, in nats a token."""
    llm = open_model(path, threads)
    answers = ask(llm, haystack(llm, n_tokens), progress=_progress)
    return {
        "exact": sum(answer.exact for answer in answers),
        "of": len(answers),
        "loss": round(sum(answer.loss for answer in answers) / len(answers), 4),
        "losses": {str(answer.position): round(answer.loss, 3) for answer in answers},
        "said": answers[0].said,
        "expected": answers[0].expected,
    }


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} tokens", end="", file=sys.stderr, flush=True)


def measure(what: str, threads: int) -> dict[str, Any]:
    """One result, with what it cost and where it ran."""
    kind, name, *length = what.split("/")
    with tempfile.TemporaryDirectory() as folder:
        path = model(name, Path(folder))
        began, load_before = time.perf_counter(), os.getloadavg()[0]
        if kind == "perplexity":
            found = measure_perplexity(path, threads)
        else:
            found = measure_needles(path, threads, int(length[0]))
        library = loaded_library()
    found["threads"] = threads
    found["seconds"] = round(time.perf_counter() - began)
    found["load_of_the_machine"] = [round(load_before, 1), round(os.getloadavg()[0], 1)]
    found["engine"] = f"{library.kind} llama.cpp {library.commit}"
    return found


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def table(found: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    names = [what.split("/")[1] for what in found if what.startswith("perplexity/")]
    lines = ["| positions | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for i in range(LENGTH // BUCKET):
        cells = [f"{found[f'perplexity/{name}']['buckets'][i]:.2f}" for name in names]
        lines.append(f"| {i * BUCKET // 1024}K to {(i + 1) * BUCKET // 1024}K | " + " | ".join(cells) + " |")
    for key, label in (("within_window", "0 to 32K"), ("past_window", f"32K to {LENGTH // 1024}K")):
        cells = [f"**{found[f'perplexity/{name}'][key]:.2f}**" for name in names]
        lines.append(f"| **{label}** | " + " | ".join(cells) + " |")
    lines += ["", "| needles | file | found | mean loss of the true answer |", "|---|---|---|---|"]
    needles = [
        (int(what.split("/")[2]), what.split("/")[1], found[what]) for what in found if what.startswith("needles")
    ]
    for length, name, one in sorted(needles, key=lambda needle: (needle[0], needle[1] != "original")):
        lines.append(f"| {length // 1024}K tokens | {name} | {one['exact']} of {one['of']} | {one['loss']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure what is asked for and has no result yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemma_128k")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(WHATS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="print the results there are, measure nothing")
    args = parser.parse_args()
    for what in () if args.table else args.what or WHATS:
        if what not in results():
            one = measure(what, args.threads)
            RESULTS.write_text(json.dumps({**results(), what: one}, indent=1) + "\n")
            print(what, json.dumps(one), flush=True)
    print(table(results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
