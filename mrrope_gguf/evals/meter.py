"""How long work will take: seconds a token, more for each position before it, learned from chunks that were timed.

Reading a token costs its share of the weights, and attention over everything before it: seconds = a + b * position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[int, int]  # a first position, and the tokens read from there on


class Meter:
    """Fits a and b to timed chunks by least squares, neither below 0.

    >>> meter = Meter()
    >>> meter.add(0, 100, 1.0)
    >>> meter.add(1000, 100, 2.0)
    >>> round(meter.seconds([(0, 100), (2000, 100)]), 1)
    4.0
    """

    def __init__(self) -> None:
        self._timed: list[tuple[float, int, float]] = []  # middle position, tokens, seconds

    def add(self, position: int, n: int, seconds: float) -> None:
        """`n` tokens from `position` on took that long."""
        self._timed.append((position + n / 2, n, seconds))

    @property
    def rate(self) -> float:
        """Tokens a second at the beginning of a context; 0 before anything was timed."""
        a, _ = self._fit()
        return 1 / a if a else 0.0

    def seconds(self, spans: Iterable[Span]) -> float:
        """What reading these takes; 0 before anything was timed."""
        a, b = self._fit()
        return sum(n * (a + b * (first + n / 2)) for first, n in spans)

    def _fit(self) -> tuple[float, float]:
        if not self._timed:
            return 0.0, 0.0
        weight = float(sum(n for _, n, _ in self._timed))
        x = sum(n * at for at, n, _ in self._timed) / weight
        y = sum(seconds for _, _, seconds in self._timed) / weight
        spread = sum(n * (at - x) ** 2 for at, n, _ in self._timed)
        slope = sum(n * (at - x) * (seconds / n - y) for at, n, seconds in self._timed) / spread if spread else 0.0
        slope = min(max(slope, 0.0), y / x if x else 0.0)  # neither number may fall below 0
        return y - slope * x, slope


def size(spans: Sequence[Span]) -> int:
    """Tokens read.

    >>> size([(0, 100), (100, 50)])
    150
    """
    return sum(n for _, n in spans)


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
