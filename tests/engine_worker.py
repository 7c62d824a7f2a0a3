"""Python functions called in a process of their own, on a libllama of choice.

A process loads one libllama for good, and a llama.cpp that aborts takes its process along: so the patched library and
the stock one each run behind a worker, and a death in there is a failed call here. tests.patched does the same with a
process for each call; a worker lives on, which saves half a second every time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ParamSpec, TypeVar

from tests.patched import environment

P = ParamSpec("P")
R = TypeVar("R")


class Died(Exception):
    """The process ended while a call ran: llama.cpp aborted or crashed."""


class Worker:
    """One process, started at the first call and again after a death. `lib` is a directory; None is stock."""

    def __init__(self, lib: Path | None) -> None:
        self.lib = lib
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What `function` returns in there; what it raises is raised here. Died if its process does not survive."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_choose, initargs=(self.lib,))
        try:
            return self._pool.submit(function, *args, **kwargs).result(timeout=600)
        except BrokenProcessPool:
            self.close()
            raise Died(f"{function.__name__} on {self.lib or 'stock'}") from None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _choose(lib: Path | None) -> None:
    """llama_cpp reads the variables when it is first imported, which is after this."""
    wanted = environment(lib) | {"GGML_NO_BACKTRACE": "1"}  # which asks a debugger, and may wait for it for ever
    os.environ.clear()
    os.environ.update(wanted)
