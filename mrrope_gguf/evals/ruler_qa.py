"""RULER's question answering: a question's own paragraphs among others of the same file, SQuAD's or HotpotQA's.

Source: RULER (arXiv 2404.06654), tasks qa_1 (SQuAD) and qa_2 (HotpotQA). The data are their owners': bring the JSON.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import FileTrouble, MrropeError
from .samples import Job, Pieces, Sample, Tokens, flat

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
INTRO = f"{ORDER}\n\nThe following are given documents.\n\n"
QUESTION = f"\n\n{ORDER}\n\nQuestion: {{query}}"
ANSWER = " Answer:"


@dataclass(frozen=True)
class Question:
    """needed, near: indices of the documents that hold the answer, and of others of the same article."""

    query: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents:
    """Every paragraph of a file once, sorted, and its questions in their order."""

    texts: tuple[str, ...]
    questions: tuple[Question, ...]


def qa(job: Job, documents: Documents) -> Sample:
    """The job's question among as many documents as its budget holds, shuffled.

    Raises Refused if the question's own documents do not fit.
    """
    rng = job.rng()
    asked = documents.questions[job.index]
    head, answer = job.pieces.start(INTRO), job.pieces(ANSWER)
    question = job.pieces(QUESTION.format(query=asked.query))
    room = job.room(head, question, answer)
    chosen, unit = _choose(job, documents, asked, list(_order(rng, documents, asked)), room)
    rng.shuffle(chosen)
    hay = [(_header(job.pieces, i), job.pieces(documents.texts[each])) for i, each in enumerate(chosen, 1)]
    tags = {"documents": f"{len(chosen)} of {len(documents.texts)}"}
    context = chain(head, flat(chain.from_iterable(hay)))
    return job.sample(context, question, answer, dict.fromkeys(asked.answers), unit=unit, tags=tags)


def _order(rng: random.Random, documents: Documents, asked: Question) -> Iterator[int]:
    """Every document once, the one needed most first: the question's own, its article's, the others."""
    near = [i for i in asked.near if i not in asked.needed]
    first = {*asked.needed, *near}
    others = [i for i in range(len(documents.texts)) if i not in first]
    yield from asked.needed
    yield from rng.sample(near, len(near))
    yield from rng.sample(others, len(others))


def _choose(job: Job, documents: Documents, asked: Question, order: list[int], room: int) -> tuple[list[int], int]:
    """The first documents that fit, and the tokens of the next; those of the whole budget where there is no next."""
    for n, each in enumerate(order):
        cost = len(_header(job.pieces, n + 1)) + len(job.pieces(documents.texts[each]))
        if cost > room:
            if n < len(asked.needed):
                raise job.too_short(job.length - room + cost)
            return order[:n], cost
        room -= cost
    return order, job.length


def _header(pieces: Pieces, i: int) -> Tokens:
    return pieces(f"{'' if i == 1 else chr(10) * 2}Document {i}:\n")


def squad(path: Path) -> Documents:
    """A file in SQuAD's format, v1.1 or v2.0; questions without an answer are left out. Raises as `hotpotqa` does."""
    return _read(path, "SQuAD", _squad)


def hotpotqa(path: Path) -> Documents:
    """A file in HotpotQA's format. Raises FileTrouble if it cannot be read, MrropeError if it is no such file."""
    return _read(path, "HotpotQA", _hotpotqa)


def _read(path: Path, name: str, take: Callable[[Any], Documents]) -> Documents:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileTrouble(f"{path}: cannot be read", why=str(error), fix=f"name a JSON file of {name}") from error
    except ValueError as error:
        raise MrropeError(f"{path}: not JSON", why=str(error), fix=f"name a JSON file of {name}") from error
    try:
        documents = take(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise MrropeError(f"{path}: not in {name}'s format", why=why, fix=f"name a JSON file of {name}") from error
    if not documents.questions:
        raise MrropeError(f"{path}: no question with an answer", why="it holds none", fix=f"name a file of {name}")
    return documents


def _squad(data: Any) -> Documents:
    articles = [article["paragraphs"] for article in data["data"]]
    place = _places(paragraph["context"] for article in articles for paragraph in article)
    questions = [
        Question(
            each["question"],
            tuple(answer["text"] for answer in each["answers"]),
            (place[paragraph["context"]],),
            tuple(place[other["context"]] for other in article if other is not paragraph),
        )
        for article in articles
        for paragraph in article
        for each in paragraph["qas"]
        if each["answers"]
    ]
    return Documents(tuple(place), tuple(questions))


def _hotpotqa(data: Any) -> Documents:
    contexts = [[f"{title}\n{''.join(said)}" for title, said in each["context"]] for each in data]
    place = _places(chain.from_iterable(contexts))
    questions = [
        Question(each["question"], (each["answer"],), tuple(dict.fromkeys(place[text] for text in context)))
        for each, context in zip(data, contexts, strict=True)
    ]
    return Documents(tuple(place), tuple(questions))


def _places(texts: Iterator[str]) -> dict[str, int]:
    return {text: i for i, text in enumerate(sorted(set(texts)))}
