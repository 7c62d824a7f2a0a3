"""How far each method's table lets a similar token outscore a random one (the paper's Fig. 5)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..bound import LIMIT, BoundCurve, bound_curve
from ..bound import bound as first_negative
from ..errors import Refused
from ..plots import plot_bound
from ..text import printable
from .common import Row, aligned, model_tables

METHODS = "none,yarn,mrrope-uni,mrrope-pro"
POINTS = 120  # windows of a curve: more of them hide one another


@dataclass(frozen=True)
class Bounds:
    """B(m) of every method as far as the picture shows it, and where it is first negative."""

    model: str
    scale: float
    n_ctx_orig: int
    bounds: dict[str, int | None]  # None: not within LIMIT
    curves: dict[str, BoundCurve]

    def to_json(self) -> dict[str, object]:
        curves = {
            name: {"m": c.m.tolist(), "lowest": _rounded(c.lowest.tolist()), "highest": _rounded(c.highest.tolist())}
            for name, c in self.curves.items()
        }
        facts = {"model": self.model, "scale": self.scale, "n_ctx_orig": self.n_ctx_orig, "limit": LIMIT}
        return {"figure": "bound", **facts, "bounds": self.bounds, "curves": curves}

    def rows(self) -> list[Row]:
        return [
            {"method": name, "m": m, "lowest": low, "highest": high, "bound": "" if end is None else end}
            for (name, c), end in zip(self.curves.items(), self.bounds.values(), strict=True)
            for m, low, high in zip(
                c.m.tolist(), _rounded(c.lowest.tolist()), _rounded(c.highest.tolist()), strict=True
            )
        ]

    def render(self) -> str:
        rows = [[name, f"none to {LIMIT}" if end is None else str(end)] for name, end in self.bounds.items()]
        title = f"{self.model}: first m with B(m) < 0, S = {self.scale:g}, original context {self.n_ctx_orig}"
        return f"{title}\n{aligned([['method', 'bound'], *rows])}"

    def draw(self, path: Path) -> None:
        plot_bound(self.curves, path, self.n_ctx_orig)


def bound(model: str | os.PathLike[str], *, methods: str = METHODS, scale: float = 4.0) -> Bounds:
    """Each method's B(m) and its bound. Raises as `factors` does.

    The curves reach a quarter past the farthest bound, and at least as far as the extended context.
    """
    tables = model_tables(model, methods, scale)
    name = printable(Path(model).name)
    try:
        ends = {method: first_negative(table) for method, table in tables.items()}
    except ValueError as error:  # factors of the model's own can turn faster than the search allows
        raise Refused(f"{name}: its bound cannot be searched", why=str(error), fix="`mrrope figure factors`") from None
    n_ctx_orig = next(iter(tables.values())).n_ctx_orig
    last = min(int(1.25 * max([scale * n_ctx_orig, *(end for end in ends.values() if end)])), 1 << 24)
    curves = {method: bound_curve(table, last, POINTS) for method, table in tables.items()}
    return Bounds(name, float(scale), n_ctx_orig, ends, curves)


def _rounded(values: list[float]) -> list[float]:
    return [round(v, 4) for v in values]
