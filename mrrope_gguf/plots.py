"""Pictures: factors by pair, perplexity and its differences by position, scores by length and depth, the bound curve.

matplotlib is imported when first asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import expm1
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bound import BoundCurve
from .errors import FileTrouble, MrropeError
from .tables import RopeTable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = Sequence[float] | NDArray[np.floating[Any]] | NDArray[np.integer[Any]]

# Told apart by colour-blind readers too, and dark enough for thin lines on white.
_COLOURS = ("#3b5bdb", "#e8590c", "#0c8599", "#ae3ec9", "#5c940d", "#c2255c", "#f08c00", "#495057", "#7f4f24")
_INK, _GREY, _RULE = "#212529", "#868e96", "#e9ecef"
_MANY = 5  # names in a legend; more would hide what is drawn, and stand beside the picture
_CLIP = 2.5  # a perplexity line is cut where it leaves this many times the best series' worst value


def plot_factors(tables: Sequence[RopeTable], path: str | Path) -> None:
    """Factors against pair index, one step line per table, the band of each distinct (d_l, d_h) shaded.

    Writes a PNG, or whatever the suffix of `path` names.
    Raises ValueError for no tables, MrropeError if matplotlib is missing, FileTrouble if the file cannot be written.
    """
    if not tables:
        raise ValueError("plot_factors needs at least one table, got none")
    figure, axes = _canvas("rotary pair i (fast to slow)", "factor: theta_i is divided by")
    n_pairs = max(len(t.factor_values) for t in tables)
    top = max(max(t.factor_values) for t in tables)
    for band in dict.fromkeys((t.d_l, t.d_h) for t in tables):
        _shade_band(axes, *band, n_pairs)
    for table, colour in zip(tables, _colours(len(tables)), strict=True):
        label = f"{table.method}, S = {table.scale:g}"
        pairs = range(len(table.factor_values))
        axes.plot(pairs, table.factor_values, color=colour, label=label, marker="o", markersize=3.2, linewidth=1.8)
    axes.set_xlim(-0.5, n_pairs - 0.5)
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(0.93, min(min(t.factor_values) for t in tables) * 0.93), max(top, 1.5) * 1.12)
    _plain_numbers(axes.yaxis)
    first = tables[0]
    same = all((t.n_ctx_orig, t.freq_base) == (first.n_ctx_orig, first.freq_base) for t in tables)
    model = f": n_rot {first.n_rot}, base {first.freq_base:g}, {first.n_ctx_orig} tokens" if same else ""
    _finish(figure, axes, f"How much slower each rotary pair turns{model}", path, legend="lower right")


def _shade_band(axes: Any, d_l: int, d_h: int, n_pairs: int) -> None:
    right = min(d_h, n_pairs - 0.5)
    if right <= d_l:
        return
    axes.axvspan(d_l, right, color="#748ffc", alpha=0.10, linewidth=0)
    for edge, name, side in ((d_l, "d_l", "right"), (d_h, "d_h", "left")):
        if edge < n_pairs:
            axes.axvline(edge, color="#748ffc", linewidth=0.8, linestyle=(0, (4, 3)))
            pad = -4 if side == "right" else 4
            _note(axes, f"{name} = {edge}", (edge, 1), (pad, -6), _GREY, side)


def plot_perplexity(
    series: Mapping[str, tuple[Values, Values]],
    n_ctx_orig: int | None,
    path: str | Path,
    *,
    log2: bool | None = None,
    title: str = "Perplexity by position",
    among: Sequence[str] = (),
    top: float | None = None,
) -> None:
    """Perplexity against position: {name: (positions (k,), perplexities (k,))}, a line at the original context.

    log2: the axis of positions; None takes it where they span 16 times or more. A line that leaves the others far
    behind is cut at the top, or at `top`, and its last value written there. among: all names of a report, so that each
    keeps its colour from picture to picture. Raises as plot_factors does; ValueError for no or empty series.
    """
    if not series or any(len(x) == 0 or len(x) != len(y) for x, y in series.values()):
        raise ValueError("plot_perplexity needs series of as many positions as perplexities, one or more of each")
    figure, axes = _canvas("position (tokens)", "perplexity (lower is better)")
    first = min(float(min(x)) for x, _ in series.values())
    last = max(float(max(x)) for x, _ in series.values())
    top = top or _CLIP * min(float(max(y)) for _, y in series.values())
    marked = 0
    for i, ((name, (x, y)), colour) in enumerate(zip(series.items(), _colours_of(series, among), strict=True)):
        width = 3.4 - 1.6 * i / len(series)  # a line that lies on another one shows around it
        dash, size = _dash(name, among), 1.2 + width
        axes.plot(x, y, dash, color=colour, label=name, marker="o", markersize=size, linewidth=width, zorder=3)
        marked += _mark_cut(axes, x, y, top, colour, marked)
    highest = max(float(max(y)) for _, y in series.values())
    lowest = min(float(min(y)) for _, y in series.values())
    room = 0.12 * (min(highest, top) - lowest) or 0.1 * lowest
    axes.set_ylim(lowest - room, top if highest > top else highest + 2 * room)
    if log2 or (log2 is None and first > 0 and last >= 16 * first and last >= 8 * (n_ctx_orig or 0)):
        axes.set_xscale("log", base=2)
    if n_ctx_orig is not None:
        _rule_in_legend(axes, n_ctx_orig)
    _token_ticks(axes.xaxis)
    _finish(figure, axes, title, path)


def _mark_cut(axes: Any, x: Values, y: Values, top: float, colour: str, line: int) -> bool:
    """Where a line leaves the picture, say how far it goes, `line` lines of text below the edge; whether it does."""
    above = [i for i, value in enumerate(y) if float(value) > top]
    if above:
        after, before = above[0], max(above[0] - 1, 0)
        share = (top - float(y[before])) / ((float(y[after]) - float(y[before])) or 1.0)
        crossing = float(x[before]) + max(share, 0.0) * (float(x[after]) - float(x[before]))
        _note(axes, f"up to {float(max(y)):,.0f}", (crossing, 1), (6, -4 - 12 * line), colour, "left")
    return bool(above)


def plot_needles(series: Mapping[str, tuple[Values, Values]], n_ctx_orig: int, path: str | Path) -> None:
    """Loss of the hidden answers against the text's length: {name: (lengths (k,), mean NLL (k,))}.

    Raises as plot_perplexity does.
    """
    if not series or any(len(x) == 0 or len(x) != len(y) for x, y in series.values()):
        raise ValueError("plot_needles needs series of as many lengths as losses, one or more of each")
    figure, axes = _canvas("length of the text (tokens)", "loss of the right answer, nats a token (lower is better)")
    for (name, (x, y)), colour in zip(series.items(), _colours(len(series)), strict=True):
        axes.plot(x, y, color=colour, label=name, marker="o", markersize=4.5, linewidth=2, zorder=3)
    axes.set_ylim(bottom=0)
    _rule(axes, n_ctx_orig, f"original context, {n_ctx_orig}")
    _token_ticks(axes.xaxis)
    _finish(figure, axes, "Ten numbers hidden in one text", path)


def plot_scores(
    series: Mapping[str, tuple[Values, Values]],
    n_ctx_orig: int | None,
    path: str | Path,
    *,
    title: str,
    among: Sequence[str] = (),
) -> None:
    """Mean score from 0 to 1 against the text's length: {name: (lengths (k,), scores (k,))}, lengths on a log2 axis.

    among: as for plot_perplexity. Raises as plot_perplexity does.
    """
    if not series or any(len(x) == 0 or len(x) != len(y) for x, y in series.values()):
        raise ValueError("plot_scores needs series of as many lengths as scores, one or more of each")
    figure, axes = _canvas("length of the text (tokens)", "mean score (higher is better)")
    for i, ((name, (x, y)), colour) in enumerate(zip(series.items(), _colours_of(series, among), strict=True)):
        size = 8 - 4 * i / len(series)  # a line that lies on another one shows around it
        dash, width = _dash(name, among), size / 2.4
        axes.plot(x, y, dash, color=colour, label=name, marker="o", markersize=size, linewidth=width, zorder=3)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xscale("log", base=2)
    if n_ctx_orig is not None:
        _rule_in_legend(axes, n_ctx_orig)
    _token_ticks(axes.xaxis)
    _finish(figure, axes, title, path)


def plot_maps(
    maps: Mapping[str, Mapping[tuple[int, float], float]], n_ctx_orig: int | None, path: str | Path, *, title: str
) -> None:
    """A heat map for each way, all on one grid: {name: {(length, depth %): mean score from 0 to 1}}.

    Lengths go from left to right, depths from 0 at the top; cells that were not measured stay empty.
    Raises as plot_factors does; ValueError for no maps or an empty one.
    """
    if not maps or not all(maps.values()):
        raise ValueError("plot_maps needs maps of one cell or more")
    from math import ceil, nan

    figure, _ = _canvas("", "")
    figure.clear()
    lengths = sorted({length for cells in maps.values() for length, _ in cells})
    depths = sorted({depth for cells in maps.values() for _, depth in cells})
    across = min(3, len(maps))
    down = ceil(len(maps) / across)
    figure.set_size_inches(max(4.6, 3.3 * across), 0.7 + 2.9 * down)
    inside = sum(length <= n_ctx_orig for length in lengths) if n_ctx_orig is not None else None
    shade, every = None, figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, (name, cells) in zip(every.flat, maps.items(), strict=False):
        rows = [[cells.get((length, depth), nan) for length in lengths] for depth in depths]
        shade = axes.pcolormesh(rows, cmap=_heat(), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
        if inside is not None:
            axes.axvline(inside, color=_INK, linewidth=1.6, linestyle=(0, (4, 2)))
        axes.set_title(name, loc="left", color=_INK, fontsize=10.5)
        axes.set_xticks([i + 0.5 for i in range(len(lengths))], [_tokens(n) for n in lengths], rotation=45)
        axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:g}" for depth in depths])
        axes.tick_params(colors=_COLOURS[7], labelsize=9, length=0)
        axes.set_ylim(len(depths), 0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in every.flat[len(maps) :]:
        axes.set_visible(False)
    figure.supxlabel("length of the text (tokens)", color=_INK, fontsize=10.5)
    figure.supylabel("depth of the needle (%)", color=_INK, fontsize=10.5)
    bar = figure.colorbar(shade, ax=every, shrink=0.9, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.solids.set(rasterized=False, edgecolor="face")  # an SVG without a bitmap in it
    bar.ax.tick_params(colors=_COLOURS[7], labelsize=9, length=0)
    bar.set_label("mean score", color=_INK)
    line = "" if n_ctx_orig is None else f" (dashed: original context, {n_ctx_orig})"
    figure.suptitle(f"{title}{line}", x=0.01, ha="left", color=_INK, fontsize=12, fontweight="bold")
    _save(figure, path)


def _heat() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("score", ["#F0496E", "#EBB839", "#0CD79F"])


def plot_tradeoff(points: Mapping[str, tuple[float, float]], n_tokens: int, path: str | Path) -> None:
    """Ways to extend a model, each by what it costs and what it keeps: {name: (perplexity, mean needle NLL)}.

    n_tokens: the length of the text that the needles are in. Raises as plot_perplexity does.
    """
    if not points:
        raise ValueError("plot_tradeoff needs one point or more, got none")
    figure, axes = _canvas(
        "perplexity past the original context", f"needles in {_tokens(n_tokens)} tokens, nats a token"
    )
    colours = _colours(len(points))
    for i, ((name, (x, y)), colour) in enumerate(zip(points.items(), colours, strict=True)):
        marker = "os^Dv"[colours[:i].count(colour) % 5]  # colours come again after a while
        axes.plot([x], [y], color=colour, label=name, marker=marker, markersize=8, linewidth=0, zorder=3)
    axes.margins(0.15)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.08 * len(points) * (high - low))  # room for the legend above all points
    _finish(figure, axes, "Lower left is better", path)


def plot_intervals(
    series: Mapping[str, Mapping[int, tuple[float, float, float]]],
    n_ctx_orig: int | None,
    path: str | Path,
    *,
    label: str = "perplexity, elastic against the other (%)",
    title: str = "What elastic gains, with 95 % intervals",
    gap: float | None = None,
    among: Sequence[str] = (),
) -> None:
    """Differences of mean loss by position, each with an interval: {other: {position: (mean, low, high)}}, in nats.

    Shown as per cent of perplexity; label says of which two, below 0 the first of them is better.
    gap: positions between points that stand side by side. among: as for plot_perplexity. Raises as that does.
    """
    if not series or not all(series.values()):
        raise ValueError("plot_intervals needs series of one point or more")
    figure, axes = _canvas("position (tokens)", label)
    axes.axhline(0, color=_INK, linewidth=0.9)
    gap = gap or 180 * max(x for points in series.values() for x in points) / 32768  # not one upon another
    for i, ((name, points), colour) in enumerate(zip(series.items(), _colours_of(series, among), strict=True)):
        x = [at + (i - (len(series) - 1) / 2) * gap for at in points]
        mean, low, high = ([100 * expm1(p[k]) for p in points.values()] for k in range(3))
        ends = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        axes.errorbar(x, mean, ends, color=colour, label=name, fmt="o", markersize=5, capsize=3, linewidth=1.6)
    if n_ctx_orig is not None:
        _rule_in_legend(axes, n_ctx_orig)
    _token_ticks(axes.xaxis)
    _finish(figure, axes, title, path)


def plot_bound(curves: Mapping[str, BoundCurve], path: str | Path, n_ctx_orig: int | None = None) -> None:
    """B(m) against distance, each curve as the band between its lowest and highest value, its bound marked.

    Raises as plot_factors does; ValueError for no curves.
    """
    if not curves:
        raise ValueError("plot_bound needs at least one curve, got none")
    figure, axes = _canvas("distance m (tokens)", "B(m) = sum of cos(m theta_i / f_i)")
    axes.axhline(0, color=_INK, linewidth=0.9)
    for (name, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        end = curve.bound
        label = f"{name}: no bound to {curve.m[-1]}" if end is None else f"{name}: first negative at {end}"
        axes.fill_between(curve.m, curve.lowest, curve.highest, color=colour, alpha=0.13, linewidth=0)
        axes.plot(curve.m, curve.lowest, color=colour, linewidth=1.4, label=label)
        if end is not None:
            axes.plot([end], [0], color=colour, marker="o", markersize=7, markeredgecolor="white", zorder=5)
    axes.set_xscale("log", base=2)
    if n_ctx_orig is not None:
        _rule(axes, n_ctx_orig, f"original context, {n_ctx_orig}")
    _token_ticks(axes.xaxis)
    _finish(figure, axes, "How far a similar token outscores a random one", path, legend="lower left")


def _canvas(x_label: str, y_label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MrropeError(
            "plots need matplotlib, which is not installed", why=str(error), fix="pip install 'mrrope-gguf[plot]'"
        ) from None
    figure = Figure(figsize=(8.4, 4.8), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=_INK, fontsize=11, labelpad=7)
    axes.set_ylabel(y_label, color=_INK, fontsize=11, labelpad=7)
    axes.grid(color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#495057", labelsize=10, length=0, pad=5, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#ced4da")
    return figure, axes


def _colours(n: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(n)]


def _colours_of(names: Iterable[str], among: Sequence[str]) -> list[str]:
    """Each name's colour by its place in `among`, or by its own place where that does not have it."""
    return [_colours(len(among) + i + 1)[among.index(name) if name in among else i] for i, name in enumerate(names)]


