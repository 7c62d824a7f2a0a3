"""The report's content, before it is Markdown or HTML: headings, paragraphs, tables and pictures in one order.

No sentence here knows which way should win: each is made from a column's best and the intervals to the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import TypeAlias

from .report_read import Answer, Results
from .report_stats import FEWEST, GATE, SHARE, Column, Effective, Summary, Table, Task, Versus, span, tokens
from .report_versus import RULE, against_truncate, difference


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Para:
    text: str


@dataclass(frozen=True)
class Items:
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table: every row begins with its own heading; `strong` cells are (row, column), the best of their columns."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Picture:
    """`name`: of its files, without .png and .svg."""

    name: str
    alt: str


Block: TypeAlias = Heading | Para | Items | Grid | Picture
MODES = (
    "Modes: A, one S for every length; B, S = length / original context, one pass for each length; C, elastic, S grows"
    " with the position. A way without a mode is the model as it is."
)


def blocks(summary: Summary, pictures: Sequence[Picture]) -> list[Block]:
    """The whole report. pictures: those that were drawn; `report_pictures` names them by what they show."""
    drawn = {picture.name: picture for picture in pictures}
    found: list[Block] = [Heading(f"Evaluation of {_model(summary.results)}", 1), *_start(summary)]
    if said := tuple(against_truncate(summary)):
        found += [Heading("Against truncating"), Para(RULE), Items(said)]
    if summary.ppl:
        found += [Heading("Perplexity by position"), *_ppl(summary, drawn)]
    if summary.kl:
        found += [Heading("What extending costs in the window"), *_kl(summary)]
    for i, task in enumerate(summary.ruler):
        found += [Heading(task.name), *_ruler(summary, task, i, drawn)]
    for i, task in enumerate(summary.tasks):
        found += [Heading(f"Task {task.name}"), *_task(summary, task, i, drawn)]
    return [*found, Heading("How to read this"), Items(tuple(_notes(summary)))]


def _model(results: Results) -> str:
    model = results.head.get("model")
    return str(model.get("name") or "a model") if isinstance(model, dict) else "a model"


def _start(summary: Summary) -> Iterator[Block]:
    results = summary.results
    n = results.n_ctx_orig
    model, engine = results.head.get("model"), results.head.get("engine")
    facts = [f"original context {n} tokens" if n else "the file does not say the model's original context"]
    if isinstance(model, dict):
        named = {"arch": "architecture", "sha256": "content hash"}  # model_identity's is not the file's own sha256
        facts += [f"{name} {str(model[word])[:16]}" for word, name in named.items() if model.get(word)]
    if isinstance(results.head.get("scale"), (int, float)):
        facts.append(f"S = {results.head['scale']:g}")
    if engine:
        facts.append(f"engine {engine}")
    settings = results.head.get("settings")
    if isinstance(settings, dict):
        facts += [_setting(name, value) for name, value in settings.items()]
    yield Para("; ".join(facts) + ".")
    yield Para(MODES)
    if results.skipped:
        yield Para(
            f"Lines of the results file that are cut off or are no results, and were left out: {results.skipped}."
        )
    for task, n_lines in results.others.items():
        yield Para(f"Results of {task} that have no score and are not shown: {n_lines}.")


def _setting(name: str, value: object) -> str:
    if name == "flash_attn":
        return f"flash attention {'on' if value else 'off'}"
    cache = {"type_k": "K cache", "type_v": "V cache"}
    return f"{cache[name]} {value or 'f16'}" if name in cache else f"{name} {value}"


def _ppl(summary: Summary, drawn: dict[str, Picture]) -> Iterator[Block]:
    columns = sorted(summary.ppl[0].columns, key=lambda column: not column.label.endswith("window"))
    yield Items(tuple(verdict("ppl", column) for column in columns))
    yield from (drawn[name] for name in ("perplexity", "differences") if name in drawn)
    for i, table in enumerate(summary.ppl):
        title = f"{_texts(table, summary)}: perplexity by position"
        yield grid(title, table, summary.results)
        if i > 0 and table.columns:
            yield Items((f"{table.text}: {verdict(table.kind, table.columns[-1])}",))
        if len(summary.ppl) > 1 and f"perplexity-{i}" in drawn:
            yield drawn[f"perplexity-{i}"]


def _texts(table: Table, summary: Summary) -> str:
    return table.text or f"All {len(summary.results.ppl)} texts, weighing alike"


def _kl(summary: Summary) -> Iterator[Block]:
    for table in summary.kl:
        yield Items(tuple(verdict(table.kind, c) for c in table.columns[:1]))
        yield grid("Mean KL divergence from the original model's predictions, nats a token", table, summary.results)


def _ruler(summary: Summary, task: Task, i: int, drawn: dict[str, Picture]) -> Iterator[Block]:
    yield Para(gate(task))
    yield Items(tuple(verdict("score", c) for c in task.table.columns))
    yield from (drawn[name] for name in (f"ruler-{i}",) if name in drawn)
    yield grid(f"{task.name}: mean of the tasks' scores by length, from 0 to 1", task.table, summary.results)
    yield _effective(summary, task)


def _effective(summary: Summary, task: Task) -> Grid:
    rows = tuple((e.way, summary.results.mode(e.way), effective(e, task)) for e in task.effective)
    return Grid(f"{task.name}: effective length", ("way", "mode", "effective length"), rows)


def _task(summary: Summary, task: Task, i: int, drawn: dict[str, Picture]) -> Iterator[Block]:
    yield Para(gate(task))
    if tagged := tags(summary.results.answers[task.name]):
        yield Para(tagged)
    yield Items(tuple(verdict("score", c) for c in task.table.columns))
    yield from (drawn[name] for name in (f"scores-{i}", f"map-{i}") if name in drawn)
    yield grid(f"{task.name}: mean score by length, from 0 to 1", task.table, summary.results)
    yield _effective(summary, task)
    if task.losses:
        yield Items(tuple(f"Loss of the right answer at {verdict('loss', c)}" for c in task.losses.columns))
        yield grid(f"{task.name}: mean loss of the right answer, nats a token", task.losses, summary.results)
    answers = summary.results.answers[task.name]
    measures = [("ROUGE-1 recall", "rouge1")]
    if any(a.exact is not None and a.exact != a.score for a in answers):  # else the score says it
        measures.insert(0, ("exact answers, share", "exact"))
    for name, field in measures:
        other = _means(task.name, name, field, answers, summary)
        if other is not None:
            yield other
    said = _said(answers, summary.results)
    if said:
        yield Grid(
            f"{task.name}: one question, and what each way answered",
            ("way", "length", "depth %", "expected", "said"), said,
        )  # fmt: skip


def _means(task: str, name: str, field: str, answers: Sequence[Answer], summary: Summary) -> Grid | None:
    """A plain table of another measure of the same answers."""
    lengths = sorted({a.length for a in answers if getattr(a, field) is not None})
    rows = []
    for way in summary.results.ways:
        cells = [
            [
                float(getattr(a, field))
                for a in answers
                if (a.way, a.length) == (way, n) and getattr(a, field) is not None
            ]
            for n in lengths
        ]
        if any(cells):
            shown = (f"{sum(c) / len(c):.3f}" if c else "-" for c in cells)
            rows.append((way, summary.results.mode(way), *shown))
    return Grid(f"{task}: {name}", ("way", "mode", *map(tokens, lengths)), tuple(rows)) if rows else None


def tags(answers: Sequence[Answer]) -> str:
    """What a task's scores must be named with: tags that all its samples share, and how many contexts were cut."""
    shared = dict(answers[0].tags)
    for a in answers:
        shared = {name: value for name, value in shared.items() if a.tags.get(name) == value}
    found = [", ".join(f"{name}={value}" for name, value in shared.items() if name != "cut")]
    if cut := sum("cut" in a.tags for a in answers):
        found.append(f"the middle of the context was cut out to fit the length in {cut} of {len(answers)} answers")
    return f"Tagged: {'; '.join(filter(None, found))}." if any(found) else ""


