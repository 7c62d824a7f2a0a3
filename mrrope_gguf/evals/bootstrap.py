"""How sure a difference between two runs is: the paired block bootstrap.

Losses of neighbouring tokens go together, so blocks of positions are drawn, not positions; and both runs read the same
tokens, so the difference is taken before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Blocks = Sequence[float] | NDArray[np.floating]


class Interval(NamedTuple):
    """A mean difference and the bounds that hold `level` of the resampled ones."""

    mean: float
    low: float
    high: float


def paired(
    ours: Sequence[Blocks],
    theirs: Sequence[Blocks],
    *,
    level: float = 0.95,
    draws: int = 10000,
    seed: int = 0,
    fixed: bool = False,
) -> Interval:
    """Mean of ours - theirs, with its bootstrap interval. Each text is one row of block means, all alike in length.

    Within every text its blocks are drawn anew, as many as there are; texts are drawn too where there are three or
    more, since what is said of two cannot tell how texts differ. Texts weigh alike.
    Raises ValueError where the rows do not match, or there are none.

    >>> paired([[1.0, 2.0]], [[0.5, 1.5]])
    Interval(mean=0.5, low=0.5, high=0.5)
    """
    import numpy as np

    if not ours or [len(a) for a in ours] != [len(b) for b in theirs] or not all(map(len, ours)):
        raise ValueError("paired needs the same blocks of the same texts from both runs, one block or more of each")
    rng = np.random.default_rng(seed)
    rows = [
        np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64) for a, b in zip(ours, theirs, strict=True)
    ]
    means = np.stack([row[rng.integers(0, len(row), (draws, len(row)))].mean(1) for row in rows])  # (texts, draws)
    if len(rows) > 2 and not fixed:
        drawn = rng.integers(0, len(rows), (len(rows), draws))
        means = np.take_along_axis(means, drawn, axis=0)
    low, high = np.quantile(means.mean(0), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([row.mean() for row in rows])), float(low), float(high))