def _dash(name: str, among: Sequence[str]) -> str:
    """Dashed where the colours begin again."""
    return "--" if name in among and among.index(name) >= len(_COLOURS) else "-"


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _token_ticks(axis: Any) -> None:
    """Positions as 512, 8K, 1.5M, at powers of two or multiples of 1024."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter

    low, high = axis.get_view_interval()
    if axis.get_scale() == "linear" or high < 4 * low:  # less than two octaves may hold one power of two, or none
        step = 2 ** max((int(high - low) // 10).bit_length(), 3)
        axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
    axis.set_minor_formatter(NullFormatter())


def _tokens(value: float) -> str:
    """
    >>> _tokens(512), _tokens(8192), _tokens(1.5 * 2**20)
    ('512', '8K', '1.5M')
    """
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:g}"


def _rule(axes: Any, x: float, text: str) -> None:
    axes.axvline(x, color=_GREY, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    _note(axes, text, (x, 0), (5, 6), _GREY, "left")


def _rule_in_legend(axes: Any, n_ctx_orig: int) -> None:
    """The original context where lines run along the edges of the picture: its name stands in the legend."""
    line = {"color": _GREY, "linewidth": 1.1, "linestyle": (0, (4, 3)), "zorder": 1}
    axes.axvline(n_ctx_orig, **line, label=f"original context, {n_ctx_orig}")


def _note(axes: Any, text: str, at: tuple[float, float], shift: tuple[int, int], colour: str, side: str) -> None:
    """Small text beside (x in data, y as a fraction of the axes), `shift` points away and to that side of it."""
    axes.annotate(
        text, at, shift, xycoords=("data", "axes fraction"), textcoords="offset points", color=colour, fontsize=9,
        ha=side, va="top" if shift[1] < 0 else "bottom",
    )  # fmt: skip


def _finish(figure: Any, axes: Any, title: str, path: str | Path, legend: str = "best") -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=12.5, fontweight="bold", pad=12)
    look = {"frameon": True, "framealpha": 0.9, "edgecolor": "none", "fontsize": 10, "labelcolor": _INK}
    if legend == "best" and len(axes.get_legend_handles_labels()[0]) > _MANY:
        figure.set_size_inches(10, 4.8)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, **look)
    else:
        axes.legend(loc=legend, **look)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    try:
        if not Path(path).suffix:  # matplotlib would write to another name
            raise ValueError("it has no suffix that names a picture format")
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that names no picture format
        fix = "choose another place for it, with a name that ends in .png, .svg or .pdf"
        raise FileTrouble(f"{Path(path).name or path}: the plot cannot be written", why=str(error), fix=fix) from None
