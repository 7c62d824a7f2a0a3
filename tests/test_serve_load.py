"""Fifty clients at once on `mrrope serve`: every stream whole, every answer right, and no memory lost.

The tiny retriever (tests/data, 256 tokens, extended to 1024) is asked for numbers in texts within its window and past
it, so an answer can be judged wherever the scale stands.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.evals.grid import needle_grid
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load
from tests.served import serving
from tests.server import ask

pytestmark = [
    pytest.mark.engine,
    pytest.mark.hard,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

MODEL = Path(__file__).parent / "data" / "retriever-256.gguf"
WINDOW, SCALE, SLOTS, CLIENTS = 256, 4, 8, 50
SECONDS = float(os.environ.get("MRROPE_LOAD_SECONDS", "600"))
TURN = 30.0  # seconds that all conversations stay in the window, then as many of short and long ones together
ANSWER = 7  # tokens of a number
DEPTHS = [i / 10 for i in range(11)]


@dataclass(frozen=True)
class Question:
    """Token ids of a text with its question, and the number that answers it."""

    prompt: tuple[int, ...]
    value: str

    @property
    def short(self) -> bool:
        return len(self.prompt) + ANSWER <= WINDOW


@dataclass
class Tally:
    """What fifty threads saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    seen: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    under_way: int = 0  # long streams asked for and not ended, running or queued
    begun: int = 0  # long streams ever asked for

    @contextmanager
    def kind(self, short: bool) -> Iterator[Callable[[], str]]:
        """While a stream lasts; asked at its end what it was: short only if no long one was under way beside it."""
        with self.lock:
            self.under_way, self.begun = self.under_way + (not short), self.begun + (not short)
            alone, begun = self.under_way == 0, self.begun
        try:
            yield (
                lambda: "long" if not short else "short" if alone and self.begun == begun else "short beside long ones"
            )
        finally:
            with self.lock:
                self.under_way -= not short

    def add(self, what: str) -> None:
        with self.lock:
            self.seen[what] += 1

    def trouble(self, what: str) -> None:
        with self.lock:
            self.troubles.append(what)


def stream(address: str, prompt: tuple[int, ...]) -> tuple[list[int], bool]:
    """Greedy tokens of a streamed answer, and whether its end was announced."""
    server = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    try:
        body = {"prompt": prompt, "n_predict": ANSWER, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        server.request(
            "POST", "/completion", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
        )
        answer = server.getresponse()
        assert answer.status == 200, answer.read()
        tokens: list[int] = []
        ended = False
        for line in answer:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                tokens += event.get("tokens", [])
                ended = ended or bool(event.get("stop"))
        return tokens, ended
    finally:
        server.close()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    llm = load(MODEL, n_ctx=WINDOW * SCALE, past_window=True)
    cells = [
        cell
        for seed in range(6)
        for cell in needle_grid(llm, [64, 128, 250, 512, 1000], DEPTHS, generate=ANSWER, seed=seed)
    ]
    llm.close()
    return [Question(tuple(cell.prompt(ANSWER).tokens), cell.value) for cell in cells]


@pytest.fixture(scope="module")
def words() -> Iterator[Any]:
    llm = load(MODEL, n_ctx=WINDOW)
    yield lambda tokens: llm.detokenize(list(tokens)).decode(errors="replace")
    llm.close()


def server_pid(parent: int) -> int:
    """The llama-server that `mrrope serve` started, or its child did."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if "llama-server" in Path(f"/proc/{child}/comm").read_text():
            return int(child)
        if found := server_pid(int(child)):
            return found
    return 0


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_a_short_stream_is_plain_only_without_long_ones() -> None:
    tally = Tally()
    with tally.kind(short=True) as one:
        assert one() == "short"
        with tally.kind(short=False) as long, tally.kind(short=True) as second:
            assert (one(), second(), long()) == ("short beside long ones", "short beside long ones", "long")
        assert one() == "short beside long ones"  # it has ended, but was there
    with tally.kind(short=True) as after:
        assert after() == "short"


def test_fifty_clients(programs: Path, questions: list[Question], words: Any, tmp_path: Path) -> None:
    path = extend(MODEL, tmp_path / "long.gguf", scale=SCALE).path
    with serving(
        programs, path, "-np", str(SLOTS), "-c", str(SLOTS * SCALE * WINDOW), "-t", "2", "--cache-ram", "16"
    ) as served:
        short = [q for q in questions if q.short]
        alone = {q: stream(served.address, q.prompt)[0] for q in short}
        assert [slot["rope_scale"] for slot in ask(served.address, "/slots")] == [1.0] * SLOTS
        tally, over, mixed = Tally(), threading.Event(), threading.Event()
        order = count()

        def client() -> None:
            while not over.is_set():
                asked = questions if mixed.is_set() else short
                question = asked[next(order) * 37 % len(asked)]
                try:
                    with tally.kind(question.short) as kind_of:
                        tokens, ended = stream(served.address, question.prompt)
                        kind = kind_of()
                except (OSError, AssertionError, ValueError, http.client.HTTPException) as error:
                    tally.trouble(f"{type(error).__name__}: {error}")
                    continue
                if not ended or len(tokens) != ANSWER:
                    tally.trouble(f"a stream of {len(tokens)} tokens, end {ended}")
                tally.add(kind)
                tally.add(f"{kind}, right") if question.value in words_of(tokens) else None
                tally.add(f"{kind}, as alone") if question.short and tokens == alone[question] else None

        talking = threading.Lock()

        def words_of(tokens: list[int]) -> str:
            with talking:
                return str(words(tokens))

        threads = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
        pid = server_pid(served.process.pid)
        sizes, scales, began = [], set(), time.monotonic()
        for thread in threads:
            thread.start()
        while (passed := time.monotonic() - began) < SECONDS:
            (mixed.set if passed % (2 * TURN) >= TURN else mixed.clear)()
            time.sleep(0.5)
            sizes.append(resident(pid))
            scales |= {slot["rope_scale"] for slot in ask(served.address, "/slots")}
        over.set()
        for thread in threads:
            thread.join(timeout=120)
        quarter = len(sizes) // 4
        before, after = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
        print(f"\n{dict(tally.seen)}; S met: {sorted(scales)}")
        print(f"RSS {before / 2**20:.1f} -> {after / 2**20:.1f} MiB, highest {max(sizes) / 2**20:.1f}")
        assert tally.troubles == []
        assert not any(thread.is_alive() for thread in threads)
        assert {1.0, float(SCALE)} <= scales
        if SECONDS >= 8 * TURN:  # else its second quarter has no long stream, or caches still fill
            assert after < 1.02 * before + 2**20
        assert tally.seen["short, as alone"] == tally.seen["short"] > CLIENTS
        assert tally.seen["short beside long ones"] > 0
        assert tally.seen["long, right"] >= 0.95 * tally.seen["long"] > 0
        assert served.process.poll() is None
