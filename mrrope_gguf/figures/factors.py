"""By how much each method slows each rotary pair (the paper's Fig. 3)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..plots import plot_factors
from ..tables import RopeTable
from ..text import printable
from .common import Row, aligned, model_tables

METHODS = "none,yarn,mrrope-uni,mrrope-pro,yarn-turns,ntk,linear"


@dataclass(frozen=True)
class Factors:
    """Tables of one model and scale."""

    model: str
    tables: tuple[RopeTable, ...]

    def to_json(self) -> dict[str, object]:
        first = self.tables[0]
        facts = {"n_rot": first.n_rot, "freq_base": first.freq_base, "n_ctx_orig": first.n_ctx_orig}
        band = {"d_l": first.d_l, "d_h": first.d_h}
        tables = {
            t.method: {"scale": t.scale, "attn_factor": t.attn_factor, "factors": list(t.factor_values)}
            for t in self.tables
        }
        return {"figure": "factors", "model": self.model, **facts, **band, "methods": tables}

    def rows(self) -> list[Row]:
        return [
            {"pair": i, "theta": theta, **{t.method: t.factor_values[i] for t in self.tables}}
            for i, theta in enumerate(_plain(self.tables[0]))
        ]

    def render(self) -> str:
        t = self.tables[0]
        head = ["pair", *(t.method for t in self.tables)]
        rows = [[i, *(f"{t.factor_values[i]:.4f}" for t in self.tables)] for i in range(t.n_rot // 2)]
        title = f"{self.model}: n_rot {t.n_rot}, base {t.freq_base:g}, {t.n_ctx_orig} tokens, band {t.d_l} to {t.d_h}"
        return f"{title}\n{aligned([head, *rows])}"

    def draw(self, path: Path) -> None:
        plot_factors(self.tables, path)


def factors(model: str | os.PathLike[str], *, methods: str = METHODS, scale: float = 4.0) -> Factors:
    """The factors of every method for this model. Raises Refused for an unknown method or a model without RoPE."""
    return Factors(printable(Path(model).name), tuple(model_tables(model, methods, scale).values()))


def _plain(table: RopeTable) -> list[float]:
    """Radians per token of each pair of the model as it is."""
    return [theta * f for theta, f in zip(table.theta, table.factor_values, strict=True)]
