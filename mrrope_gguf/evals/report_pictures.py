"""The report's pictures, each as NAME.png and NAME.svg: which there are, and what each is of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from math import exp, expm1, log
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from .. import plots
from ..text import printable
from .report_stats import Column, Summary, Table, Task, span
from .report_words import Picture
from .ways import STATIC

Draw: TypeAlias = Callable[[Path], None]
SUFFIXES = (".png", ".svg")
MOST_ROWS = 21  # of a map
BREAKDOWN = 1.6  # times a bucket's best perplexity: what is worse may leave the picture
USUAL = {"none": "", "truncate": "", **dict.fromkeys(STATIC, "A"), "elastic": "C"}  # ways, and their modes


def draw(summary: Summary, directory: Path) -> list[Picture]:
    """Write every picture that the results allow; returns them in the order of the report.

    Raises MrropeError if matplotlib is missing, FileTrouble if a file cannot be written.
    """
    from ..errors import MrropeError

    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise MrropeError(
            "plots need matplotlib, which is not installed", why=str(error), fix="pip install 'mrrope-gguf[plot]'"
        ) from None
    drawn = []
    # Names are not formulas; words stay words in SVG; the same results give the same bytes.
    settings = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "mrrope"}
    with rc_context(settings), warnings.catch_warnings(), TemporaryDirectory(dir=directory, prefix=".mrrope-") as aside:
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in letters that its font lacks
        for picture, to in _pictures(summary):
            for suffix in SUFFIXES:
                to(Path(aside) / f"{picture.name}{suffix}")
            drawn.append(picture)
        for made in Path(aside).iterdir():  # whole, so that a page is never left with half a picture
            os.replace(made, directory / made.name)
    return drawn


def _pictures(summary: Summary) -> Iterator[tuple[Picture, Draw]]:
    for i, table in enumerate(summary.ppl):
        name = "perplexity" if i == 0 else f"perplexity-{i}"
        yield from _perplexity(name, table, summary)
    if summary.ppl:
        yield from _differences(summary.ppl[0], summary)
    for i, task in enumerate(summary.ruler):
        yield from _scores(f"ruler-{i}", task, summary)
    for i, task in enumerate(summary.tasks):
        yield from _scores(f"scores-{i}", task, summary)
        yield from _maps(f"map-{i}", task, summary)


def _perplexity(name: str, table: Table, summary: Summary) -> Iterator[tuple[Picture, Draw]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for column in _buckets(table):
        for way, value in column.values.items():
            if value.whole:
                x, y = series.setdefault(_label(way, summary), ([], []))
                # A level line over the bucket, so that what breaks at the original context is seen to break there.
                x += [column.start or column.end // 4, column.end]
                y += [exp(min(value.mean, 300))] * 2
    if series:
        what = printable(table.text, 60) if table.text else "all texts" if len(summary.ppl) > 1 else "one text"
        title = f"Perplexity by position, {what}"
        alt = f"{title}: a line for each way, in buckets of {summary.bucket}; the table has its values"
        n, among, top = summary.results.n_ctx_orig, _labels(summary), _top(_buckets(table))
        yield (
            Picture(name, alt),
            lambda path: plots.plot_perplexity(series, n, path, log2=True, title=title, among=among, top=top),
        )


def _top(columns: list[Column]) -> float:
    """Where a perplexity picture ends: above every value that is not far from its own bucket's best, as texts vary."""
    shown = [[value.mean for value in column.values.values() if value.whole] for column in columns]
    kept = [mean for means in shown for mean in means if mean <= min(means) + log(BREAKDOWN)]
    return 1.08 * exp(min(max(kept), 300))


