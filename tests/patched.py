"""Runs a function in a process of its own, on the libllama of a given folder: a process loads only one.

    logits = patched.run(forward, model, tokens, lib=patched_lib)     # the patched engine
    logits = patched.run(forward, model, tokens, lib=None)            # llama-cpp-python's own

The function stands at the top level of a test module; arguments and result are anything that pickles.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent
T = TypeVar("T")


class Failed(AssertionError):
    """The process ended without a result; `code` is its exit status, negative for a signal, and `err` its stderr."""

    def __init__(self, name: str, code: int, err: str) -> None:
        super().__init__(f"{name} exited with {code}:\n{err[-4000:]}")
        self.code = code
        self.err = err


def run(
    function: Callable[..., T], *args: Any, lib: Path | None, env: dict[str, str] | None = None,
    timeout: float = 900, **kwargs: Any,
) -> T:  # fmt: skip
    """function(*args, **kwargs) in a new process whose llama_cpp loads the libllama in `lib`, or stock for None.

    `env` adds environment variables. Raises Failed, with all the process said, where it does not return.
    """
    return run_said(function, *args, lib=lib, env=env, timeout=timeout, **kwargs)[0]


def run_said(
    function: Callable[..., T], *args: Any, lib: Path | None, env: dict[str, str] | None = None,
    timeout: float = 900, **kwargs: Any,
) -> tuple[T, str]:  # fmt: skip
    """The same, with what the process wrote to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given", Path(folder) / "found"
        given.write_bytes(pickle.dumps((args, kwargs)))
        done = subprocess.run(
            [sys.executable, "-m", "tests.patched", function.__module__, function.__name__, str(given), str(found)],
            env=environment(lib, env), cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=timeout,
            check=False,
        )  # fmt: skip
        if done.returncode or not found.exists():
            raise Failed(function.__name__, done.returncode, done.stdout + done.stderr)
        result: T = pickle.loads(found.read_bytes())
        return result, done.stderr


def environment(lib: Path | None, extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process on the libllama in `lib`, or on stock, whatever is installed."""
    env = {name: value for name, value in os.environ.items() if name not in ("LLAMA_CPP_LIB_PATH", "MRROPE_ENGINE")}
    # an engine in the user's cache must not stand in for stock
    chosen = {"LLAMA_CPP_LIB_PATH": str(lib)} if lib else {"MRROPE_ENGINE": "stock"}
    return {**env, **chosen, **(extra or {})}


def _main(module: str, name: str, given: str, found: str) -> None:
    args, kwargs = pickle.loads(Path(given).read_bytes())
    result = getattr(importlib.import_module(module), name)(*args, **kwargs)
    Path(found).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
