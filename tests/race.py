"""Processes that begin at the same moment: each loads what it needs, says that it is ready, and waits for all."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patched import ROOT


@dataclass(frozen=True)
class Ended:
    """How one of the processes ended."""

    code: int
    out: str
    err: str


def verb(*words: str | Path) -> list[str]:
    """A job: `mrrope WORDS`."""
    return ["verb", *map(str, words)]


def call(module: str, function: str, *args: Any) -> list[str]:
    """A job: function(*args) of a module, whose arguments JSON can hold; what it returns is printed."""
    return ["call", module, function, json.dumps(args)]


def race(
    folder: Path, jobs: Sequence[Sequence[str]], env: Mapping[str, str] | None = None, timeout: float = 300
) -> list[Ended]:
    """Run all jobs at once, in processes of their own, and wait for them. `env` adds environment variables."""
    folder.mkdir()
    gate = folder / "gate"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    whole = {**os.environ, "PYTHONPATH": path, "MRROPE_ENGINE": "stock", **(env or {})}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.race", str(folder / f"ready{i}"), str(gate), *job],
            env=whole, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, job in enumerate(jobs)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + timeout
        while len(list(folder.glob("ready*"))) < len(jobs) and time.monotonic() < deadline:
            if all(process.poll() is not None for process in started):
                break
            time.sleep(0.01)
        gate.touch()
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def _main(ready: Path, gate: Path, kind: str, words: Sequence[str]) -> int:
    from mrrope_gguf import cli, verbs  # noqa: F401 - loaded before the gate opens

    function = getattr(importlib.import_module(words[0]), words[1]) if kind == "call" else None
    ready.touch()
    while not gate.exists():
        time.sleep(0.0002)
    if function is None:
        return cli.main(words)
    print(json.dumps(function(*json.loads(words[2]))))
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
