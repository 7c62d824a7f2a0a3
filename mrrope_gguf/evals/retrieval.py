"""InfiniteBench's retrieval tasks, generated: PassKey, Number and KV.

Source: InfiniteBench (arXiv 2402.13718), its templates for base models. A sample's length counts the tokens of its
answer too. KV may ask many questions of one JSON object: such samples share their prefix, and each names its own depth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, repeat

from ..errors import MrropeError
from .ruler_niah import uuids
from .samples import Job, Pieces, Sample, Tokenizer, Tokens, fill, flat, insert

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
PASSKEY_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n\n"
)
NUMBER_INTRO = PASSKEY_INTRO.replace("Find it and memorize them.", "Find it.")
NEEDLE = "The {name} is {key}. Remember it. {key} is the {name}.\n"
QUESTION = "\n\nWhat is the {name}?"
ANSWER = "\n\nThe {name} is"
KV_INTRO = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
KV_QUESTION = '\n\nKey: "{key}"'
KV_ANSWER = "\nThe value associated with the specified key is: "
SAMPLES = 20
SEED = 42


@dataclass(frozen=True)
class Task:
    """generate: tokens of the answer, as InfiniteBench has them."""

    generate: int
    metric: str


TASKS = {"passkey": Task(6, "first_integer"), "number": Task(12, "first_integer"), "kv": Task(50, "any_word")}


def retrieval(
    tokenizer: Tokenizer, task: str, length: int, *, n: int = SAMPLES, seed: int = SEED, questions: int = 1
) -> Iterator[Sample]:
    """`n` texts of one task, each of at most `length` tokens, their needles spread evenly from the first to the last.

    questions: asked of each text, KV alone; sample i * questions + q is question q of text i, and all of text i carry
    the seed `seed + i`. Raises MrropeError for a task that is none or bad numbers, Refused if `length` is too short.
    """
    if task not in TASKS:
        raise MrropeError(f"{task}: no such task", why="they are " + ", ".join(TASKS), fix="name one of them")
    if n < 1 or questions < 1 or (questions > 1 and task != "kv"):
        why = "a text holds one needle" if questions > 1 else "at least one text and one question"
        raise MrropeError(f"{task}: {n} texts, {questions} questions each", why=why, fix="ask for others")
    pieces, facts = Pieces(tokenizer), TASKS[task]
    jobs = (Job(pieces, task, facts.metric, length, facts.generate, seed + i, i) for i in range(n))
    if task == "kv":
        return chain.from_iterable(kv(job, n, questions) for job in jobs)
    return (hidden(job, job.index / max(n - 1, 1), *KEYS[task]) for job in jobs)


def passkey_digits(rng: random.Random) -> str:
    """5 digits, 0 first allowed."""
    return "".join(str(rng.randrange(10)) for _ in range(5))


def number_digits(rng: random.Random) -> str:
    """10 digits: five drawn, then five times one of them written twice, which makes runs such as 2200012222."""
    digits = [str(rng.randrange(10)) for _ in range(5)]
    for _ in range(5):
        at = rng.randrange(len(digits))
        digits.insert(at, digits[at])
    return "".join(digits)


Digits = Callable[[random.Random], str]
KEYS: dict[str, tuple[str, str, Digits]] = {
    "passkey": (PASSKEY_INTRO, "pass key", passkey_digits),
    "number": (NUMBER_INTRO, "sequence of digits", number_digits),
}


def hidden(job: Job, depth: float, intro: str, name: str, digits: Digits) -> Sample:
    """One needle in noise, `depth` (0 to 1) of the noise before it."""
    key = digits(job.rng())
    head, needle = job.pieces.start(intro), job.pieces(NEEDLE.format(name=name, key=key))
    question, answer = job.pieces(QUESTION.format(name=name)), job.pieces(ANSWER.format(name=name))
    left = job.room(head, needle, question, answer)
    units, unit = fill(repeat(job.pieces(NOISE)), left)
    if not units:
        raise job.too_short(job.length - left + unit)
    text, (start,) = insert(units, [(round(depth * len(units)), needle)])
    return job.sample(chain(head, flat(text)), question, answer, [key], positions=[len(head) + start], unit=unit)


def kv(job: Job, n: int, questions: int) -> Iterator[Sample]:
    """One JSON object of uuid pairs, and `questions` of its keys, evenly spread and moved on from text to text.

    The object leaves room for the longest question any of its keys would make.
    """
    rng = job.rng()
    head, end, answer = job.pieces.start(KV_INTRO), job.pieces("}"), job.pieces(KV_ANSWER)
    room = job.room(head, end, answer)
    made: list[tuple[str, str]] = []
    units: list[Tokens] = []
    used = longest = widest = over = 0
    for _ in range(room + 1):  # every pair takes a token at least
        key, value = uuids(rng, 2)
        unit = job.pieces(f'{", " if units else ""}"{key}": "{value}"')
        longest = max(longest, len(job.pieces(KV_QUESTION.format(key=key))))
        widest = max(widest, len(unit))
        over = used + len(unit) + longest
        if over > room:
            break
        units.append(unit)
        made.append((key, value))
        used += len(unit)
    if len(units) < questions:
        raise job.too_short(job.length - room + widest * questions + longest)
    prefix = (*head, *flat(units), *end)
    for q in range(questions):
        at = int(len(units) * (q + (job.index + 0.5) / n) / questions)
        key, value = made[at]
        question = job.pieces(KV_QUESTION.format(key=key))
        sample = job.sample(
            prefix,
            question,
            answer,
            [value],
            positions=[len(head) + sum(map(len, units[:at]))],
            unit=over - used - len(question),
        )
        yield replace(sample, index=job.index * questions + q)