def _said(answers: Sequence[Answer], results: Results) -> tuple[tuple[str, ...], ...]:
    """One question, and what each way answered: the first one at the longest length that most ways were asked."""
    asked: dict[tuple[int, str], dict[str, Answer]] = {}
    for a in answers:
        asked.setdefault((a.length, a.sample), {})[a.way] = a
    one = asked[max(asked, key=lambda key: (len(asked[key]), key[0]))]
    rows = []
    for a in (one[way] for way in results.ways if way in one):
        depth = "" if a.depth is None else f"{a.depth:g}"
        if a.said or a.expected:  # results of other programs may keep neither
            rows.append((a.way, tokens(a.length), depth, ", ".join(a.expected)[:200], a.said[:200] or "(nothing)"))
    return tuple(rows)


def grid(caption: str, table: Table, results: Results) -> Grid:
    """A table's values; `*` marks a value over less than other ways have, which is not compared."""
    ways = [way for way in results.ways if any(way in c.values for c in table.columns)]
    rows, strong = [], set()
    for r, way in enumerate(ways):
        cells = []
        for c, its in enumerate(table.columns):
            value = its.values.get(way)
            cells.append("-" if value is None else shown(table.kind, value.mean) + ("" if value.whole else "*"))
            if way in its.best and its.rivals:
                strong.add((r, c + 2))
        rows.append((way, results.mode(way), *cells))
    header = ("way", "mode", *(c.label for c in table.columns))
    return Grid(caption, header, tuple(rows), frozenset(strong))


