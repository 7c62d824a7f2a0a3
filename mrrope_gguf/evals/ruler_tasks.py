"""RULER's 13 tasks, of which 11 need nothing that may not be passed on: "RULER-11 (offline)".

Source: RULER (arXiv 2404.06654). A task's length counts the tokens of its answer too. Sample i of a run is made from
the seed `seed + i` alone, which it carries, so that any one can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ..errors import MrropeError
from .essay import Essay
from .ruler_niah import KINDS, niah
from .ruler_qa import Documents, qa
from .ruler_vt import vt
from .ruler_words import cwe, fwe
from .samples import Job, Pieces, Sample, Tokenizer

SAMPLES = 500
SEED = 42


@dataclass(frozen=True)
class Task:
    """generate: tokens of the answer; needs: essay, documents or nothing of the user's."""

    generate: int
    metric: str = "string_match_all"
    needs: str = ""


TASKS: dict[str, Task] = {
    **{name: Task(128, needs="essay" if kind.haystack == "essay" else "") for name, kind in KINDS.items()},
    "vt": Task(30),
    "cwe": Task(120),
    "fwe": Task(50),
    "qa_1": Task(32, "string_match_part", "documents"),
    "qa_2": Task(32, "string_match_part", "documents"),
}
OFFLINE = tuple(name for name, task in TASKS.items() if task.needs != "documents")
CORE = tuple(name for name, task in TASKS.items() if not task.needs)


def ruler(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    *,
    n: int = SAMPLES,
    seed: int = SEED,
    essay: Essay | None = None,
    documents: Documents | None = None,
) -> Iterator[Sample]:
    """`n` samples of one task (or all the questions `documents` has), each of at most `length` tokens, answer included.

    essay: for the tasks that hide needles in prose. documents: for qa_1 (`ruler_qa.squad`) and qa_2 (`hotpotqa`).
    Raises MrropeError for a task that is none or lacks what it needs, Refused if `length` is too short for it.
    """
    facts = find(task)
    build = _builder(task, essay, documents)
    pieces = Pieces(tokenizer)
    if documents and facts.needs == "documents":
        n = min(n, len(documents.questions))
    return (build(Job(pieces, task, facts.metric, length, facts.generate, seed + i, i)) for i in range(n))


def find(task: str) -> Task:
    """The task of that name. Raises MrropeError that lists the names there are."""
    if task not in TASKS:
        raise MrropeError(f"{task}: no such task of RULER", why="they are " + ", ".join(TASKS), fix="name one of them")
    return TASKS[task]


def _builder(task: str, essay: Essay | None, documents: Documents | None) -> Callable[[Job], Sample]:
    if task in KINDS:
        return partial(niah, kind=KINDS[task], essay=essay)
    if task in ("vt", "cwe", "fwe"):
        return {"vt": vt, "cwe": cwe, "fwe": fwe}[task]
    if documents is None:
        raise MrropeError(
            f"{task}: no documents to ask about",
            why="SQuAD and HotpotQA may not be passed on with this program",
            fix=f"download {'SQuAD' if task == 'qa_1' else 'HotpotQA'}'s JSON file and name it",
        )
    return partial(qa, documents=documents)
