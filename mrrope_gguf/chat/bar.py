"""The line that shows how far a prompt is read: tokens a second, and the time that is left as it was learned so far."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from ..meter import Meter, Span
from ..progress import clock

_AFTER = 0.4  # seconds of silence before it shows itself
_EVERY = 0.2
_WIDTH, _NARROW = 28, 8
_TURNING = "|/-\\"


class ReadingBar:
    """A progress callback for ChatSession, drawn on a terminal while `with bar:` is under way.

    position(): tokens in memory, for the time of a token grows with what comes before it. A thread keeps the clock
    running between chunks. `meter` keeps what was learned, from one prompt to the next. stopping(): Ctrl-C was pressed.
    """

    def __init__(
        self, position: Callable[[], int], note: Callable[[], str] = lambda: "", out: TextIO | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.meter = Meter()
        self._position, self._note, self._stopping = position, note, stopping
        self._out = out or sys.stderr
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._done = self._total = 0
        self._began = self._since = 0.0
        self._left = 0.0
        self._ticks = 0
        self._drawn = False

    def __enter__(self) -> ReadingBar:
        self._done = self._total = self._ticks = 0
        self._began = self._since = time.monotonic()
        self._left, self._drawn = 0.0, False
        self._stop.clear()
        if self._out.isatty():
            self._thread = threading.Thread(target=self._tick, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away; more than once does no harm."""
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        now, at = time.monotonic(), self._position()
        n = done - self._done
        # the first chunk's time holds a restored state's and the tokeniser's; it counts only where nothing else does
        if n > 0 and (self._done or not self.meter.rate):
            self.meter.add(Span(at - n, n), now - self._since)
        with self._lock:
            self._done, self._total, self._since = done, total, now
            self._left = self.meter.seconds([Span(at, total - done)])

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        with self._lock:
            self._write(("\r\x1b[K" if self._drawn else "") + line + "\n")
            self._drawn = False

    def line(self, columns: int) -> str:
        """The bar as it is now, at most `columns` wide."""
        now = time.monotonic()
        turning = _TURNING[self._ticks % len(_TURNING)]
        if self._stopping():
            return f"{turning} stopping when this chunk is read"[:columns]
        if not self._total:
            return f"{turning} reading  {clock(now - self._began)}"[:columns]
        share = self._done / self._total
        rate = self._done / (self._since - self._began) if self._since > self._began else 0.0
        left = max(self._left - (now - self._since), 0.0)
        facts = f"{share:4.0%}  {self._done}/{self._total} tokens  {rate:.0f}/s  {clock(left)} left"
        if note := self._note():
            facts += f"  {note}"
        width = min(_WIDTH, columns - len(facts) - 14)
        if width < _NARROW:
            return f"{turning} {facts}"[:columns]
        return f"{turning} reading [{'#' * round(share * width):<{width}}] {facts}"[:columns]

    def _tick(self) -> None:
        while not self._stop.wait(_EVERY):
            if time.monotonic() - self._began < _AFTER:
                continue
            self._ticks += 1
            with self._lock:
                self._write(f"\r{self.line(_columns(self._out) - 1)}\x1b[K")
                self._drawn = True

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that has gone stops nothing
            self._out.write(text)
            self._out.flush()


def _columns(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except OSError:
        return 80
