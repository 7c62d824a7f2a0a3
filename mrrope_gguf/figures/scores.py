"""Scores by distance out of queries and keys, and how steadily they fall: the arithmetic of the attention figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Means = NDArray[np.float64]


class Trend(NamedTuple):
    """How steadily a score falls with distance: 1 and 1 if every step is down, -1 and 0 if every one is up."""

    rho: float  # Spearman's rank correlation of score and nearness
    falling: float  # share of neighbouring bins whose score falls


def pair_dims(pairs: Sequence[int], n_rot: int, rope: str) -> list[int]:
    """The dimensions of a head that these rotary pairs turn: 2i and 2i+1 for "norm", i and i + n_rot/2 otherwise."""
    return [dim for i in pairs for dim in ((2 * i, 2 * i + 1) if rope == "norm" else (i, i + n_rot // 2))]


def mean_scores(queries: Floats, keys: Floats, dims: Sequence[int]) -> Means:
    """Mean q . k over these dimensions at each distance, float64 (n_head, d) for distances 1..d, d = n - queries - 1.

    queries: float32 (m, n_head, head_dim) of the last m of n positions; keys: float32 (n, n_head_kv, head_dim).
    """
    import numpy as np

    m, n_head, _ = queries.shape
    n, n_head_kv, _ = keys.shape
    reach, group = n - m - 1, n_head // n_head_kv
    sums = np.zeros((n_head, reach))
    for kv in range(n_head_kv):
        k = np.ascontiguousarray(keys[:, kv, dims])
        q = np.ascontiguousarray(queries[:, kv * group : (kv + 1) * group, dims])
        for j in range(m):
            at = n - m + j
            sums[kv * group : (kv + 1) * group] += (k[at - reach : at] @ q[j].T)[::-1].T
    return np.asarray(sums / m)


def binned(scores: Means, edges: Sequence[int]) -> Means:
    """Mean of each bin, (n_head, bins); bin b holds distances edges[b] .. edges[b+1] - 1."""
    import numpy as np

    parts = [scores[:, a - 1 : b - 1].mean(1) for a, b in pairwise(edges)]
    return np.stack(parts, axis=1)


def bin_edges(reach: int, bins: int) -> list[int]:
    """Bounds of even bins of the distances 1..reach."""
    return [1 + i * reach // bins for i in range(bins + 1)]


def trend(scores: Sequence[float]) -> Trend:
    """Spearman's rank correlation of score and nearness, and the share of steps that fall; nan for a level score.

    >>> trend([4, 3, 2, 1]), trend([1, 3, 2, 4]).falling
    (Trend(rho=1.0, falling=1.0), 0.3333333333333333)
    """
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    nearness = np.arange(len(values), 0, -1, dtype=np.float64)
    ranks = _ranks(values)
    spread = ranks.std() * nearness.std()
    rho = float(((ranks - ranks.mean()) * (nearness - nearness.mean())).mean() / spread) if spread else float("nan")
    return Trend(round(rho, 9), float((np.diff(values) < 0).mean()))


def _ranks(values: Means) -> Means:
    """Ranks from 1, equal values sharing the mean of theirs."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse.reshape(-1)], dtype=np.float64)
