"""Ctrl-C as a wish that is looked at between two chunks, instead of an exception in the middle of one."""

from __future__ import annotations

import select
import signal
import socket
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
        self._wakes: tuple[socket.socket, socket.socket] | None = None

    def wanted(self) -> bool:
        """Whether Ctrl-C was pressed; Python learns of it when llama.cpp's current chunk is done."""
        return self._wanted

    def pressed(self) -> bool:
        """The same for another thread, which learns of it at once."""
        try:
            return self._wanted or bool(self._wakes and select.select([self._wakes[0]], [], [], 0)[0])
        except (OSError, ValueError):  # closed meanwhile
            return self._wanted

    def __enter__(self) -> Interrupt:
        self._wanted = False
        if threading.current_thread() is threading.main_thread():
            self._wakes = socket.socketpair()
            for end in self._wakes:
                end.setblocking(False)
            signal.set_wakeup_fd(self._wakes[1].fileno(), warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._wakes is not None:
            signal.signal(signal.SIGINT, self._before)
            signal.set_wakeup_fd(-1)
            for end in self._wakes:
                end.close()
            self._wakes = None

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self._wanted = True
