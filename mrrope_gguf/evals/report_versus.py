"""Two ways compared, in words; and what each has over truncating, which everyone can do today.

Two numbers decide what is said against truncation, and nothing else: the interval of the difference in perplexity past
the window, and that of each task's scores there, all lengths together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import expm1
from statistics import fmean

from .report_stats import FEWEST, GATE, Summary, Task, Versus, versus

RULE = (
    "Truncating is what a user can do today: the unextended model, given the last tokens alone. A method that does not"
    " beat truncate at perplexity past the window must at least retrieve what truncate cannot."
)
PLAIN = ("none", "truncate")  # no methods
_NOT = "not compared with truncate at perplexity past the window"


@dataclass(frozen=True)
class Retrieval:
    """A task past the window, all lengths together: mean scores of the way and of truncate, from 0 to 1.

    n: questions that both were asked. versus: their difference, as report_stats.versus has it.
    """

    task: str
    ours: float
    theirs: float
    n: int
    versus: Versus

    @property
    def verdict(self) -> int:
        """1 where the way really retrieves more, -1 where less, 0 where they are not told apart."""
        if not self.versus.real or self.versus.interval is None:
            return 0
        return 1 if self.versus.interval.low > 0 else -1

    def words(self) -> str:
        found = f"{self.task} {self.ours:.2f} against {self.theirs:.2f}"
        if self.versus.interval is None:
            return f"{found} (under {FEWEST} questions)"
        return f"{found} ({difference('score', self.versus)})"


def difference(kind: str, versus: Versus) -> str:
    """way - other with its interval: per cent of perplexity, nats of KL, or score."""
    if versus.interval is None:
        return "-"
    if kind == "ppl":
        mean, low, high = map(_per_cent, versus.interval)
        return f"{mean} %, {low} to {high}"
    mean, low, high = (f"{x:+.3g}" for x in versus.interval)
    return f"{mean}, {low} to {high}"


def _per_cent(nats: float) -> str:
    """
    >>> [_per_cent(x) for x in (-0.01, 3.0, 1e6)]
    ['-0.995', '+1,909', '+over 1e6']
    """
    value = 100 * expm1(min(nats, 700))
    if value > 1e6:
        return "+over 1e6"
    return f"{value:+,.0f}" if value >= 1000 else f"{value:+.3g}"


def against_truncate(summary: Summary) -> Iterator[str]:
    """A sentence for each method; those of which the same is to be said are named together."""
    found: dict[str, list[str]] = {}
    for way in summary.results.ways:
        if way not in PLAIN:
            found.setdefault(_sentence(way, summary), []).append(way)
    for words, ways in found.items():
        yield f"{', '.join(ways)}: {words}."


def retrievals(way: str, summary: Summary) -> list[Retrieval]:
    """The tasks that the way and truncate were both asked past the window, but for those too hard for the model."""
    return [
        found for task in summary.tasks if not _too_hard(task) and (found := _retrieval(way, task, summary)) is not None
    ]


def _retrieval(way: str, task: Task, summary: Summary) -> Retrieval | None:
    n_ctx = summary.results.n_ctx_orig
    scores: dict[str, dict[str, float]] = {way: {}, "truncate": {}}
    for a in summary.results.answers[task.name]:
        if n_ctx is not None and a.length > n_ctx and a.way in scores:
            scores[a.way][f"{a.length}/{a.sample}"] = a.score
    both = sorted(scores[way].keys() & scores["truncate"].keys())
    if not both:
        return None
    rows = {name: {task.name: {key: its[key] for key in both}} for name, its in scores.items()}
    ours, theirs = (fmean(rows[name][task.name].values()) for name in (way, "truncate"))
    return Retrieval(task.name, ours, theirs, len(both), versus(rows, way, "truncate", signs=True))


def _too_hard(task: Task) -> bool:
    return task.base is not None and task.base < GATE


def _sentence(way: str, summary: Summary) -> str:
    perplexity, beats = _perplexity(way, summary)
    found = retrievals(way, summary)
    more, alike, less = ("; ".join(r.words() for r in found if r.verdict == sign) for sign in (1, 0, -1))
    if more:
        retrieves = f"{'and' if beats else 'but'} it retrieves what truncate cannot: {more}"
    elif found:
        retrieves = f"{'but' if beats else 'and'} nothing here shows that it retrieves what truncate cannot"
    else:
        retrieves = "and whether it retrieves what truncate cannot was not measured past the window"
    others = [f"not told apart from truncate: {alike}"] * bool(alike) + [f"retrieves less: {less}"] * bool(less)
    if hard := [task.name for task in summary.tasks if _too_hard(task)]:
        others.append(f"not counted, since the unextended model fails in its own window: {', '.join(hard)}")
    return "; ".join([f"{perplexity}, {retrieves}", *others])


def _perplexity(way: str, summary: Summary) -> tuple[str, bool]:
    """What is known of its perplexity past the window, and whether that beats truncation's."""
    past = summary.past
    if past is None:
        return f"{_NOT} ({'no text reaches there' if summary.ppl else 'it was not measured'})", False
    for name in ("truncate", way):
        if name not in past.values:
            return f"{_NOT} ({name} was not measured there)", False
        if not past.values[name].whole:
            return f"{_NOT} ({name} is not finished there)", False
    its = next(each for each in past.truncate if each.way == way)
    if its.interval is None:
        return f"{_NOT} (under {FEWEST} pairs of blocks)", False
    if its.real and its.interval.high < 0:
        return f"beats truncate at perplexity past the window ({difference('ppl', its)})", True
    sure = "worse" if its.real else "not told apart"
    return f"does not beat truncate at perplexity past the window ({difference('ppl', its)}: {sure})", False