def shown(kind: str, mean: float) -> str:
    """A mean as its table has it: perplexity from mean nats, KL in nats, a score."""
    if kind == "ppl":
        return _perplexity(mean)
    return {"kl": f"{mean:.4g}", "loss": f"{mean:.3f}"}.get(kind, f"{mean:.2f}")


def _perplexity(mean: float) -> str:
    if mean > 700:
        return "over 1e300"
    value = exp(mean)
    return f"{value:.4g}" if value < 1e4 else f"{value:.3g}"


def verdict(kind: str, column: Column) -> str:
    """What was best in one column, and whether it really differs from each other way.

    Only ways with all of the column's blocks or samples are compared.
    """
    where = column.label
    whole = [way for way, value in column.values.items() if value.whole]
    if len(whole) < 2:
        return f"{where}: {'only ' + whole[0] if whole else 'no way'} was measured wholly, nothing to compare."
    word = "highest score" if kind == "score" else "lowest"
    value = shown(kind, column.values[column.best[0]].mean)
    if not column.rivals:
        return f"{where}: all {len(whole)} ways are equal ({value})."
    best = f"{', '.join(column.best)} {'are equal and ' if len(column.best) > 1 else ''}"
    parts = [f"{where}: {best}{'have' if len(column.best) > 1 else 'has'} the {word} ({value})"]
    groups = (
        ("really worse", [v for v in column.rivals if v.real]),
        ("not told apart from it", [v for v in column.rivals if v.interval and not v.real]),
        (f"too few pairs to tell (under {FEWEST})", [v for v in column.rivals if v.interval is None]),
    )
    parts += [f"{name}: {', '.join(_rival(kind, v) for v in its)}" for name, its in groups if its]
    return "; ".join(parts) + "."


def _rival(kind: str, versus: Versus) -> str:
    return f"{versus.way} ({difference(kind, versus)})" if versus.interval else versus.way


def gate(task: Task) -> str:
    """Whether the unextended model can do the task at all in its own window."""
    if task.base is None:
        return (
            f"{task.name} is not gated in: the unextended model was not measured in its window, so a low score past it"
            " may be the task's own difficulty, and there is no base score for an effective length."
        )
    if not task.gated:
        return (
            f"{task.name} is not gated in: the unextended model scores {task.base:.2f} in its window, under {GATE:g}."
            " What a way scores past the window says little about the way."
        )
    return f"{task.name} is gated in: the unextended model scores {task.base:.2f} in its window."


def effective(its: Effective, task: Task) -> str:
    if task.base is None:
        return "unknown: no base score"
    if task.base == 0:
        return "unknown: the base score is 0"
    gated = "" if task.gated else ", not gated in"
    if its.length is None:
        return f"at no length{gated}"
    dips = f" (but not at {', '.join(map(tokens, its.dips))})" if its.dips else ""
    return f"{tokens(its.length)}{dips}{gated}"


def _notes(summary: Summary) -> Iterator[str]:
    yield (
        "truncate is the unextended model given only the last tokens that fit its window; inside the window it is none."
    )
    if summary.ppl or summary.kl:
        yield (
            f"Perplexity is shown in buckets of {summary.bucket} positions ({span(0, summary.bucket)} is the first),"
            " not up to a position, which would hide a collapse. Where passes of several lengths read one position,"
            " the shortest counts."
        )
    yield (
        "Intervals hold 95 % of a paired bootstrap: over blocks of 256 positions, over texts too where there are three"
        " or more, or over a task's samples. A difference is called real if its interval excludes 0 and, for scores,"
        " a sign test agrees at 5 %. Each pair is judged by itself: of twenty pairs that are alike, one would be"
        " called different."
    )
    yield "* marks a value over fewer blocks or samples than other ways have: it is not compared."
    if summary.tasks:
        yield (
            f"The base score is the unextended model's mean over the lengths in its window. A task is gated in at"
            f" {GATE:g} or more; a way's effective length is the longest at {SHARE:.0%} of the base score or more."
            " Questions put to one text (needle-keys, kv) are drawn one by one: how texts differ is not in their"
            " intervals. RULER's means weigh its tasks alike, and only samples are drawn."
        )
