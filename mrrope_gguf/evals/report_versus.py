"""Two ways compared, in words; and what each has over truncating, which everyone can do today.

Two numbers decide what is said against truncation, and nothing else: the interval of the difference in perplexity past
the window, and that of each task's scores there, all lengths together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import expm1
from statistics import fmean

from .report_stats import FEWEST, GATE, Rows, Summary, Task, Versus, versus

RULE = (
    "Truncating is what a user can do today: the unextended model, given the last tokens alone. A method that does not"
    " beat truncate at perplexity past the window must at least retrieve what truncate cannot."
)
PLAIN = ("none", "truncate")  # no methods
_NOT = "not compared with truncate at perplexity past the window"


@dataclass(frozen=True)
class Retrieval:
    """A task past the window, all lengths together, over the questions that the way and truncate were both asked.

    ours, theirs: mean scores from 0 to 1, or mean losses of the right answer in nats a token. versus: their difference.
    n: these questions; most: those that any way was asked there.
    """

    task: str
    ours: float
    theirs: float
    versus: Versus
    n: int
    most: int

    @property
    def sign(self) -> int:
        """1 where the way's mean is really the higher, -1 where it is the lower, 0 where they are not told apart."""
        if not self.versus.real or self.versus.interval is None:
            return 0
        return 1 if self.versus.interval.low > 0 else -1

    def words(self) -> str:
        few = f"under {FEWEST} questions"
        shown = few if self.versus.interval is None else difference("score", self.versus)
        part = f", over {self.n} of {self.most} questions" if self.n < self.most else ""
        return f"{self.task} {self.ours:.2f} against {self.theirs:.2f} ({shown}{part})"


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
    """A sentence for each method, those of which the same is to be said named together; and what does not count."""
    found: dict[str, list[str]] = {}
    for way in summary.results.ways:
        if way not in PLAIN:
            found.setdefault(_sentence(way, summary), []).append(way)
    for words, ways in found.items():
        yield f"{', '.join(ways)}: {words}."
    if found and (hard := [task.name for task in summary.tasks if _too_hard(task)]):
        yield f"Scores that do not count here, since the unextended model fails in its own window: {', '.join(hard)}."


def _retrievals(way: str, summary: Summary, *, losses: bool = False) -> list[Retrieval]:
    """Each task that both were asked past the window: by score, but for those too hard for the model; or by loss."""
    tasks = [task for task in summary.tasks if losses or not _too_hard(task)]
    return [found for task in tasks if (found := _retrieval(way, task, summary, losses)) is not None]


def _retrieval(way: str, task: Task, summary: Summary, losses: bool) -> Retrieval | None:
    n_ctx = summary.results.n_ctx_orig
    values: dict[str, dict[str, float]] = {}
    for a in summary.results.answers[task.name]:
        value = a.loss if losses else a.score
        if n_ctx is not None and a.length > n_ctx and value is not None:
            values.setdefault(a.way, {})[f"{a.length}/{a.sample}"] = value
    rows = _common(way, {task.name: values})
    if not rows:
        return None
    ours, theirs = (fmean(rows[name][task.name].values()) for name in (way, "truncate"))
    n, most = len(rows[way][task.name]), len(set().union(*values.values()))
    return Retrieval(task.name, ours, theirs, versus(rows, way, "truncate", signs=not losses), n, most)


def _common(way: str, texts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Rows:
    """What the way and truncate both have, {way: {text: {block or sample: value}}}; empty where that is nothing."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for text, ways in texts.items():
        for key in sorted(ways.get(way, {}).keys() & ways.get("truncate", {}).keys()):
            for name in (way, "truncate"):
                rows.setdefault(name, {}).setdefault(text, {})[key] = ways[name][key]
    return rows


def _too_hard(task: Task) -> bool:
    return task.base is not None and task.base < GATE


def _sentence(way: str, summary: Summary) -> str:
    perplexity, beats = _perplexity(way, summary)
    found = _retrievals(way, summary)
    more, alike, less = ("; ".join(r.words() for r in found if r.sign == sign) for sign in (1, 0, -1))
    if more:
        retrieves = f"{'and' if beats else 'but'} it retrieves what truncate cannot: {more}"
    elif found:
        retrieves = f"{'but' if beats else 'and'} nothing here shows that it retrieves what truncate cannot"
    else:
        retrieves = "and no task here tells whether it retrieves what truncate cannot"
    others = [f"not told apart from truncate: {alike}"] * bool(alike) + [f"retrieves less: {less}"] * bool(less)
    for sign, word in ((-1, "likelier"), (1, "less likely")):
        if said := [r.words() for r in _retrievals(way, summary, losses=True) if r.sign == sign]:
            others.append(f"right answers are {word} than for truncate (nats a token): {', '.join(said)}")
    return "; ".join([f"{perplexity}, {retrieves}", *others])


def _perplexity(way: str, summary: Summary) -> tuple[str, bool]:
    """What is known of its perplexity past the window, over what both have read, and whether it beats truncation's."""
    past = summary.past
    if past is None:
        return f"{_NOT} ({'no text reaches there' if summary.ppl else 'it was not measured'})", False
    texts = {
        text: {
            name: {str(at): loss for at, loss in blocks.items() if past.start <= at < past.end}
            for name, blocks in ways.items()
        }
        for text, ways in summary.results.ppl.items()
    }
    rows = _common(way, texts)
    if not rows:
        lacking = next((name for name in ("truncate", way) if name not in past.values), "no text by both")
        return f"{_NOT} ({lacking} was {'' if lacking.startswith('no') else 'not '}measured there)", False
    its = versus(rows, way, "truncate", signs=False)
    if its.interval is None:
        return f"{_NOT} (under {FEWEST} pairs of blocks)", False
    n, whole = (sum(map(len, each)) for each in (rows[way].values(), _every(texts)))
    part = f", over the {n} of {whole} blocks that both have read" if n < whole else ""
    if its.real and its.interval.high < 0:
        return f"beats truncate at perplexity past the window ({difference('ppl', its)}{part})", True
    sure = "worse" if its.real else "not told apart"
    return f"does not beat truncate at perplexity past the window ({difference('ppl', its)}: {sure}{part})", False


def _every(texts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[set[str]]:
    """Of each text, the blocks that any way has."""
    return [set().union(*ways.values()) for ways in texts.values()]
