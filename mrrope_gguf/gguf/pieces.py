"""A file described by where its bytes come from: literal bytes, spans of another file, spans with their rows reordered.

Every file this package writes is such a list, so that nothing is read before it is written and a model's tensors never
pass through Python. Two lists compose: (new file from original) after (original from the file on disk) is (new file
from the file on disk), which is how an extended file is extended again without being reverted first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import lcm


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes start..end of the file below."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Rows:
    """Bytes start..end of the file below as rows of `row_bytes`, reordered within groups of len(order) rows.

    Row i of a group is row order[i] of the same group below.
    """

    start: int
    end: int
    row_bytes: int
    order: tuple[int, ...]

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def group_bytes(self) -> int:
        return self.row_bytes * len(self.order)


Piece = bytes | Span | Rows


def total(pieces: Iterable[Piece]) -> int:
    """Bytes that the pieces make."""
    return sum(map(len, pieces))


def reorder(data: bytes | memoryview, row_bytes: int, order: Sequence[int]) -> bytes:
    """Whole groups of rows in their new order; data is (groups, len(order), row_bytes)."""
    view = memoryview(data)
    group = row_bytes * len(order)
    starts = [row * row_bytes for row in order]
    return b"".join(view[base + s : base + s + row_bytes] for base in range(0, len(view), group) for s in starts)


def tidy(pieces: Iterable[Piece]) -> list[Piece]:
    """The same bytes in fewer pieces: neighbours joined, empty ones dropped, rows in their own order made spans.

    >>> tidy([b"a", b"b", Span(3, 5), Span(5, 9), Rows(9, 17, 4, (0, 1))])
    [b'ab', Span(start=3, end=17)]
    """
    out: list[Piece] = []
    literals: list[bytes] = []
    kept: dict[int, tuple[tuple[int, ...], bool]] = {}  # thousands of tensors share an order: each is looked at once

    def moves(order: tuple[int, ...]) -> bool:
        if id(order) not in kept:
            kept[id(order)] = order, order != tuple(range(len(order)))
        return kept[id(order)][1]

    def flush() -> None:
        if literals:
            out.append(b"".join(literals))
            literals.clear()

    for piece in pieces:
        if isinstance(piece, Rows) and not moves(piece.order):
            piece = Span(piece.start, piece.end)
        if not len(piece):
            continue
        if isinstance(piece, bytes):
            literals.append(piece)
            continue
        flush()
        last = out[-1] if out else None
        if isinstance(piece, Span) and isinstance(last, Span) and last.end == piece.start:
            out[-1] = Span(last.start, piece.end)
        else:
            out.append(piece)
    flush()
    return out


class Layout:
    """Pieces that make a whole file, with random access by offset in that file."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = tidy(pieces)
        self.starts: list[int] = []
        at = 0
        for piece in self.pieces:
            self.starts.append(at)
            at += len(piece)
        self.size = at

    def slice(self, start: int, end: int) -> list[Piece]:
        """The pieces of bytes start..end. Rows can be cut between groups only (ValueError elsewhere)."""
        if not 0 <= start <= end <= self.size:
            raise ValueError(f"bytes {start}..{end} of a file of {self.size}")
        out: list[Piece] = []
        i = max(0, bisect_right(self.starts, start) - 1)
        while start < end:
            piece, base = self.pieces[i], self.starts[i]
            stop = min(end, base + len(piece))
            out.append(_cut(piece, start - base, stop - base))
            start, i = stop, i + 1
        return out

    def under(self, pieces: Iterable[Piece]) -> list[Piece]:
        """`pieces`, whose spans are offsets in this file, as pieces of the file below this one."""
        out: list[Piece] = []
        orders = _Orders()
        for piece in pieces:
            if isinstance(piece, bytes):
                out.append(piece)
                continue
            below = self.slice(piece.start, piece.end)
            out += below if isinstance(piece, Span) else [_reordered(piece, below, orders)]
        return tidy(out)


def _cut(piece: Piece, start: int, end: int) -> Piece:
    if isinstance(piece, bytes):
        return piece[start:end]
    if isinstance(piece, Span):
        return Span(piece.start + start, piece.start + end)
    if start % piece.group_bytes or end % piece.group_bytes:
        raise ValueError("a reordered tensor cannot be cut inside a group of rows")
    return Rows(piece.start + start, piece.start + end, piece.row_bytes, piece.order)


class _Orders:
    """One order of rows over another, each pair worked out once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[Rows, Rows, tuple[int, ...]]] = {}

    def over(self, rows: Rows, piece: Rows) -> tuple[int, ...]:
        """`rows`' order where what it reorders is `piece`."""
        key = id(rows.order), id(piece.order)
        if key not in self._made:
            n = lcm(len(rows.order), len(piece.order))
            outer, inner = _repeat(rows.order, n), _repeat(piece.order, n)
            self._made[key] = rows, piece, tuple(inner[i] for i in outer)  # kept, so that no other takes its id
        return self._made[key][2]


def _reordered(rows: Rows, below: list[Piece], orders: _Orders) -> Piece:
    """The one piece that `rows` becomes when the bytes it reorders are `below`."""
    if len(below) != 1:
        raise ValueError("rows to reorder lie in more than one piece")
    piece = below[0]
    if isinstance(piece, bytes):
        return reorder(piece, rows.row_bytes, rows.order)
    if isinstance(piece, Span):
        return Rows(piece.start, piece.end, rows.row_bytes, rows.order)
    if piece.row_bytes != rows.row_bytes:
        raise ValueError(f"rows of {rows.row_bytes} bytes over rows of {piece.row_bytes}")
    if len(piece) % (lcm(len(rows.order), len(piece.order)) * rows.row_bytes):
        raise ValueError("two orders of rows that do not divide the tensor together")
    return Rows(piece.start, piece.end, rows.row_bytes, orders.over(rows, piece))


def _repeat(order: tuple[int, ...], n: int) -> tuple[int, ...]:
    """The same reordering written for groups of n rows, n a multiple of len(order)."""
    return tuple(base + row for base in range(0, n, len(order)) for row in order)
