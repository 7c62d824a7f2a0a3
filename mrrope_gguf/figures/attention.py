"""Attention score of the middle pairs against distance (the paper's Fig. 6), from the q and k of a real decode.

Every method runs the text under its own table, and llama.cpp's eval callback hands over the queries and keys right
after the graph has rotated them: what attention multiplies, temperature included, from hidden states that the same
table has shaped (float32, before the cache rounds k). The score of a pair i is its part of q . k, over sqrt(head_dim).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineTrouble, Refused
from ..fetch import Say
from ..progress import Progress
from . import style
from .common import Row, aligned, figure_ways, model_facts, way_table
from .scores import Trend, bin_edges, binned, mean_scores, pair_dims, trend
from .words import Words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..evals.host import Host

    Floats = NDArray[np.float32]

METHODS = "none,yarn,mrrope-uni,mrrope-pro"
BINS = 40  # of distance
QUERIES = 1024
LAYERS = 4


@dataclass(frozen=True)
class Curve:
    """Mean score of one query head in each bin of distance, under one method's table."""

    method: str
    layer: int
    head: int
    scores: tuple[float, ...]

    @property
    def trend(self) -> Trend:
        return trend(self.scores)


@dataclass(frozen=True)
class Attention:
    """All curves, and what they are of. distances: the middle of each bin, in tokens."""

    model: str
    text: str
    scale: float
    n_ctx_orig: int
    n_ctx: int
    queries: int
    d_l: int
    d_h: int
    distances: tuple[float, ...]
    curves: tuple[Curve, ...]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(c.method for c in self.curves))

    @property
    def layers(self) -> list[int]:
        return list(dict.fromkeys(c.layer for c in self.curves))

    def of(self, method: str, layer: int | None = None) -> list[Curve]:
        return [c for c in self.curves if c.method == method and layer in (None, c.layer)]

    def mean(self, method: str, layer: int | None = None) -> Trend:
        """The mean trend of a method's heads."""
        trends = [c.trend for c in self.of(method, layer)]
        return Trend(*(sum(part) / len(trends) for part in zip(*trends, strict=True)))

    def to_json(self) -> dict[str, object]:
        names = ("model", "text", "scale", "n_ctx_orig", "n_ctx", "queries", "d_l", "d_h", "distances")
        curves = [
            {"method": c.method, "layer": c.layer, "head": c.head, **_trend(c), "scores": list(c.scores)}
            for c in self.curves
        ]
        return {"figure": "attention", **{name: getattr(self, name) for name in names}, "curves": curves}

    def rows(self) -> list[Row]:
        return [
            {"method": c.method, "layer": c.layer, "head": c.head, "distance": distance, "score": score}
            for c in self.curves
            for distance, score in zip(self.distances, c.scores, strict=True)
        ]

    def render(self) -> str:
        """A row for each head: Spearman's rho and the share of falling steps under every method."""
        heads = [(c.layer, c.head) for c in self.of(self.methods[0])]
        found = {(c.method, c.layer, c.head): c.trend for c in self.curves}
        rows = [[f"{il}.{head}", *(_shown(found[m, il, head]) for m in self.methods)] for il, head in heads]
        means = [[f"layer {il}", *(_shown(self.mean(m, il)) for m in self.methods)] for il in self.layers]
        every = ["all", *(_shown(self.mean(m)) for m in self.methods)]
        title = (
            f"{self.model}: q . k of pairs {self.d_l} to {self.d_h}, S = {self.scale:g}, {self.n_ctx} tokens of "
            f"{self.text}, mean over the last {self.queries} queries\n"
            f"rho: Spearman's correlation of score and nearness; then the share of steps that fall ({BINS} bins)"
        )
        return f"{title}\n{aligned([['layer.head', *self.methods], *rows, *means, every])}"

    def draw(self, path: Path) -> None:
        _draw(self, path)


def _trend(curve: Curve) -> dict[str, float | None]:
    """rho is None, and not the NaN that JSON does not have, for a score that is level."""
    rho, falling = curve.trend
    return {"rho": rho if isfinite(rho) else None, "falling": falling}


def _shown(t: Trend) -> str:
    return f"{t.rho:+.3f} {t.falling:4.0%}"


