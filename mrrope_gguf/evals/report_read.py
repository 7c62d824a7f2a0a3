"""A results file as what it measured: losses of blocks by text and way, and answers by task.

A line that was cut off, or that is not what its task has, costs itself alone and is counted. Nothing here is trusted:
the file may come from someone else, and what a model said stands in it as it said it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadFile, FileTrouble
from .identity import HEAD, head_of
from .runlog import parse
from .ways import known

BLOCK = 256  # positions whose mean loss is one number
NAME = "results.jsonl"
Losses = dict[str, dict[str, dict[int, float]]]  # {text: {way: {first position of a block: mean}}}


@dataclass(frozen=True)
class Answer:
    """One sample of a task: `depth` in per cent, `score` and `rouge1` from 0 to 1, `loss` in nats a token.

    tags: what its score must be named with, such as {"essay": "pd"}.
    """

    task: str
    way: str
    length: int
    sample: str
    score: float
    depth: float | None = None
    exact: bool | None = None
    rouge1: float | None = None
    loss: float | None = None
    said: str = ""
    expected: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """What one results file holds. `others`: lines by a task that has no score; `skipped`: lines that say nothing."""

    head: Mapping[str, Any]
    ppl: Losses
    kl: Losses
    answers: Mapping[str, list[Answer]]
    others: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0

    @property
    def ways(self) -> list[str]:
        """Every way that was measured: in the order of ways.known(), so that reports can be laid side by side."""
        losses = (way for kind in (self.ppl, self.kl) for ways in kind.values() for way in ways)
        met = dict.fromkeys([*losses, *(a.way for many in self.answers.values() for a in many)])
        order = {way: i for i, way in enumerate(known())}
        return sorted(met, key=lambda way: order.get(way, len(order)))

    @property
    def n_ctx_orig(self) -> int | None:
        """The model's own context, None where the head does not say."""
        n = _dict(self.head.get("model")).get("n_ctx_orig")
        return n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else None

    def mode(self, way: str) -> str:
        """A: one S for every length; B: S by length; C: elastic; empty for a model as it is."""
        if way in ("none", "truncate"):
            return ""
        if way.endswith("@B"):
            return "B"
        kind = _dict(_dict(self.head.get("ways")).get(way)).get("kind")
        return "C" if way.split(":")[0] == "elastic" or kind == "elastic" else "A"


def read(directory: str | Path) -> Results:
    """The results in `directory`/results.jsonl; of runs with one name the first holds.

    Raises FileTrouble if there is no such file or it cannot be read, BadFile if no line of it is a result, or one was
    changed since it was written.
    """
    path = Path(directory) / NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileTrouble(
            f"{path}: no results to report",
            why=error.strerror or str(error),
            fix="name the folder that `mrrope eval ... --out DIR` wrote to",
        ) from None
    found, broken = parse(data, path)
    runs: dict[str, dict[str, Any]] = {}
    for run in found:
        runs.setdefault(run["run"], run)
    cells = {key: run for key, run in runs.items() if key != HEAD and not key.startswith(f"{HEAD}/")}
    results = _results(head_of(runs) or {}, cells, broken)
    if not (results.ppl or results.kl or results.answers or results.others):
        raise BadFile(
            f"{path}: no results to report",
            why=f"it has {len(found) + broken} lines and not one finished result ({results.skipped} are no results)",
            fix="let `mrrope eval ... --out DIR` finish a first cell",
        )
    return results


def _results(head: dict[str, Any], runs: Mapping[str, dict[str, Any]], skipped: int) -> Results:
    passes: dict[str, list[tuple[str, str, int, int, list[float]]]] = {"ppl": [], "kl": []}
    answers: dict[str, list[Answer]] = {}
    others: Counter[str] = Counter()
    for key, run in runs.items():
        task = run.get("task")
        try:
            if not isinstance(task, str) or not task:
                raise ValueError("a result names its task")
            if task in passes:
                passes[task].append(_pass(run))
            elif "score" in run:
                answers.setdefault(task, []).append(_answer(key, task, run))
            else:
                others[task] += 1
        except (ValueError, TypeError, KeyError, OverflowError):
            skipped += 1
    return Results(head, _losses(passes["ppl"]), _losses(passes["kl"]), answers, dict(others), skipped)


def _pass(run: Mapping[str, Any]) -> tuple[str, str, int, int, list[float]]:
    start, end = _whole(run["start"]), _whole(run["end"])
    blocks = [_number(value) for value in _list(run["blocks"])]
    if len(blocks) not in (math.ceil((end - start) / BLOCK), (end - start) // BLOCK) or not blocks:
        raise ValueError(f"{len(blocks)} blocks are not those of {end - start} positions")
    return _text(run["text"]), _text(run["way"]), start, end, blocks


def _losses(passes: Iterable[tuple[str, str, int, int, list[float]]]) -> Losses:
    """Blocks by position. Where several passes read one, the shortest counts: S = L / n_ctx_orig is its own length's.

    A last block of less than half as many positions as the others is left out.
    """
    found: Losses = {}
    for text, way, start, end, blocks in sorted(passes, key=lambda each: each[3]):
        kept = found.setdefault(text, {}).setdefault(way, {})
        for at, mean in zip(_starts(start, end), blocks, strict=False):
            kept.setdefault(at, mean)
    return found


def _starts(start: int, end: int) -> Iterator[int]:
    return (at for at in range(start, end, BLOCK) if end - at >= BLOCK // 2)


def _answer(key: str, task: str, run: Mapping[str, Any]) -> Answer:
    score = _number(run["score"])
    if not 0 <= score <= 1:
        raise ValueError(f"a score lies between 0 and 1, not at {score}")
    expected = run.get("expected")
    return Answer(
        task, _text(run["way"]), _whole(run["length"]), key.rsplit("/", 1)[-1], score,
        depth=_maybe(run.get("depth")), exact=run["exact"] if isinstance(run.get("exact"), bool) else None,
        rouge1=_maybe(run.get("rouge1")), loss=_maybe(run.get("loss")), said=str(run.get("said") or ""),
        expected=tuple(map(str, expected)) if isinstance(expected, list) else (),
        tags={str(name): str(value) for name, value in _dict(run.get("tags")).items()},
    )  # fmt: skip


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _maybe(value: object) -> float | None:
    return None if value is None else _number(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no number of tokens")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no name")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a pass has a list of blocks")
    return value


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
