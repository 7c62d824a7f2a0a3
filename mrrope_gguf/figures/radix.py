"""RoPE as digits of a number (the paper's Fig. 2): the radix of every digit, and how a position is written with them.

Digit i counts in units of place[i] = 1/theta_i tokens, pair i's distance for one radian; its radix is place[i+1] /
place[i], freq_base^(2/n_rot) in the model itself and lambda_i times that under a table. A position is written from the
top: each digit takes as many whole units as fit in what the digits above it have left. Radices are not whole numbers,
so what is below one unit of digit 0 is left as a rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from pathlib import Path
from typing import Any

from ..errors import Refused
from ..tables import RopeTable
from ..text import printable
from . import style
from .common import Row, aligned, model_tables

METHODS = "none,yarn,mrrope-uni,mrrope-pro,yarn-turns"
MAX_POSITION = 2**31 - 1


@dataclass(frozen=True)
class Written:
    """One position as digits (n_rot/2,), digit 0 the fastest, under one method."""

    method: str
    position: int
    digits: tuple[int, ...]
    rest: float


@dataclass(frozen=True)
class Radix:
    """Places and radices (n_rot/2,) of every method, and the positions that are written with them."""

    model: str
    scale: float
    n_ctx_orig: int
    d_l: int
    d_h: int
    places: dict[str, tuple[float, ...]]
    written: tuple[Written, ...]

    @property
    def radices(self) -> dict[str, tuple[float, ...]]:
        """Of each digit but the last, which no other follows, (n_rot/2 - 1,)."""
        return {name: _ratios(places) for name, places in self.places.items()}

    def to_json(self) -> dict[str, object]:
        facts = {"model": self.model, "scale": self.scale, "n_ctx_orig": self.n_ctx_orig}
        methods = {
            name: {"places": list(self.places[name]), "radices": list(radices)}
            for name, radices in self.radices.items()
        }
        written = [
            {"method": w.method, "position": w.position, "digits": list(w.digits), "rest": w.rest} for w in self.written
        ]
        return {
            "figure": "radix", **facts, "d_l": self.d_l, "d_h": self.d_h, "methods": methods, "positions": written
        }  # fmt: skip

    def rows(self) -> list[Row]:
        radices = self.radices
        return [
            {
                "method": w.method, "position": w.position, "digit": i, "value": digit,
                "radix": radices[w.method][i] if i < len(radices[w.method]) else "", "place": self.places[w.method][i],
            }
            for w in self.written
            for i, digit in enumerate(w.digits)
        ]  # fmt: skip

    def render(self) -> str:
        """The radices, then the positions: the slowest digit first, as numbers are written."""
        names = list(self.places)
        radices = self.radices
        n = len(radices[names[0]])
        table: list[list[object]] = [["digit", *names]]
        table += [[i, *(f"{radices[m][i]:.4f}" for m in names)] for i in range(n)]
        lines = [
            [w.method, w.position, " ".join(map(str, reversed(w.digits))), f"+ {w.rest:.3f}"] for w in self.written
        ]
        title = f"{self.model}: radix of each digit, S = {self.scale:g}, band {self.d_l} to {self.d_h}"
        return f"{title}\n{aligned(table)}\npositions, slowest digit first\n{aligned(lines)}"

    def draw(self, path: Path) -> None:
        _draw(self, path)


def radix(model: str | os.PathLike[str], *, methods: str = METHODS, scale: float = 4.0, at: int | None = None) -> Radix:
    """The model's positions as digits: the last one it was trained on, and `at` under every method.

    at: by default the last position of the extended context. Raises Refused for a position that is none, and as
    `factors` does.
    """
    tables = model_tables(model, methods, scale)
    first = next(iter(tables.values()))
    at = int(first.n_ctx_orig * scale) - 1 if at is None else at
    if not 0 <= at <= MAX_POSITION:
        raise Refused(
            f"{at} is no position", why=f"llama.cpp counts them from 0 to {MAX_POSITION}", fix="--at with one of these"
        )
    places = {name: tuple(1 / theta for theta in table.theta) for name, table in tables.items()}
    last = min(first.n_ctx_orig - 1, at)
    wanted = [("none", last)] * ("none" in tables and last != at) + [(name, at) for name in tables]
    written = tuple(Written(name, m, *digits(m, places[name])) for name, m in wanted)
    band = _widest(list(tables.values()))
    return Radix(printable(Path(model).name), float(scale), first.n_ctx_orig, *band, places, written)


def digits(position: int, places: Sequence[float]) -> tuple[tuple[int, ...], float]:
    """(digits, rest) with position = sum of digits[i] * places[i] + rest, 0 <= rest < places[0].

    >>> digits(1234, [1.0, 10.0, 100.0])
    ((4, 3, 12), 0.0)
    """
    rest, found = float(position), []
    for place in reversed(places):
        digit = floor(rest / place)
        found.append(digit)
        rest = max(rest - digit * place, 0.0)
    return tuple(reversed(found)), rest


def _ratios(places: Sequence[float]) -> tuple[float, ...]:
    return tuple(b / a for a, b in pairwise(places))


def _widest(tables: Sequence[RopeTable]) -> tuple[int, int]:
    return min(t.d_l for t in tables), max(t.d_h for t in tables)


def _draw(found: Radix, path: Path) -> None:
    n = len(next(iter(found.places.values())))
    rows = len(found.written)
    title = f"{found.model}: a position is a number, S = {found.scale:g}"
    figure, axes = style.grid(
        2, 1, (max(8.4, 0.27 * n + 2.2), 3.6 + 0.34 * rows), title, sharex=True, height_ratios=(2.6, 0.3 + 0.3 * rows)
    )
    top, below = axes[0][0], axes[1][0]
    shades = style.colours(list(found.places))
    for i, (name, radices) in enumerate(found.radices.items()):
        size = 3.2 if i else 4.6
        top.plot(range(n - 1), radices, color=shades[name], label=name, marker="o", markersize=size, linewidth=1.8)
    right = min(found.d_h, n - 0.5)
    if right > found.d_l:
        top.axvspan(found.d_l, right, color="#748ffc", alpha=0.10, linewidth=0)
        style.note(top, f"d_l = {found.d_l}", (found.d_l, 1), (-4, -6), style.GREY, "right")
        if found.d_h < n:
            style.note(top, f"d_h = {found.d_h}", (found.d_h, 1), (4, -6), style.GREY, "left")
    style.name(top, "radix of each digit", y="radix")
    style.key(top, "upper left")
    _numbers(below, found, n)
    style.save(figure, path)


def _numbers(axes: Any, found: Radix, n: int) -> None:
    """A row of digits for each written position; those above the trained context's leading digit are marked."""
    trained = next((w for w in found.written if w.position < found.n_ctx_orig), None)
    most = max((i for i, d in enumerate(trained.digits) if d), default=-1) if trained else n
    highest = max(max(w.digits) for w in found.written)
    for row, w in enumerate(found.written):
        for i, digit in enumerate(w.digits):
            unseen = digit > 0 and i > most
            shade = "#ffe3e3" if unseen else (0.231, 0.357, 0.859, 0.06 + 0.5 * digit / max(highest, 1))
            axes.add_patch(_cell(i, row, shade))
            axes.text(
                i, row, str(digit), ha="center", va="center", fontsize=8.5, color="#c2255c" if unseen else style.INK,
                fontweight="bold" if unseen else "normal",
            )  # fmt: skip
    axes.set_ylim(len(found.written) - 0.5, -0.5)
    axes.set_xlim(-0.6, n - 0.4)
    axes.set_yticks(range(len(found.written)), [f"{w.method}, {w.position}" for w in found.written])
    axes.grid(visible=False)
    marked = "; red: digits that no trained position uses" if trained else ""
    style.name(axes, f"positions in these digits{marked}", "digit = rotary pair i (fast to slow)")


def _cell(column: int, row: int, shade: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, facecolor=shade, linewidth=0)