def attention(
    model: str | os.PathLike[str], *, methods: str = METHODS, scale: float = 4.0, words: Words,
    length: int | None = None, queries: int = QUERIES, layers: Sequence[int] | None = None,
    n_threads: int | None = None, progress: Progress | None = None, say: Say | None = None,
) -> Attention:  # fmt: skip
    """Run the text once under each table and measure the middle pairs' score at every distance.

    length: tokens read, by default a quarter past the window. queries: how many of the last positions are averaged;
    each meets every distance from 1 to length - queries - 1, so all distances weigh alike and the first token, on which
    heads park their attention, is left out. layers: which, by default four evenly spread among those with a global
    RoPE. Kept in memory: the keys of these layers and the last queries.

    Raises Refused for a model without RoPE, layers or queries that are not there or keys that are changed after their
    rotation, EngineTrouble where the graph does not name its queries and keys, MrropeError for too short a text.
    """
    from ..evals.host import Host
    from ..evals.ways import reach

    facts, ways = model_facts(model), figure_ways(methods, scale)
    n_ctx_orig = reach(facts)
    n = length or n_ctx_orig + n_ctx_orig // 4
    with Host(model, n_ctx=n, flash_attn=False, n_threads=n_threads, say=say) as host:
        host.check(ways)
        _check(host, n, queries)
        chosen = _layers(host, layers)
        table = way_table(facts, host.name, figure_ways("yarn", 2.0)[0])
        last = min(table.d_h, facts.n_rot // 2 - 1)
        pairs = range(table.d_l, last + 1)
        if not pairs:
            raise Refused(
                f"{host.name}: no pairs lie in the middle",
                why=f"each of its {facts.n_rot // 2} pairs turns more than 32 times within {n_ctx_orig} tokens",
                fix="none needed: no method here changes a pair of this model",
            )
        dims = pair_dims(pairs, facts.n_rot, facts.arch.rope)
        curves: list[Curve] = []
        for i, way in enumerate(ways):
            caught = Caught(chosen, n, queries)

            def tell(done: int, total: int, before: int = i * n) -> None:
                if progress:
                    progress(before + done, len(ways) * n)

            run(host, way, words, caught, tell)
            curves += _curves(way.name, caught, dims, facts.head_dim)
        edges = bin_edges(n - queries - 1, BINS)
        middles = tuple((a + b - 1) / 2 for a, b in pairwise(edges))
        return Attention(
            host.name, words.name, float(scale), n_ctx_orig, n, queries, table.d_l, last, middles, tuple(curves)
        )


class Caught:
    """Rotated queries and keys of some layers: all keys, and the queries of the last `queries` of n positions."""

    def __init__(self, layers: Sequence[int], n: int, queries: int) -> None:
        self.layers, self.n, self.first = set(layers), n, n - queries
        self.at = dict.fromkeys(((which, il) for which in "QK" for il in layers), 0)
        self._parts: dict[tuple[str, int], list[Floats]] = {place: [] for place in self.at}

    def wanted(self, name: str, op: str) -> bool:
        return op == "ROPE" and _place(name) in self.at

    def take(self, name: str, value: Floats) -> None:
        """Keep a chunk, (tokens, heads, head_dim), that follows the one before it."""
        place = _place(name)
        start = self.at[place]
        self.at[place] = start + len(value)
        if place[0] == "Q":
            value = value[max(self.first - start, 0) :].copy()  # not a view that holds on to the whole chunk
        if len(value):
            self._parts[place].append(value)

    def layer(self, il: int) -> tuple[Floats, Floats]:
        """(queries (queries, n_head, head_dim), keys (n, n_head_kv, head_dim)) of one layer.

        Raises EngineTrouble where the graph gave none of that name, or not one for each token.
        """
        import numpy as np

        for which in "QK":
            if self.at[which, il] != self.n:
                raise EngineTrouble(
                    f"layer {il}: the graph names no rotated queries and keys",
                    why=f"{which}cur-{il} was rotated for {self.at[which, il]} of {self.n} tokens",
                    fix="take a model of another architecture",
                )
        return np.concatenate(self._parts["Q", il]), np.concatenate(self._parts["K", il])


def _place(name: str) -> tuple[str, int]:
    """("Q", 3) for Qcur-3."""
    match = re.fullmatch(r"([QK])cur-(\d+)", name)
    return (match[1], int(match[2])) if match else ("", -1)


def run(host: Host, way: Any, words: Words, caught: Caught, progress: Progress | None = None) -> None:
    """Read caught.n tokens of a text under one way's table, catching as it goes."""
    from .. import engine
    from ..engine.nodes import catch_nodes
    from ..evals.decode import Decoder
    from ..evals.ways import parse

    plain = parse("none")[0]
    llm = host.switch(plain if host_sets_tables(host) else way)
    tokens = words.tokens(llm, caught.n)
    with catch_nodes(llm, caught.wanted, caught.take) as check:

        def tell(done: int, total: int) -> None:
            check()
            if progress:
                progress(done, total)

        if host_sets_tables(host):
            engine.set_table(llm, way.table(host.facts, host.name))
        with Decoder(llm) as decoder:
            for _ in decoder.logits(tokens, every=False, progress=tell):
                pass
    host.close()  # its context is gone with the catch


def host_sets_tables(host: Host) -> bool:
    """Whether the host's library takes tables in a running context, and this architecture does."""
    from .. import engine

    return engine.loaded_library().has_rope_table and host.facts.arch.hook


def _check(host: Host, n: int, queries: int) -> None:
    arch = host.facts.arch
    if arch.norm_after_rope:
        raise Refused(
            f"{host.name}: the score of single pairs is not defined",
            why=f"'{arch.name}' normalises queries and keys after it has rotated them",
            fix="take a model of another architecture",
        )
    if not 1 <= queries <= n - 2 * BINS - 1:
        raise Refused(
            f"{queries} queries of {n} tokens",
            why=f"each needs {2 * BINS} tokens before the first of them, two for each of {BINS} bins of distance",
            fix=f"--queries from 1 to {n - 2 * BINS - 1}, or a larger --ctx-size",
        )


def _layers(host: Host, layers: Sequence[int] | None) -> list[int]:
    every = list(host.facts.layers.extended)
    if layers is None:
        count = min(LAYERS, len(every))
        return [every[round(i * (len(every) - 1) / max(count - 1, 1))] for i in range(count)]
    if wrong := [il for il in layers if il not in every]:
        raise Refused(
            f"{host.name}: no global RoPE in layer {', '.join(map(str, wrong))}",
            why=f"the layers that see everything and rotate are {', '.join(map(str, every))}",
            fix="--layers with some of these",
        )
    return list(dict.fromkeys(layers))


def _curves(method: str, caught: Caught, dims: Sequence[int], head_dim: int) -> list[Curve]:
    curves = []
    for il in sorted(caught.layers):
        queries, keys = caught.layer(il)
        means = binned(mean_scores(queries, keys, dims), bin_edges(len(keys) - len(queries) - 1, BINS)) / head_dim**0.5
        curves += [Curve(method, il, head, tuple(round(float(s), 6) for s in row)) for head, row in enumerate(means)]
    return curves


def _draw(found: Attention, path: Path) -> None:
    import numpy as np

    n = len(found.layers)
    title = (
        f"{found.model}, S = {found.scale:g}: score of the middle pairs, {found.d_l} to {found.d_h}, by distance "
        f"(dashed: original context, {found.n_ctx_orig})"
    )
    figure, axes = style.grid(2, n, (max(3.1 * n, 6.2), 6.4), title, height_ratios=(3, 2))
    shades = style.colours(found.methods)
    for column, il in enumerate(found.layers):
        top, below = axes[0][column], axes[1][column]
        for method in found.methods:
            mean = np.mean([c.scores for c in found.of(method, il)], axis=0)
            top.plot(found.distances, mean, color=shades[method], label=method, linewidth=1.6)
        top.axvline(found.n_ctx_orig, color=style.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        style.token_ticks(top.xaxis)
        style.name(
            top, f"layer {il}, mean of its heads", "distance (tokens)", "" if column else "q · k / sqrt(head_dim)"
        )
        _strip(below, found, il, shades)
        below.set_ylabel("" if column else "rho of each head", color=style.INK, fontsize=10)
    style.key(axes[0][0])
    style.save(figure, path)


def _strip(axes: Any, found: Attention, il: int, shades: Mapping[str, str]) -> None:
    """A dot for each head's rho, a bar at their mean, one column a method."""
    for place, method in enumerate(found.methods):
        rhos = [c.trend.rho for c in found.of(method, il)]
        spread = [place + 0.5 * ((i + 0.5) / len(rhos) - 0.5) for i in range(len(rhos))]
        axes.plot(spread, rhos, color=shades[method], marker="o", markersize=4, linewidth=0, alpha=0.8)
        mean = found.mean(method, il).rho
        axes.plot([place - 0.3, place + 0.3], [mean, mean], color=shades[method], linewidth=2.2)
    axes.axhline(0, color=style.INK, linewidth=0.8)
    axes.set_xlim(-0.5, len(found.methods) - 0.5)
    axes.set_ylim(-1.08, 1.08)
    axes.set_xticks(range(len(found.methods)), [m.removeprefix("mrrope-") for m in found.methods], fontsize=9)
