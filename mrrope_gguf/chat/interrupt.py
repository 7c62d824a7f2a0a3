"""Ctrl-C as a wish that is looked at between two chunks, instead of an exception in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """`with interrupt:` turns Ctrl-C into `interrupt.wanted`, which ChatSession takes as `stop`.

    Outside the main thread Python gets no signals, and it does nothing.
    """

    def __init__(self) -> None:
        self._wanted = False
        self._before: Any = None

    def wanted(self) -> bool:
        return self._wanted

    def __enter__(self) -> Interrupt:
        self._wanted = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self._wanted = True
