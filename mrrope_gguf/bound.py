"""How far a rope table sees: the first distance at which a similar token scores below a random one.

The score that two alike tokens m apart gain over two random ones goes as B(m) = sum_i cos(m * theta_i / factors[i]).
It starts at n_rot/2 and decays; where it first drops below zero the model cannot tell the two apart any more.
Source: Men et al., "Base of RoPE Bounds Context Length" (arXiv 2405.14591).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tables import RopeTable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LIMIT = 1 << 26  # where `bound` stops looking unless told otherwise: 67 million positions, under a second
_STEP = 1 << 24  # positions per native call, so that Ctrl-C is heard in between


def bound(table: RopeTable | Sequence[float], limit: int = LIMIT) -> int | None:
    """The first whole number m >= 1 with sum_i cos(m * theta_i / factors[i]) < 0, or None if none is <= limit.

    table: a RopeTable (its theta, the model's own rope_freqs included), or the angles per token themselves.
    Exact: every m is decided, in float32 where its error bound allows it, else in double (|error| < 1e-12).
    Raises ValueError for a limit outside 1..2**52, or angles that are none, not finite, or 1024 or more.

    >>> from mrrope_gguf.tables import rope_table
    >>> bound(rope_table("mrrope-pro", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=4))
    5490
    """
    from ._native import bound as scan

    theta = _angles(table)
    _check_limit("limit", limit)
    for first in range(1, limit + 1, _STEP):
        found = scan(theta, first, min(limit, first + _STEP - 1))
        if found is not None:
            return found
    return None


def min_base(n_ctx: int, n_rot: int, digits: int = 3) -> float:
    """The smallest freq_base, of `digits` significant decimal digits, whose plain RoPE has no bound below n_ctx.

    That is, whose first m with sum_i cos(m * theta_i) < 0 is n_ctx or more. Reaching a length is not monotone in
    the base: below a base that reaches lie gaps that do not and narrow windows that do, so bisection would find the
    edge of any one. Instead every base of so many digits is tried, from just above 1 upwards, and the first that
    reaches is returned: exact on that finite set. More digits find narrower windows, at ten times the work each.
    Returns inf if no base below 1e22 reaches (one pair alone never does).
    Raises ValueError for an odd n_rot, n_ctx outside 1..2**31, or digits outside 1..6.
    Source: the table of Men et al. (arXiv 2405.14591), which has two digits and some other windows; see docs/tables.md.

    >>> min_base(4096, 128), min_base(4096, 128, digits=2)
    (28700.0, 29000.0)
    """
    from ._native import min_base as search

    if not (n_rot == int(n_rot) and n_rot >= 2 and n_rot % 2 == 0):
        raise ValueError(f"n_rot must be an even whole number, 2 or more, got {n_rot!r}")
    if not 1 <= n_ctx <= 2**31:
        raise ValueError(f"n_ctx must be from 1 to {2**31}, got {n_ctx!r}")
    if not 1 <= digits <= 6:
        raise ValueError(f"digits must be from 1 to 6, got {digits!r}")
    found = search(n_ctx, n_rot, digits)
    return math.inf if found is None else found


@dataclass(frozen=True)
class BoundCurve:
    """B(m) seen from afar: its lowest and highest value in each of k windows of positions, for plots."""

    m: NDArray[np.int64]  # (k,) first position of each window
    lowest: NDArray[np.float32]  # (k,)
    highest: NDArray[np.float32]  # (k,)
    bound: int | None  # the first negative position, if it lies within the curve


def bound_curve(table: RopeTable | Sequence[float], last: int, points: int = 300) -> BoundCurve:
    """B(m) for m = 1..last, as at most `points` windows that grow with m, so that a log axis shows them evenly.

    Every position is evaluated, in float32: within 0.0005 of the truth at 64 pairs, 0.002 at 128.
    Raises ValueError for last outside 1..2**31 or points < 1.
    """
    import numpy as np

    from ._native import bound_sums

    theta = _angles(table)
    if not (1 <= last <= 2**31 and points >= 1):
        raise ValueError(f"last must be from 1 to {2**31} and points 1 or more, got {last!r} and {points!r}")
    edges = np.unique(np.geomspace(1, last + 1, points + 1).astype(np.int64))
    lowest, highest = [], []
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        sums = bound_sums(theta, first, end - first)
        lowest.append(sums.min())
        highest.append(sums.max())
    return BoundCurve(edges[:-1], np.array(lowest), np.array(highest), bound(theta, last))


def _angles(table: RopeTable | Sequence[float]) -> list[float]:
    theta = table.theta if isinstance(table, RopeTable) else [float(t) for t in table]
    if not theta or not all(0.0 <= t < 1024.0 for t in theta):
        raise ValueError(f"angles per token must be from 0 to 1024, one or more of them, got {theta[:8]!r}")
    return theta


def _check_limit(name: str, limit: int) -> None:
    if not 1 <= limit <= 2**52:
        raise ValueError(f"{name} must be from 1 to {2**52}, got {limit!r}")
