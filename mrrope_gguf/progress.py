"""One line on stderr that says how far, how fast and how long still; silent where stderr is not a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from .text import printable

Progress = Callable[[int, int], None]  # (done, total)

_WIDTH, _NARROW = 28, 8  # of the bar; narrower than that it says nothing
_EVERY = 0.1  # seconds between redraws


class Bar:
    """A progress callback, `bar(done, total)`, drawn in place. Use it as a context manager so the line is ended.

    `unit` divides the counts for the rate shown: ("MB", 1e6) for bytes, ("tok", 1) for tokens.
    """

    def __init__(self, label: str, unit: tuple[str, float]) -> None:
        self.label = label
        self.unit, self.size = unit
        self.shown = sys.stderr.isatty()
        self.start = time.monotonic()
        self.drawn = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self.shown or (now - self.drawn < _EVERY and done < total):
            return
        self.drawn = now
        line = self.line(done, total, now - self.start, _columns() - 1)
        print(f"\r{printable(line)}\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self, done: int, total: int, seconds: float, columns: int = 200) -> str:
        """The text of the bar after `seconds`: share, amount, rate, time left; at most `columns` wide.

        >>> Bar("copying", ("MB", 1e6)).line(50_000_000, 200_000_000, 0.5, 60)
        'copying [####          ]  25%  50/200 MB  100 MB/s  2 s left'
        """
        share = done / total if total else 1.0
        rate = done / seconds if seconds > 0 else 0.0
        left = f"{clock((total - done) / rate)} left" if rate and done < total else clock(seconds)
        amount = f"{done / self.size:.0f}/{total / self.size:.0f} {self.unit}"
        speed = f"{rate / self.size:.0f} {self.unit}/s"
        facts = f"{share:4.0%}  {amount}  {speed}  {left}"
        width = min(_WIDTH, columns - len(self.label) - len(facts) - 4)
        if width < _NARROW:
            return f"{self.label} {facts}"[:columns]
        return f"{self.label} [{'#' * round(share * width):<{width}}] {facts}"

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.drawn:
            print(file=sys.stderr)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def clock(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> clock(7.2), clock(75), clock(3700)
    ('7 s', '1:15', '1:01:40')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