def _differences(table: Table, summary: Summary) -> Iterator[tuple[Picture, Draw]]:
    """Each way against truncate, which is what a user has without any of them. `none` breaks down and is left out."""
    series: dict[str, dict[int, tuple[float, float, float]]] = {}
    for column in _buckets(table):
        for versus in column.truncate:
            if versus.interval is not None and versus.way != "none":
                middle = (column.start + column.end) // 2
                series.setdefault(_label(versus.way, summary), {})[middle] = versus.interval
    # a way that is of no use anywhere would press all others into one line
    lowest = {way: min(mean for mean, _, _ in points.values()) for way, points in series.items()}
    far = [f"{way}, {100 * expm1(mean):.0f} % and more" for way, mean in lowest.items() if mean > log(BREAKDOWN)]
    series = {way: points for way, points in series.items() if lowest[way] <= log(BREAKDOWN)}
    if series:
        title = "Against truncating, with 95 % intervals" + (f" (not shown: {', '.join(far)})" if far else "")
        label = "perplexity against truncate's, % (below 0: better)"
        alt = f"{title}: difference of perplexity by position, in per cent; below 0 the way is better than truncate"
        n, among, gap = summary.results.n_ctx_orig, _labels(summary), 0.6 * summary.bucket / len(series)
        yield (
            Picture("differences", alt),
            lambda path: plots.plot_intervals(series, n, path, label=label, title=title, gap=gap, among=among),
        )


def _scores(name: str, task: Task, summary: Summary) -> Iterator[tuple[Picture, Draw]]:
    """Of two lengths or more: the table says as much of one."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for column in task.table.columns:
        for way, value in column.values.items():
            if value.whole:
                x, y = series.setdefault(_label(way, summary), ([], []))
                x.append(column.end)
                y.append(value.mean)
    n, title = summary.results.n_ctx_orig, f"{printable(task.name, 60)}: score by length"
    if len({at for x, _ in series.values() for at in x}) > 1:
        yield (
            Picture(name, f"{title}: a line for each way; the table has its values"),
            lambda path: plots.plot_scores(series, n, path, title=title, among=_labels(summary)),
        )


def _maps(name: str, task: Task, summary: Summary) -> Iterator[tuple[Picture, Draw]]:
    """Only for tasks whose needles lie at more than one depth; many depths are put together, a row for each tenth."""
    row = _rows({a.depth for a in summary.results.answers[task.name] if a.depth is not None})
    cells: dict[str, dict[tuple[int, float], list[float]]] = {}
    for way in summary.results.ways:
        for a in summary.results.answers[task.name]:
            if a.way == way and a.depth is not None:
                its = cells.setdefault(_label(way, summary), {})
                its.setdefault((a.length, row(a.depth)), []).append(a.score)
    if len({depth for its in cells.values() for _, depth in its}) < 2:
        return
    maps = {way: {at: sum(s) / len(s) for at, s in its.items()} for way, its in cells.items()}
    n, title = summary.results.n_ctx_orig, f"{printable(task.name, 60)}: score by length and depth"
    alt = f"{title}: a map for each way, red 0, yellow a half, green 1; the CSV file has its values"
    yield Picture(name, alt), lambda path: plots.plot_maps(maps, n, path, title=title)


def _rows(depths: set[float]) -> Callable[[float], float]:
    """The row of a depth, in per cent: its own where all make a grid, else the middle of its tenth of the text.

    >>> [_rows(set(depths))(37.2) for depths in ((0, 37.2, 100), [i + 0.2 for i in range(60)])]
    [37.2, 35.0]
    """
    if len(depths) <= MOST_ROWS:
        return float
    return lambda depth: 10.0 * min(int(depth // 10), 9) + 5


def _buckets(table: Table) -> list[Column]:
    return [column for column in table.columns if column.label == span(column.start, column.end)]


def _labels(summary: Summary) -> list[str]:
    """All names, those that have a colour of their own first, measured or not: reports are laid side by side."""
    usual = [f"{way} ({mode})" if mode else way for way, mode in USUAL.items()]
    return list(dict.fromkeys([*usual, *(_label(way, summary) for way in summary.results.ways)]))


def _label(way: str, summary: Summary) -> str:
    mode = summary.results.mode(way)
    shown = printable(way, 40).lstrip("_")  # matplotlib hides what begins with an underscore
    return f"{shown} ({mode})" if mode else shown
