"""What processes of a race do at one file, lock or key; apart from the tests, so that many of them start quickly."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

from mrrope_gguf import extend, inspect, revert
from mrrope_gguf.engine import store
from mrrope_gguf.errors import FileTrouble, MrropeError
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.user_key import user_key


def hold(log: str) -> int:
    """What two builds of one engine do: one is at it, the other waits and is told."""
    waited: list[int] = []
    with store.lock("key", waiting=lambda: waited.append(1)), open(log, "a") as file:
        for word in ("begin", "end"):
            file.write(f"{os.getpid()} {word}\n")
            file.flush()
            time.sleep(0.02)
    return len(waited)


def key_of(folder: str) -> str:
    return user_key(Path(folder)).hex()


def append(path: str, me: int, n: int) -> int:
    """n lines of this process, and n that all of them write; every third is longer than any buffer."""
    log = RunLog(Path(path))
    for i in range(n):
        said = f"{me}/{i} " * (20_000 if i % 3 == 0 else 1)
        log.add(f"{me}/{i}", {"task": "t", "way": "none", "length": 1, "score": 1, "said": said})
        log.add(f"all/{i}", {"task": "t", "way": "none", "length": 1, "score": 1})
    return n


def back_and_forth(path: str, times: int) -> int:
    """Extend and revert in place; how often the file was in use by a reader."""
    refused = 0
    for i in range(2 * times):
        while True:
            try:
                revert(path) if i % 2 else extend(path, in_place=True, scale=2)
                break
            except FileTrouble as error:
                if "open or mapped" not in str(error):
                    raise
                refused += 1
    return refused


def look(path: str, seconds: float) -> dict[str, int]:
    """What `inspect` says of the file, again and again: S, or the error."""
    seen, end = Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = inspect(path)
            seen[f"S = {found.stored.table.scale:g}" if found.stored else "S = 1"] += 1
        except MrropeError as error:
            seen[error.what.rpartition(": ")[2]] += 1
        time.sleep(0.001)
    return dict(seen)
