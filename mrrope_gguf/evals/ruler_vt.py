"""RULER's variable tracking: one chain of assignments in noise, one solved example before it.

Source: RULER (arXiv 2404.06654), task vt: 1 chain, 4 hops, names of 5 letters, of 3 in the example. Unlike there, the
names of one sample all differ.
"""

from __future__ import annotations

import random
import string
from itertools import chain, pairwise, repeat

from .ruler_niah import NOISE
from .samples import Job, Pieces, Sample, Tokens, fill, flat, insert

INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assigned "
    "the value {value}, they are: "
)
HOPS = 4
EXAMPLE = 500  # tokens of the example's text and question at most


def vt(job: Job) -> Sample:
    """Noise with `VAR A = 12345`, `VAR B = VAR A`, ... in this order; the answer is every name.

    Raises Refused if the chain and the example do not fit in the budget.
    """
    rng = job.rng()
    names, value = _names(rng, 5), _value(rng)
    head = (*_example(job.pieces, rng), *job.pieces("\n\n" + INTRO))
    question, answer = _ask(job.pieces, value)
    statements = _statements(job.pieces, names, value)
    left = job.room(head, question, answer, *statements)
    units, unit = fill(repeat(job.pieces("\n" + NOISE)), left)
    if len(units) < len(statements):
        raise job.too_short(job.length - left + unit * len(statements))
    text, starts = _scatter(rng, units, statements)
    positions = [len(head) + start for start in starts]
    return job.sample(chain(head, flat(text)), question, answer, names, positions=positions, unit=unit)


def _example(pieces: Pieces, rng: random.Random) -> Tokens:
    """A solved text of its own: EXAMPLE tokens at most, unless one line of noise a statement takes more."""
    names, value = _names(rng, 3), _value(rng)
    statements = _statements(pieces, names, value)
    parts = (pieces.start(INTRO), *_ask(pieces, value), *statements)
    noise = pieces("\n" + NOISE)
    n = max(len(statements), (EXAMPLE - sum(map(len, parts))) // len(noise))
    text, _ = _scatter(rng, [noise] * n, statements)
    head, question, answer = parts[:3]
    return (*head, *flat(text), *question, *answer, *pieces(" " + " ".join(names)))


def _statements(pieces: Pieces, names: list[str], value: str) -> list[Tokens]:
    """The chain, a line each; all but the first end in a space, as RULER's do."""
    said = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    return [pieces("\n" + line) for line in said]


def _scatter(rng: random.Random, units: list[Tokens], statements: list[Tokens]) -> tuple[list[Tokens], list[int]]:
    """The statements at random places among the units, in their order, and where they begin."""
    indices = sorted(rng.sample(range(len(units)), len(statements)))
    return insert(units, list(zip(indices, statements, strict=True)))


def _ask(pieces: Pieces, value: str) -> tuple[Tokens, Tokens]:
    return pieces(QUESTION.format(value=value)), pieces(ANSWER.format(n=HOPS + 1, value=value))


def _names(rng: random.Random, letters: int) -> list[str]:
    """HOPS + 1 different names."""
    found = rng.sample(range(26**letters), HOPS + 1)
    return ["".join(string.ascii_uppercase[name // 26**i % 26] for i in range(letters)) for name in found]


def _value(rng: random.Random) -> str:
    return str(rng.randrange(10000, 99999))
