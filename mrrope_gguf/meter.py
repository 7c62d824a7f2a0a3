"""How long work will take: seconds a token, more for each position before it, learned from chunks that were timed.

Reading a token costs its share of the weights, and attention over everything before it: seconds = a + b * position.
Tokens read one at a time, as an answer is written, each cost all of the weights: they have an a of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """`n` tokens from position `first` on. single: read one at a time, and not many at once."""

    first: int
    n: int
    single: bool = False


class Meter:
    """Fits a and b to timed chunks by least squares, neither below 0.

    >>> meter = Meter()
    >>> meter.add(Span(0, 100), 1.0)
    >>> meter.add(Span(1000, 100), 2.0)
    >>> round(meter.seconds([Span(0, 100), Span(2000, 100)]), 1)
    4.0
    """

    def __init__(self) -> None:
        # of chunks, and of single tokens: middle position, tokens, seconds
        self._timed: dict[bool, list[tuple[float, int, float]]] = {False: [], True: []}

    def add(self, span: Span, seconds: float) -> None:
        """Reading these took that long."""
        self._timed[span.single].append((span.first + span.n / 2, span.n, seconds))

    @property
    def rate(self) -> float:
        """Tokens a second at the beginning of a context; 0 before anything was timed."""
        a, _ = self._fit()
        return 1 / a if a else 0.0

    def seconds(self, spans: Iterable[Span]) -> float:
        """What reading these takes; 0 before anything was timed."""
        a, b = self._fit()
        one = self._single(a, b)
        return sum(n * ((one if single else a) + b * (first + n / 2)) for first, n, single in spans)

    def _single(self, a: float, b: float) -> float:
        """Seconds for a token read alone at position 0: what is left of the timed ones without attention."""
        timed = self._timed[True]
        n = sum(n for _, n, _ in timed)
        return max(sum(seconds - n * b * at for at, n, seconds in timed) / n, a) if n else a

    def _fit(self) -> tuple[float, float]:
        timed = self._timed[False]
        if not timed:
            return 0.0, 0.0
        weight = float(sum(n for _, n, _ in timed))
        x = sum(n * at for at, n, _ in timed) / weight
        y = sum(seconds for _, _, seconds in timed) / weight
        spread = sum(n * (at - x) ** 2 for at, n, _ in timed)
        slope = sum(n * (at - x) * (seconds / n - y) for at, n, seconds in timed) / spread if spread else 0.0
        slope = min(max(slope, 0.0), y / x if x else 0.0)  # neither number may fall below 0
        return y - slope * x, slope


def size(spans: Iterable[Span]) -> int:
    """Tokens read.

    >>> size([Span(0, 100), Span(100, 50)])
    150
    """
    return sum(span.n for span in spans)


def duration(text: str) -> float:
    """Seconds, as people write a time: 90s, 30m, 2h, 1h30m; a bare number is minutes.

    Raises ValueError for anything else, and for no time at all.

    >>> duration("30m"), duration("1h30m"), duration("90s"), duration("2")
    (1800.0, 5400.0, 90.0, 120.0)
    """
    import re

    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m(?:in)?)?(?:([\d.]+)s)?", text.strip().lower())
    if re.fullmatch(r"[\d.]+", text.strip()):
        seconds = 60 * float(text)
    elif found and any(found.groups()):
        hours, minutes, rest = (float(part or 0) for part in found.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    else:
        raise ValueError(f"{text!r} is no time (try 30m, 2h or 90s)")
    if not seconds > 0:
        raise ValueError(f"{text!r} leaves no time")
    return seconds
