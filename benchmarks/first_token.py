"""Time to the first token: `mrrope chat -p` against plain llama-cli, the same prompt, threads and libllama.

    python -m benchmarks.first_token [FILE.gguf] [--tokens N] [--threads N] [--rounds N] [--cli PROGRAM] [--out FILE]

From the start of a process to the first byte of its answer, loading, tokenising and, of mrrope chat, Python itself
included. SmolLM2-135M Q4_1 as it is, a piece of a novel as system prompt, a question; each round runs both programs,
turn and turn about, after one round that does not count. mrrope chat begins without saved sessions every time.
llama-cli gets --no-warmup, as llama-cpp-python has none either. It fails where greedy answers differ, or where the
median ratio is above 1.05. With the 6144 tokens of the default some 8 minutes on 2 idle cores.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mrrope_gguf import fetch, texts
from mrrope_gguf.engine import binding_version
from mrrope_gguf.engine.programs import server_program
from mrrope_gguf.vocab import Vocab

RESULTS = Path(__file__).parent / "results" / "first_token.json"
AT_MOST = 1.05  # of llama-cli's time
QUESTION, TEXT, NAME = "What is this about?", "doctor-moreau", "book.txt"
ANSWER = 8  # tokens
SIDES = ("llama-cli", "mrrope chat")


def main() -> int:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:  # a disk, where /tmp may be memory
        sides = Sides(args, Path(folder))
        seconds = race(sides, args.rounds)
        start = {name: sides.run(name, document=False)[0] for name in SIDES}
    report = {
        "file": args.model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the end",
        "llama_cli": f"{args.cli.parent.parent.name}/{args.cli.name}",
        "threads": args.threads,
        "document_tokens": args.tokens,
        "rounds": args.rounds,
        **summary(seconds),
        "without_document_seconds": {name: round(found, 3) for name, found in start.items()},
        "all_seconds": {name: [round(one, 3) for one in found] for name, found in seconds.items()},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return int(report["ratio"] > AT_MOST)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_token")
    parser.add_argument("model", nargs="?", type=Path, help="a GGUF file with a chat template (SmolLM2-135M)")
    parser.add_argument("--tokens", type=int, default=6144, help="of the document")
    parser.add_argument("--ctx", type=int, default=8192, help="tokens of context, of both programs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cli", type=Path, help="llama-cli (the one `mrrope build` made)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.model = args.model or fetch.fetch(fetch.SMOLLM2)
    args.cli = (args.cli or server_program(binding_version()).path.with_name("llama-cli")).absolute()
    return args


class Sides:
    """Both programs with the same prompt. `answer`: what they said to it, once one of them has."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self._book = folder / NAME
        self._book.write_text(document(args.model, args.tokens), encoding="utf-8")
        self._head = folder / "system.txt"  # as ChatSession puts a document before the first question
        self._head.write_text(f"# {NAME}\n\n{self._book.read_text(encoding='utf-8').strip()}", encoding="utf-8")
        self.answers: dict[bool, str] = {}

    def run(self, side: str, *, document: bool = True) -> tuple[float, str]:
        """Seconds to the first byte of the answer, and the answer. SystemExit where it is not the other side's."""
        command, before = self._llama_cli(document) if side == SIDES[0] else self._chat(document)
        seconds, said = first_byte(command, before, self._environment())
        if self.answers.setdefault(document, said) != said:
            raise SystemExit(f"{side} says {said!r}, and the other one {self.answers[document]!r}")
        return seconds, said

    def _common(self) -> list[str]:
        n = str(self._args.threads)
        return ["-c", str(self._args.ctx), "-t", n, "-tb", n, "-fa", "on", "-n", str(ANSWER), "--temp", "0"]

    def _llama_cli(self, document: bool) -> tuple[list[str], bytes]:
        quiet = ["-st", "--simple-io", "--no-display-prompt", "--no-show-timings", "--no-warmup", "-fit", "off"]
        system = ["-sysf", str(self._head)] if document else []
        command = [str(self._args.cli), "-m", str(self._args.model), *system, "-p", QUESTION, *quiet, *self._common()]
        return command, f"> {QUESTION}\n".encode()  # it repeats the question before the answer

    def _chat(self, document: bool) -> tuple[list[str], bytes]:
        files = ["-f", str(self._book)] if document else []
        command = [sys.executable, "-m", "mrrope_gguf", "chat", str(self._args.model), *files, "-p", QUESTION]
        return [*command, *self._common()], b""

    def _environment(self) -> dict[str, str]:
        data = tempfile.mkdtemp(dir=self._folder)  # nothing is restored
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        return {**kept, "MRROPE_ENGINE": str(self._args.cli.parent.parent), "MRROPE_DATA": data}


def document(model: Path, n_tokens: int) -> str:
    """The beginning of the text, of `n_tokens` tokens within a few."""
    book = texts.save(TEXT).read_text(encoding="utf-8")
    with Vocab(model) as vocab:
        low, high = 0, len(book)
        while high - low > 16:
            middle = (low + high) // 2
            n = vocab.count(book[:middle].encode(), add_bos=False)
            low, high = (middle, high) if n <= n_tokens else (low, middle)
    return book[:low]


def first_byte(command: Sequence[str], before: bytes, env: dict[str, str]) -> tuple[float, str]:
    """Seconds from the start of a program until its stdout goes on after `before`, and what it says there."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        data, seconds = b"", 0.0
        while piece := os.read(process.stdout.fileno(), 65536):
            data += piece
            if not seconds and answer_in(data, before).strip():
                seconds = time.perf_counter() - began
        told = process.stderr.read().decode(errors="replace")
    if process.returncode or not seconds:
        raise SystemExit(f"{command[0]} ended with {process.returncode} and no answer:\n{told[-2000:]}")
    return seconds, answer_in(data, before).decode(errors="replace").partition("\n\nExiting")[0].strip()


def answer_in(stdout: bytes, before: bytes) -> bytes:
    """What follows `before`, if that is there.

    >>> answer_in(b"> Who?\\nMe.", b"> Who?\\n"), answer_in(b"> Wh", b"> Who?\\n"), answer_in(b"Me.", b"")
    (b'Me.', b'', b'Me.')
    """
    return stdout.partition(before)[2] if before else stdout


def race(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(rounds + 1):
        for name in SIDES if turn % 2 else SIDES[::-1]:
            took, _ = sides.run(name)
            if turn:
                seconds[name].append(took)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median over rounds of ours by llama-cli's: two times measured next to each other."""
    theirs, ours = (seconds[name] for name in SIDES)
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {
        "first_token_seconds": {name: round(statistics.median(found), 3) for name, found in seconds.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


if __name__ == "__main__":
    sys.exit(main())
