"""What the results come to: a table for each measure, its best way by column, and how sure each difference is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..errors import MrropeError
from .bootstrap import Interval, paired
from .report_read import BLOCK, Answer, Results
from .ruler_tasks import CORE, OFFLINE

SHARE = 0.85  # of the base score, for a length to be effective
GATE = 0.5  # the unextended model's score in its window, for a task to say anything about extending it
FEWEST = 6  # pairs, for an interval: less cannot exclude 0 at 95 % by signs alone
DRAWS = 4000
RULER = {f"RULER core ({len(CORE)} tasks)": CORE, f"RULER-{len(OFFLINE)} (offline)": OFFLINE}
Rows = Mapping[str, Mapping[str, Mapping[str, float]]]  # {way: {text: {block or sample: value}}}


@dataclass(frozen=True)
class Value:
    """A mean of `n` blocks or samples; not `whole` where other ways have some that this one lacks."""

    mean: float
    n: int
    whole: bool


@dataclass(frozen=True)
class Versus:
    """way - other, over what both measured; `interval` is None for fewer than FEWEST pairs, or other texts."""

    way: str
    other: str
    interval: Interval | None
    real: bool


@dataclass(frozen=True)
class Column:
    """One column of a table: `start` and `end` in positions, or both the length of a task's samples."""

    label: str
    start: int
    end: int
    values: Mapping[str, Value]
    best: tuple[str, ...]  # more than one where they are equal
    rivals: tuple[Versus, ...]  # every other whole way against the first of the best
    truncate: tuple[Versus, ...]  # every whole way against truncate, where there is that


