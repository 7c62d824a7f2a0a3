"""Reopening a document against reading it: seconds to the first token, each in a process of its own.

    python -m benchmarks.sessions [--tokens N] [--threads N] [--rounds N]

SmolLM2-135M Q4_1 extended to 32768 tokens, f16 cache, a novel and a question, on whatever engine `load` takes; with the
24576 tokens of the default some 8 minutes on 2 idle cores. Fails where reopening takes 2 seconds or more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mrrope_gguf import ChatSession, fetch, texts
from mrrope_gguf.engine import loaded_library
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load

RESULTS = Path(__file__).parent / "results" / "sessions.json"
AT_MOST = 2.0  # seconds
QUESTION, TEXT = "What is this about?", "doctor-moreau"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sessions")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5, help="of reopening")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Path(args.child[0]), Path(args.child[1]), args.tokens, args.threads)))
        return 0
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:  # a disk, where /tmp may be memory
        model = extend(fetch.fetch(fetch.SMOLLM2), Path(folder) / "m.gguf", scale=4).path
        runs = [child(args, model, folder) for _ in range(1 + args.rounds)]
        size = sum(path.stat().st_size for path in Path(folder).glob("s/states/*/*"))
    report = summary(runs[0], runs[1:], size, args.threads)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return int(report["reopened_seconds"] >= AT_MOST)


def child(args: argparse.Namespace, model: Path, folder: str) -> dict[str, Any]:
    """One conversation in a new process."""
    words = [f"--tokens={args.tokens}", f"--threads={args.threads}", "--child", str(model), f"{folder}/s"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sessions", *words], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(model: Path, store: Path, n_tokens: int, threads: int) -> dict[str, Any]:
    """Ask one question about the first n_tokens of the text; seconds from the loaded model to the first token."""
    llm: Any = load(model, n_threads=threads, n_threads_batch=threads)
    book = texts.save(TEXT).read_text(encoding="utf-8")
    document = llm.detokenize(llm.tokenize(book.encode(), add_bos=False)[: n_tokens - 64]).decode("utf-8", "ignore")
    began = time.perf_counter()
    chat = ChatSession(llm, documents=[document], store=store, temp=0, n_predict=4)
    answer = chat.say(QUESTION)
    next(answer)
    first = time.perf_counter() - began
    list(answer)
    chat.save()
    return {
        **vars(chat.reading), "first_token_seconds": first,
        "scale": chat.scale, "engine": str(loaded_library().commit), "answer": chat.messages[-1]["content"],
    }  # fmt: skip


def summary(read: dict[str, Any], reopened: list[dict[str, Any]], size: int, threads: int) -> dict[str, Any]:
    """Medians of reopening beside the one reading. Every answer must be the first one's."""
    assert {run["answer"] for run in reopened} == {read["answer"]}
    assert all(run["restored"] >= run["total"] - 1 for run in reopened)
    seconds = statistics.median(run["first_token_seconds"] for run in reopened)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the end",
        "engine": read["engine"],
        "threads": threads,
        "tokens": read["total"],
        "scale": round(read["scale"], 3),
        "state_bytes": size,
        "read_seconds": round(read["first_token_seconds"], 2),
        "reopened_seconds": round(seconds, 3),
        "restore_seconds": round(statistics.median(run["restore_seconds"] for run in reopened), 3),
        "restore_MB_per_second": round(size / 1e6 / statistics.median(run["restore_seconds"] for run in reopened)),
        "ratio": round(read["first_token_seconds"] / seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
