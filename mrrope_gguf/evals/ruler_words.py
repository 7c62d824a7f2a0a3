"""RULER's aggregation tasks: the most common words of a numbered list, the most frequent words of a coded text.

Source: RULER (arXiv 2404.06654), tasks cwe and fwe. Unlike there, the words of cwe's example are none of its list's,
and the words of the list run out with an error instead of another, unlicensed list.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from ..errors import Refused
from .samples import Job, Pieces, Sample, Tokens, flat
from .wordlists import all_words

CWE_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
CWE_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
SHORT = 4096  # below this length words are repeated less

FWE_INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"
LETTERS = 6
ALPHA = 2.0
ZETA = math.pi**2 / 6  # zeta(ALPHA)


def cwe(job: Job) -> Sample:
    """A solved list, then one of 10 words that come 30 times and others that come 3 times (below 4096: 6 and 1).

    Raises Refused if the budget cannot hold one other word, or the word list cannot fill it; MrropeError without
    wonderwords.
    """
    rng = job.rng()
    words = all_words()
    words = tuple(rng.sample(words, len(words)))
    n, often, seldom = (20, 3, 1) if job.length < SHORT else (40, 10, 3)
    question, answer = job.pieces(CWE_QUESTION), job.pieces(CWE_ANSWER)
    solved = " " + " ".join(f"{i}. {word}" for i, word in enumerate(words[:COMMON], 1))
    head = (
        *job.pieces.start(CWE_INTRO),
        *_numbered(job.pieces, rng, words[:n], often, seldom),
        *question, *answer, *job.pieces(solved), *job.pieces("\n" + CWE_INTRO),
    )  # fmt: skip
    words, (often, seldom) = words[n:], (6, 1) if job.length < SHORT else (30, 3)
    n, unit = _how_many(job, words, often, seldom, job.room(head, question, answer))
    hay = _numbered(job.pieces, rng, words[:n], often, seldom)
    return job.sample(chain(head, hay), question, answer, words[:COMMON], unit=unit)


def _numbered(pieces: Pieces, rng: random.Random, words: Sequence[str], often: int, seldom: int) -> Iterator[int]:
    """The list's tokens: the first 10 words `often` times each, the others `seldom` times, shuffled and numbered."""
    listed = [word for i, word in enumerate(words) for _ in range(often if i < COMMON else seldom)]
    rng.shuffle(listed)
    return flat(chain.from_iterable((_number(pieces, i), pieces(" " + word)) for i, word in enumerate(listed, 1)))


def _number(pieces: Pieces, i: int) -> Tokens:
    return pieces(f"{'' if i == 1 else ' '}{i}.")


def _how_many(job: Job, words: Sequence[str], often: int, seldom: int, room: int) -> tuple[int, int]:
    """The number of words whose list fits in `room` tokens, and the tokens that one word more would take."""
    used = listed = 0
    for n, word in enumerate(words):
        times = often if n < COMMON else seldom
        cost = times * len(job.pieces(" " + word))
        cost += sum(len(_number(job.pieces, i)) for i in range(listed + 1, listed + times + 1))
        if used + cost > room:
            if n <= COMMON:
                raise job.too_short(job.length - room + used + cost)
            return n, cost
        used += cost
        listed += times
    raise Refused(
        f"{job.task}: no list of {job.length} tokens can be made",
        why=f"all {len(words)} words there are, {seldom} times each, are {job.length - room + used} tokens",
        fix="ask for a shorter length, or leave this task out",
    )


def fwe(job: Job) -> Sample:
    """Random words of 6 letters whose frequencies fall with the square of their rank; the answer is ranks 2 to 4.

    The most frequent word is written `...`. Raises Refused if the budget is too short for ranks 4 and 5 to differ.
    """
    rng = job.rng()
    vocabulary = ["...", *_coded(rng, job.length // 50 - 1)]
    head, question, answer = job.pieces.start(FWE_INTRO), job.pieces(FWE_QUESTION), job.pieces(FWE_ANSWER)
    words = [job.pieces(" " + word) for word in vocabulary]
    room = job.room(head, question, answer)

    def cost(n: int) -> int:
        return sum(times * len(word) for times, word in zip(frequencies(n, len(words)), words, strict=True))

    n = _greatest(lambda n: cost(n) <= room, 2 * room + 64)
    times = frequencies(n, len(words))
    if not _decided(times):
        enough = next((more for more in range(n, n + 64) if _decided(frequencies(more, 5))), n)
        raise job.too_short(max(job.length - room + cost(enough), 250))
    text = [word for word, each in zip(words, times, strict=True) for _ in range(each)]
    rng.shuffle(text)
    return job.sample(chain(head, flat(text)), question, answer, vocabulary[1:4], unit=cost(n + 1) - cost(n))


def frequencies(n: int, vocabulary: int) -> list[int]:
    """How often each rank comes in a text of about `n` words: n / (rank^2 zeta(2)), rounded down."""
    return [int(n * rank**-ALPHA / ZETA) for rank in range(1, vocabulary + 1)]


def _decided(times: Sequence[int]) -> bool:
    """Whether the ranks asked for, 2 to 4, are more frequent than any other but the first."""
    return len(times) > 4 and times[3] > times[4]


def _greatest(fits: Callable[[int], bool], limit: int) -> int:
    """The greatest n below `limit` that fits, found by halving; 0 fits, and what fits a number fits a smaller one."""
    low, high = 0, max(limit, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _coded(rng: random.Random, n: int) -> list[str]:
    """`n` different words of random letters."""
    found = rng.sample(range(26**LETTERS), max(n, 0))
    return ["".join(string.ascii_lowercase[word // 26**i % 26] for i in range(LETTERS)) for word in found]