@dataclass(frozen=True)
class Table:
    """`kind`: ppl, kl or loss (means are nats, lower is better), or score (0 to 1); `text`: None for all together."""

    kind: str
    name: str
    text: str | None
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Effective:
    """The longest length at SHARE of the base score; `dips` are shorter lengths that are not."""

    way: str
    length: int | None
    dips: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A task's scores by length, and the losses of its right answers, where there are any.

    base: the unextended model's mean score in its window, None where it was not measured.
    """

    name: str
    table: Table
    base: float | None
    effective: tuple[Effective, ...]
    losses: Table | None = None

    @property
    def gated(self) -> bool:
        return self.base is not None and self.base >= GATE


@dataclass(frozen=True)
class Summary:
    """All tables. `ppl` and `kl`: all texts together first (where there are several), then each.

    ruler: means over RULER's tasks, where all of a group were measured.
    """

    results: Results
    bucket: int
    ppl: tuple[Table, ...]
    kl: tuple[Table, ...]
    tasks: tuple[Task, ...]
    ruler: tuple[Task, ...] = ()

    @property
    def past(self) -> Column | None:
        """Perplexity past the original context, all texts together: None where no text reaches there."""
        return next((c for t in self.ppl[:1] for c in t.columns if c.label == "past the window"), None)


def summarize(results: Results, bucket: int | None = None) -> Summary:
    """The summary of a results file. bucket: positions in a column of perplexity; by the longest text if None.

    Raises MrropeError for a bucket smaller than a block.
    """
    if bucket is not None and bucket < BLOCK:
        raise MrropeError(
            f"a bucket of {bucket} positions: too small",
            why=f"results are kept by blocks of {BLOCK} positions",
            fix=f"take a multiple of {BLOCK}",
        )
    longest = max((max(b) for t in results.ppl.values() for b in t.values() if b), default=0) + BLOCK
    width = bucket or bucket_width(longest, results.n_ctx_orig)
    spans = _spans(longest, width, results.n_ctx_orig)
    tasks = tuple(_task(results, name) for name in results.answers)
    ruler = tuple(_ruler(results))
    return Summary(results, width, tuple(_ppl(results, spans)), tuple(_kl(results)), tasks, ruler)


def bucket_width(longest: int, n_ctx_orig: int | None) -> int:
    """4096 positions, or less where the texts are so short that there would not be four buckets.

    >>> bucket_width(24576, 8192), bucket_width(3000, 256)
    (4096, 256)
    """
    width = min(4096, 1 << max((longest // 4).bit_length() - 1, 8))
    return min(width, max(256, n_ctx_orig)) if n_ctx_orig else width


def _spans(longest: int, width: int, n_ctx: int | None) -> list[tuple[str, int, int]]:
    spans = [(span(s, s + width), s, s + width) for s in range(0, longest, width)]
    if n_ctx and longest > n_ctx:
        spans += [("in the window", 0, n_ctx), ("past the window", n_ctx, max(spans[-1][2], longest))]
    return spans


def span(start: int, end: int) -> str:
    """
    >>> span(0, 4096), span(8192, 8448)
    ('0-4K', '8K-8448')
    """
    return f"{tokens(start)}-{tokens(end)}"


def tokens(n: int) -> str:
    """
    >>> tokens(512), tokens(24576), tokens(1000)
    ('512', '24K', '1000')
    """
    return f"{n // 1024}K" if n and n % 1024 == 0 else str(n)


def _ppl(results: Results, spans: Sequence[tuple[str, int, int]]) -> Iterable[Table]:
    groups: list[str | None] = [*([None] if len(results.ppl) > 1 else []), *results.ppl]
    for text in groups:
        texts = results.ppl if text is None else {text: results.ppl[text]}
        columns = []
        for label, start, end in spans:
            rows: dict[str, dict[str, dict[str, float]]] = {way: {} for way in results.ways}
            for name, ways in texts.items():
                for way, blocks in ways.items():
                    inside = {str(at): loss for at, loss in sorted(blocks.items()) if start <= at < end}
                    if inside:
                        rows[way][name] = inside
            columns.append(column(label, start, end, rows, lowest=True))
        yield Table("ppl", "perplexity", text, tuple(c for c in columns if c.values))


def _kl(results: Results) -> Iterable[Table]:
    """One table: a column for all texts where there are several, and one for each."""
    if not results.kl:
        return
    n_ctx, columns = results.n_ctx_orig, []
    for text in [*([None] if len(results.kl) > 1 else []), *results.kl]:
        texts = results.kl if text is None else {text: results.kl[text]}
        rows: dict[str, dict[str, dict[str, float]]] = {way: {} for way in results.ways}
        for name, ways in texts.items():
            for way, blocks in ways.items():
                inside = {str(at): v for at, v in sorted(blocks.items()) if n_ctx is None or at < n_ctx}
                if inside:
                    rows[way][name] = inside
        columns.append(column("all texts" if text is None else text, 0, n_ctx or 0, rows, lowest=True))
    yield Table("kl", "KL divergence from the original, in the window", None, tuple(c for c in columns if c.values))


def _task(results: Results, name: str) -> Task:
    answers = results.answers[name]
    table = Table("score", name, None, _columns(results.ways, [answers]))
    known = [a for a in answers if a.loss is not None]
    losses = Table("loss", name, None, _columns(results.ways, [known], losses=True)) if known else None
    base = base_score(answers, results.n_ctx_orig)
    return Task(name, table, base, _effectives(table, results.ways, base), losses)


def _columns(ways: Sequence[str], tasks: Sequence[Sequence[Answer]], *, losses: bool = False) -> tuple[Column, ...]:
    """A column for each length at which every task was put to somebody. Tasks weigh alike: they are all there are."""
    lengths = set.intersection(*({a.length for a in answers} for answers in tasks))
    columns = []
    for length in sorted(lengths):
        rows: dict[str, dict[str, dict[str, float]]] = {way: {} for way in ways}
        for answers in tasks:
            for a in answers:
                if a.length == length:
                    value = a.loss if losses and a.loss is not None else a.score
                    rows[a.way].setdefault(a.task, {})[a.sample] = value
        columns.append(column(tokens(length), length, length, rows, lowest=losses, fixed=True))
    return tuple(columns)


def _ruler(results: Results) -> Iterable[Task]:
    """RULER's mean over the tasks that need no text, and over all that work offline: each only where all were put."""
    for name, names in RULER.items():
        tasks = [results.answers.get(f"ruler/{each}", []) for each in names]
        columns = _columns(results.ways, tasks) if all(tasks) else ()
        if columns:
            table = Table("score", name, None, columns)
            bases = [base_score(answers, results.n_ctx_orig) for answers in tasks]
            known = [base for base in bases if base is not None]
            base = fmean(known) if len(known) == len(tasks) else None
            yield Task(name, table, base, _effectives(table, results.ways, base))


