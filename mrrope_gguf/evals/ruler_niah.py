"""RULER's eight needle tasks: what is hidden in what, how it is asked for.

Source: RULER (arXiv 2404.06654), tasks niah_single, niah_multikey, niah_multivalue, niah_multiquery. Unlike there, keys
and numbers of one haystack all differ, so that every question has one answer.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

from ..errors import MrropeError
from .essay import Essay
from .samples import Job, Pieces, Sample, Tokens, fill, flat, insert
from .wordlists import word_keys

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."
INTRO = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards."
)
QUESTION = "\nWhat are all the special magic {type} for {query} mentioned in the provided text?"
ANSWER = " The special magic {type} for {query} mentioned in the provided text are"
# the same for one value of one key
INTRO_ONE = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards."
)
QUESTION_ONE = "\nWhat is the special magic {type} for {query} mentioned in the provided text?"
ANSWER_ONE = " The special magic {type} for {query} mentioned in the provided text is"
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent; an essay's needles stand at some of these


@dataclass(frozen=True)
class Kind:
    """haystack: noise, essay or needle (every sentence a distractor); keys, values a key, keys asked for; types."""

    haystack: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_type: str = "words"
    value_type: str = "numbers"


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", value_type="uuids"),
    "niah_multikey_1": Kind("essay", keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", key_type="uuids", value_type="uuids"),
    "niah_multivalue": Kind("essay", values=4),
    "niah_multiquery": Kind("essay", keys=4, queries=4),
}


def numbers(rng: random.Random, n: int) -> list[str]:
    """`n` different numbers of 7 digits."""
    return [str(number) for number in rng.sample(range(10**6, 10**7), n)]


def uuids(rng: random.Random, n: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(n)]


DRAW: dict[str, Callable[[random.Random, int], list[str]]] = {"words": word_keys, "numbers": numbers, "uuids": uuids}


def niah(job: Job, kind: Kind, essay: Essay | None = None, depth: float | None = None) -> Sample:
    """One haystack with its needles, and the question for `kind.queries` of its keys.

    depth: percent of the haystack's sentences before the needles, in place of depths drawn at random.
    Raises Refused if the needles do not fit in the budget, MrropeError if an essay is needed and none given.
    """
    rng = job.rng()
    keys = DRAW[kind.key_type](rng, kind.keys)
    values = DRAW[kind.value_type](rng, kind.keys * kind.values)
    of_key = {key: values[i * kind.values : (i + 1) * kind.values] for i, key in enumerate(keys)}
    asked = rng.sample(keys, kind.queries)
    written = [(key, value) for key in keys for value in of_key[key]]
    rng.shuffle(written)
    parts = _frame(job.pieces, kind, asked)
    hay = _essay if kind.haystack == "essay" else _lines
    context, starts, unit = hay(job, rng, kind, written, job.room(*parts), essay, depth)
    found = [start for start, (key, _) in zip(starts, written, strict=True) if key in asked]
    return job.sample(
        chain(parts[0], flat(context)),
        parts[1],
        parts[2],
        [value for key in asked for value in of_key[key]],
        positions=[len(parts[0]) + start for start in found],
        unit=unit,
        tags=essay.tags if essay and kind.haystack == "essay" else None,
    )


def _frame(pieces: Pieces, kind: Kind, asked: Sequence[str]) -> tuple[Tokens, Tokens, Tokens]:
    """The template around the haystack, in the singular where one value is asked for."""
    one = kind.queries * kind.values == 1
    type_ = kind.value_type[:-1] if one else kind.value_type
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    intro, question, answer = (INTRO_ONE, QUESTION_ONE, ANSWER_ONE) if one else (INTRO, QUESTION, ANSWER)
    end = "\n" if kind.haystack == "essay" else ""  # lines bring their own line breaks
    return (
        pieces.start(intro.format(type=type_) + end),
        pieces(question.format(type=type_, query=query)),
        pieces(answer.format(type=type_, query=query)),
    )


Hay = tuple[list[Tokens], list[int], int]  # the units with needles, where these begin, the unit that did not fit


def _lines(
    job: Job, rng: random.Random, kind: Kind, written: list[tuple[str, str]], room: int, _: object, depth: float | None
) -> Hay:
    """Noise, or needles nobody asks for, a line each."""
    needles = [job.pieces("\n" + _needle(kind, *needle)) for needle in written]
    left = room - sum(map(len, needles))
    if kind.haystack == "noise":
        units, unit = fill(repeat(job.pieces("\n" + NOISE)), left)
    else:
        units, unit = fill(_distractors(job, rng, kind, written, left), left)
    if len(units) < len(needles):
        raise job.too_short(job.length - left + unit * len(needles))
    indices = (
        sorted(rng.sample(range(len(units)), len(needles))) if depth is None else [_at(units, depth)] * len(needles)
    )
    return *insert(units, list(zip(indices, needles, strict=True))), unit


def _distractors(
    job: Job, rng: random.Random, kind: Kind, written: list[tuple[str, str]], room: int
) -> Iterator[Tokens]:
    """Needles with keys and values of their own, twice as many as the budget should hold."""
    least = len(job.pieces("\n" + _needle(kind, "", "")))
    n = 2 * max(room, 0) // least + 2
    taken_keys, taken_values = {key for key, _ in written}, {value for _, value in written}
    keys = (key for key in DRAW[kind.key_type](rng, n + len(written)) if key not in taken_keys)
    values = (value for value in DRAW[kind.value_type](rng, n + len(written)) if value not in taken_values)
    for key, value in islice(zip(keys, values, strict=False), n):
        yield job.pieces("\n" + _needle(kind, key, value))


def _essay(
    job: Job,
    rng: random.Random,
    kind: Kind,
    written: list[tuple[str, str]],
    room: int,
    essay: Essay | None,
    depth: float | None,
) -> Hay:
    """Sentences of prose, the last one cut where the budget ends; needles between sentences."""
    if essay is None:
        raise MrropeError(
            f"{job.task}: no essay to hide needles in",
            why="RULER's own essays may not be passed on",
            fix="name a text of `mrrope texts`, or a file of your own",
        )
    needles = [job.pieces(" " + _needle(kind, *needle)) for needle in written]
    left = room - sum(map(len, needles))
    if left < 0:
        raise job.too_short(job.length - left)
    depths = sorted(rng.sample(DEPTHS, len(needles))) if depth is None else [depth] * len(needles)
    for gap in ("", " "):  # the first sentence has a space before it where a needle comes first
        units, unit = sentences(job.pieces, essay, left, gap)
        indices = [_at(units, each) for each in depths]
        if indices[0]:
            break
    if len(units) < len(needles):
        raise job.too_short(job.length - left + sum(map(len, units)) + unit)
    return *insert(units, list(zip(indices, needles, strict=True))), unit


def sentences(pieces: Pieces, essay: Essay, room: int, gap: str = "") -> tuple[list[Tokens], int]:
    """The first sentences that fit in `room` tokens, and the size of the word that did not. gap: before the first."""
    units: list[Tokens] = []
    for sentence in essay.endless():
        unit = pieces(gap + sentence)
        if len(unit) <= room and unit:
            units.append(unit)
            room -= len(unit)
            gap = " "
            continue
        first, *rest = sentence.split(" ")
        words, missing = fill((pieces(gap + first), *(pieces(" " + word) for word in rest)), room)
        if words:
            units.append(tuple(flat(words)))
        return units, missing or len(unit)  # cut into words it may fit where the whole, by a token, did not
    return units, 0


def _needle(kind: Kind, key: str, value: str) -> str:
    return NEEDLE.format(type=kind.value_type, key=key, value=value)


def _at(units: Sequence[Tokens], depth: float) -> int:
    return int(len(units) * depth / 100)
