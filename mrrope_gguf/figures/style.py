"""The look of the project's pictures (plots.py), for figures of several panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..plots import _GREY as GREY
from ..plots import _INK as INK
from ..plots import _canvas, _colours, _note, _plain_numbers, _rule, _save, _token_ticks
from ..plots import _tokens as tokens

__all__ = ["GREY", "INK", "colours", "grid", "note", "plain_numbers", "rule", "save", "token_ticks", "tokens"]

# the colour of each method is the same in every figure that has all of these, or the first of them
_ORDER = ("none", "yarn", "mrrope-uni", "mrrope-pro", "yarn-turns", "ntk", "linear")

note, plain_numbers, rule, save, token_ticks = _note, _plain_numbers, _rule, _save, _token_ticks


def colours(methods: Sequence[str]) -> dict[str, str]:
    """{method: colour}."""
    every = dict(zip(_ORDER, _colours(len(_ORDER)), strict=True))
    return {name: every[name] for name in methods}


def grid(down: int, across: int, size: tuple[float, float], title: str, **kwargs: Any) -> tuple[Any, list[list[Any]]]:
    """(figure, axes) of down x across panels in the house's style, `size` in inches; raises as plots do."""
    figure, _ = _canvas("", "")
    figure.clear()
    figure.set_size_inches(*size)
    axes = figure.subplots(down, across, squeeze=False, **kwargs)
    for each in axes.flat:
        dress(each)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12.5, fontweight="bold")
    return figure, [list(row) for row in axes]


def dress(axes: Any) -> None:
    """Light rules, no frame above and to the right, small grey figures."""
    axes.grid(color="#e9ecef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#495057", labelsize=9, length=0, pad=4, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#ced4da")


def name(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """A panel's title and what its axes are."""
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=10.5)
    axes.set_xlabel(x, color=INK, fontsize=10, labelpad=5)
    axes.set_ylabel(y, color=INK, fontsize=10, labelpad=5)


def key(axes: Any, place: str = "best") -> None:
    axes.legend(loc=place, frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, labelcolor=INK)