def _has(table: Table, way: str) -> bool:
    return any(way in c.values for c in table.columns)


def base_score(answers: Sequence[Answer], n_ctx_orig: int | None) -> float | None:
    """The unextended model's mean score in its window, where truncating changes nothing; None if not measured."""
    for way in ("none", "truncate"):
        inside = [a.score for a in answers if a.way == way and n_ctx_orig and a.length <= n_ctx_orig]
        if inside:
            return fmean(inside)
    return None


def _effectives(table: Table, ways: Sequence[str], base: float | None) -> tuple[Effective, ...]:
    return tuple(_effective(table, way, base) for way in ways if _has(table, way))


def _effective(table: Table, way: str, base: float | None) -> Effective:
    """Only lengths that the way has finished count."""
    scores = {c.end: c.values[way].mean for c in table.columns if way in c.values and c.values[way].whole}
    reached = [n for n, score in scores.items() if base and score >= SHARE * base - 1e-12]
    longest = max(reached, default=None)
    return Effective(way, longest, tuple(n for n in scores if longest and n < longest and n not in reached))


def column(label: str, start: int, end: int, rows: Rows, *, lowest: bool, fixed: bool = False) -> Column:
    """Means by way, texts weighing alike, and the best of those that have all there is, against the others.

    fixed: as for bootstrap.paired.
    """
    wanted: dict[str, set[str]] = {}
    for texts in rows.values():
        for text, cells in texts.items():
            wanted.setdefault(text, set()).update(cells)
    values = {
        way: Value(
            fmean(fmean(cells.values()) for cells in texts.values()),
            sum(map(len, texts.values())),
            {text: set(cells) for text, cells in texts.items()} == wanted,
        )
        for way, texts in rows.items()
        if texts
    }
    whole = {way: value.mean for way, value in values.items() if value.whole}
    top = (min if lowest else max)(whole.values(), default=0.0)
    best = tuple(way for way, mean in whole.items() if math.isclose(mean, top, rel_tol=1e-12, abs_tol=1e-15))
    signs = not lowest
    others = [way for way in whole if "truncate" in whole and way != "truncate"]
    rivals = tuple(versus(rows, way, best[0], signs=signs, fixed=fixed) for way in whole if way not in best)
    truncate = tuple(versus(rows, way, "truncate", signs=signs, fixed=fixed) for way in others)
    return Column(label, start, end, values, best, rivals, truncate)


def versus(rows: Rows, way: str, other: str, *, signs: bool, fixed: bool = False) -> Versus:
    """way - other with its interval. signs: the pairs' signs must agree that there is a difference. fixed: as above.

    Scores are mostly 0 or 1, and the bootstrap of a few such is surer than it may be.
    """
    ours = [list(cells.values()) for _, cells in sorted(rows[way].items())]
    pairs = [[rows[other][text][key] for key in cells] for text, cells in sorted(rows[way].items())]
    if sum(map(len, ours)) < FEWEST:
        return Versus(way, other, None, False)
    found = paired(ours, pairs, draws=DRAWS, fixed=fixed)
    real = found.low > 0 or found.high < 0
    if signs:
        differences = [a - b for row, its in zip(ours, pairs, strict=True) for a, b in zip(row, its, strict=True)]
        real = real and sign_test(differences) < 0.05
    return Versus(way, other, found, real)


def sign_test(differences: Sequence[float]) -> float:
    """How likely it is that coins fall at least as unevenly as the signs of the differences that are not 0.

    >>> sign_test([1, 1, 1, 0, 0]), sign_test([1] * 6)
    (0.25, 0.03125)
    """
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    tail = sum(math.comb(up + down, k) for k in range(max(up, down), up + down + 1))
    return min(1.0, float(tail / (1 << max(up + down - 1, 0))))
