"""The report's blocks as Markdown and as one HTML page, and the numbers as CSV.

What a model said, and names from files, are data: shown as they are, never as markup, links or terminal commands.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import exp

from ..text import printable
from .report_stats import Column, Summary, Table
from .report_words import Block, Grid, Heading, Items, Para, Picture

LIMIT = 2000  # characters of one string
FIELDS = (
    "measure", "text", "way", "mode", "column", "start", "end", "depth", "metric", "value", "n", "whole", "other",
    "low", "high", "real",
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #212529; --soft: #495057; --grey: #868e96; --rule: #dee2e6;
  --best: #e6fcf5; --c0: #3b5bdb; --c1: #e8590c; --c2: #0c8599; --c3: #ae3ec9; --c4: #5c940d; --c5: #c2255c;
  --c6: #f08c00; --c8: #7f4f24; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e9ecef; --soft: #ced4da; --grey: #a3aab1;
  --rule: #3b4046; --best: #0b3b2e; --c0: #91a7ff; --c1: #ffa94d; --c2: #66d9e8; --c3: #e599f7; --c4: #a9e34b;
  --c5: #faa2c1; --c6: #ffd43b; --c8: #d4a373; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .75rem; }
p, li { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; max-width: 32rem; }
th { white-space: nowrap; }
.wide { overflow-x: auto; margin: 1rem 0 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .7rem; text-align: left; vertical-align: top; }
th { font-weight: 600; }
td.best { background: var(--best); }
figure { margin: 1.5rem 0; }
svg { max-width: 100%; height: auto; }
"""
# The pictures' colours on white, by the style's names, so that they change with the page.
_PAINT = {
    "#ffffff": "--page", "#212529": "--ink", "#868e96": "--grey", "#e9ecef": "--rule", "#ced4da": "--rule",
    "#495057": "--soft", "#3b5bdb": "--c0", "#e8590c": "--c1", "#0c8599": "--c2", "#ae3ec9": "--c3",
    "#5c940d": "--c4", "#c2255c": "--c5", "#f08c00": "--c6", "#7f4f24": "--c8",
}  # fmt: skip
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown, its pictures linked as NAME.png beside it."""
    return "\n\n".join(map(_md_block, blocks)) + "\n"


def _md_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_md(block.text)}"
    if isinstance(block, Para):
        return _md(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_md(text)}" for text in block.texts)
    if isinstance(block, Picture):
        return f"![{_md(block.alt)}]({block.name}.png)"
    rows = [
        [f"**{_md(cell)}**" if (r, c) in block.strong else _md(cell) for c, cell in enumerate(row)]
        for r, row in enumerate(block.rows)
    ]
    head = [list(map(_md, block.header)), ["---"] * len(block.header)]
    return f"{_md(block.caption)}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def _md(text: str) -> str:
    """
    >>> print(_md("<b>|![x](http://y)"))
    \\<b\\>\\|\\!\\[x\\](http\\://y)
    """
    return re.sub(r"([\\`*_\[\]<>|!~&#]|:(?=/))", r"\\\1", printable(text, LIMIT))


def html(blocks: Sequence[Block], pictures: Mapping[str, str]) -> str:
    """The report as one page that loads nothing. pictures: {name: SVG file's text}."""
    title = next((b.text for b in blocks if isinstance(b, Heading)), "Evaluation")
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_html(title)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>", "<main>",
        *(_html_block(block, pictures) for block in blocks), "</main>", "</body>", "</html>", "",
    ])  # fmt: skip


def _html_block(block: Block, pictures: Mapping[str, str]) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_html(block.text)}</h{block.level}>"
    if isinstance(block, Para):
        return f"<p>{_html(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>\n" + "\n".join(f"<li>{_html(text)}</li>" for text in block.texts) + "\n</ul>"
    if isinstance(block, Picture):
        drawing = inline(pictures[block.name], block.name)
        return f'<figure role="img" aria-label="{_html(block.alt)}">\n{drawing}\n</figure>'
    return _html_table(block)


def _html_table(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{_html(cell)}</th>' for cell in grid.header)
    rows = []
    for r, row in enumerate(grid.rows):
        cells = [f'<th scope="row">{_html(row[0])}</th>']
        for c, cell in enumerate(row[1:], 1):
            best = (r, c) in grid.strong
            cells.append(f'<td class="best"><strong>{_html(cell)}</strong></td>' if best else f"<td>{_html(cell)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{_html(grid.caption)}</caption>"
    label = f'role="region" tabindex="0" aria-label="{_html(grid.caption)}"'
    body = "\n".join(rows)
    return (
        f'<div class="wide" {label}>\n<table>\n{caption}\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _html(text: str) -> str:
    return escape(printable(text, LIMIT))


def inline(svg: str, name: str) -> str:
    """A picture of matplotlib's for use within a page: its ids made the page's own, its colours the style's.

    Prologue, metadata and namespaces are left out: HTML needs none of them, and they are addresses.
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _PAINT.items():
        svg = re.sub(rf"((?:fill|stroke): ){colour}", rf"\g<1>var({variable})", svg)
    return svg


def numbers(summary: Summary) -> str:
    """Every number of the report as CSV, one a row: means, means by depth, and differences with their intervals."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    tasks = (table for task in (*summary.ruler, *summary.tasks) for table in (task.table, task.losses) if table)
    for table in (*summary.ppl, *summary.kl, *tasks):
        for column in table.columns:
            writer.writerows({**row, **_where(table, column, summary, row["way"])} for row in _rows(table, column))
    for task in summary.tasks:
        writer.writerows(_depths(task.name, summary))
    return out.getvalue()


def _where(table: Table, column: Column, summary: Summary, way: object) -> dict[str, object]:
    of_task = table.kind in ("score", "loss")
    text = table.text or ("" if of_task else "all texts")
    if table.kind == "kl":
        text = column.label
    place = {"column": _csv(column.label), "start": column.start, "end": column.end}
    measure = table.name if of_task else table.kind
    return {"measure": _csv(measure), "text": _csv(text), "mode": summary.results.mode(str(way)), **place}


def _rows(table: Table, column: Column) -> Iterator[dict[str, object]]:
    for way, value in column.values.items():
        mean = exp(min(value.mean, 700)) if table.kind == "ppl" else value.mean
        metric = {"ppl": "perplexity", "kl": "nats", "loss": "loss, nats"}.get(table.kind, "score")
        yield {"way": _csv(way), "metric": metric, "value": mean, "n": value.n, "whole": int(value.whole)}
    metric = "difference, score" if table.kind == "score" else "difference, nats"
    for versus in dict.fromkeys((*column.rivals, *column.truncate)):
        if versus.interval is not None:
            mean, low, high = versus.interval
            ends = {"value": mean, "low": low, "high": high, "real": int(versus.real)}
            yield {"way": _csv(versus.way), "other": _csv(versus.other), "metric": metric, **ends}


def _depths(task: str, summary: Summary) -> Iterator[dict[str, object]]:
    cells: dict[tuple[str, int, float], list[float]] = {}
    for a in summary.results.answers[task]:
        if a.depth is not None:
            cells.setdefault((a.way, a.length, a.depth), []).append(a.score)
    for (way, length, depth), scores in sorted(cells.items()):
        place = {"column": length, "start": length, "end": length, "depth": depth, "n": len(scores)}
        mean = sum(scores) / len(scores)
        named = {"measure": _csv(task), "way": _csv(way), "mode": summary.results.mode(way)}
        yield {**named, **place, "metric": "score by depth", "value": mean}


def _csv(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    shown = printable(text, LIMIT)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
