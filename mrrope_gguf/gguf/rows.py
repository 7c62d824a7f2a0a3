"""Rows of q and k projections that change places: by which permutation, in which tensors, told in a few words.

A rule names tensors by a template and layers by ranges, so that what a file keeps of it does not grow with its layers.
Rules may come from a file of a stranger's: looking one up, or all of them, takes no longer for more of them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from mrrope_gguf.gguf.index import Tensor
from mrrope_gguf.gguf.pieces import Rows

MAX_HEAD = 1 << 16  # rows of a head
MAX_RUNS = 1 << 14  # layers in a row, of all tensors together: a model has 512 layers and four such tensors in each
MAX_ORDERS = 2 * MAX_HEAD  # rows of all kinds of heads together; a model has one kind or two, of some hundred rows
_NUMBER = re.compile("[0-9]+")


@dataclass(frozen=True)
class RowPermutation:
    """How the rows of a q or k projection move when RoPE pairs change their layout, head by head.

    "neox_to_norm": within each head of head_dim rows, new row 2i is old row i and new row 2i+1 is old row i + n_rot/2,
    for i < n_rot/2; rows from n_rot on stay. `order[new] = old`.
    """

    n_head: int
    n_rot: int
    head_dim: int
    kind: str = "neox_to_norm"

    def __post_init__(self) -> None:
        if self.kind != "neox_to_norm":
            raise ValueError(f"no row permutation is called {self.kind!r}")
        sound = self.n_head >= 1 and self.n_rot >= 2 and self.n_rot % 2 == 0 and self.n_rot <= self.head_dim <= MAX_HEAD
        if not sound:
            raise ValueError(f"no such heads: n_head={self.n_head}, n_rot={self.n_rot}, head_dim={self.head_dim}")

    @property
    def order(self) -> tuple[int, ...]:
        return _order(self.n_rot, self.head_dim)

    @property
    def inverse(self) -> tuple[int, ...]:
        return _inverse(self.n_rot, self.head_dim)


@lru_cache(maxsize=16)  # all tensors of a model have the same few
def _order(n_rot: int, head_dim: int) -> tuple[int, ...]:
    half = n_rot // 2
    pairs = tuple(old for i in range(half) for old in (i, i + half))
    return pairs + tuple(range(n_rot, head_dim))


@lru_cache(maxsize=16)
def _inverse(n_rot: int, head_dim: int) -> tuple[int, ...]:
    order = _order(n_rot, head_dim)
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def split_name(name: str) -> tuple[str, int]:
    """A tensor's name with its first number taken out, and the number (-1 where there is none).

    >>> split_name("blk.12.attn_q.weight"), split_name("output.weight")
    (('blk.{}.attn_q.weight', 12), ('output.weight', -1))
    """
    found = _NUMBER.search(name)
    if found is None or "{}" in name or str(int(found[0])) != found[0]:
        return name, -1
    return f"{name[: found.start()]}{{}}{name[found.end() :]}", int(found[0])


def row_rules(permutations: Mapping[str, RowPermutation]) -> list[list[Any]]:
    """The permutations of all tensors, with layers as ranges: [template, ranges, n_head, n_rot, head_dim] each."""
    grouped: dict[tuple[str, RowPermutation], list[int]] = {}
    for name, permutation in permutations.items():
        template, number = split_name(name)
        grouped.setdefault((template, permutation), []).append(number)
    return [[template, _ranges(numbers), p.n_head, p.n_rot, p.head_dim] for (template, p), numbers in grouped.items()]


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Sorted numbers as [first, last] runs."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return runs


class RowRules:
    """Rules as `row_rules` gives them, by name of tensor. False where there are none.

    Raises ValueError or TypeError for what `row_rules` never gives: other types, two rules for one tensor, more
    than MAX_RUNS ranges, or more kinds of heads than MAX_ORDERS rows.
    """

    def __init__(self, rules: Iterable[Any]) -> None:
        self._runs: dict[str, list[tuple[int, int, RowPermutation]]] = {}
        self._orders: dict[tuple[int, int, bool], tuple[int, ...]] = {}
        kinds: set[tuple[int, int]] = set()
        left = MAX_RUNS
        for template, ranges, n_head, n_rot, head_dim in rules:
            # a dict of other keys can be made slow: numbers whose hashes are all the same
            if type(template) is not str or {type(n_head), type(n_rot), type(head_dim)} != {int}:
                raise ValueError("a rule for rows is no name and numbers")
            left -= max(len(ranges), 1)
            if left < 0:
                raise ValueError(f"it has more than {MAX_RUNS} rules for rows")
            permutation = RowPermutation(n_head, n_rot, head_dim)
            kinds.add((n_rot, head_dim))
            self._runs.setdefault(template, []).extend((first, last, permutation) for first, last in ranges)
        if sum(head_dim for _, head_dim in kinds) > MAX_ORDERS:
            raise ValueError(f"its rules for rows name {len(kinds)} kinds of heads, of more than {MAX_ORDERS} rows")
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[0])
            if any(a[1] >= b[0] for a, b in pairwise(runs)):
                raise ValueError("two of its rules for rows are for one tensor")

    def __bool__(self) -> bool:
        return bool(self._runs)

    def of(self, name: str) -> RowPermutation | None:
        """The permutation of the tensor called `name`."""
        template, number = split_name(name)
        runs = self._runs.get(template, [])
        at = bisect_right(runs, number, key=lambda run: run[0]) - 1
        return runs[at][2] if at >= 0 and number <= runs[at][1] else None

    def piece(self, tensor: Tensor, data_start: int, *, undo: bool) -> Rows | None:
        """The tensor's data with its rows moved, or moved back; None where no rule is for it.

        Raises ValueError as row_piece does.
        """
        permutation = self.of(tensor.name)
        if permutation is None:
            return None
        key = (permutation.n_rot, permutation.head_dim, undo)
        if key not in self._orders:
            self._orders[key] = permutation.inverse if undo else permutation.order
        return row_piece(tensor, data_start, permutation, self._orders[key])


def row_piece(tensor: Tensor, data_start: int, permutation: RowPermutation, order: tuple[int, ...]) -> Rows:
    """The tensor's data with the rows of each head in this order. ValueError where it does not have such heads."""
    n_rows = tensor.dims[1] if len(tensor.dims) > 1 else tensor.dims[0] if tensor.dims else 1
    expected = permutation.n_head * permutation.head_dim
    if n_rows != expected or any(d != 1 for d in tensor.dims[2:]) or tensor.nbytes % n_rows:
        raise ValueError(f"tensor {tensor.name!r} of shape {tensor.dims} does not hold {expected} rows")
    start = data_start + tensor.offset
    return Rows(start, start + tensor.nbytes, tensor.nbytes // n_rows, order)
