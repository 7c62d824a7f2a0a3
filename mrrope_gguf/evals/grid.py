"""A needle at every depth of every length: prompts that share their beginnings.

Source: RULER (arXiv 2404.06654) for needle, question and noise, as in `needles`. Prompts are concatenations of tokens,
so that what two of them share is the same tokens: all cells of a grid have one haystack, the longest, and part from
each other where the first needle of the two stands.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any

from .needles import INTRO, KEYS, NEEDLE, NOISE, QUESTION, sentence_tokens, tokens_of
from .trie import Prompt

# between sentences; the end of a sentence is where a needle may stand
ENDS = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Cell:
    """One needle in one haystack. `position` is that of the needle's first token; `tokens` end with the question."""

    length: int
    depth: float
    key: str
    value: str
    position: int
    tokens: tuple[int, ...]
    answer: tuple[int, ...]

    def prompt(self, generate: int = 0) -> Prompt:
        """The cell for `trie.run`: the loss of the answer, and a text of `generate` tokens."""
        return Prompt(self.tokens, self.answer, generate)


def needle_grid(
    llm: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    generate: int = 0,
    prose: str | None = None,
    seed: int = 42,
) -> list[Cell]:
    """A cell for each length and depth, lengths first.

    lengths: in tokens, of prompt and what follows it: the answer, or `generate` tokens if they are more.
    depths: shares of the haystack from 0 to 1 before the needle, which moves back from there to a sentence end.
    prose: taken from its first sentence on, line breaks taken out; None is noise, over and over.
    Each cell has a key and a seven-digit value of its own, drawn from seed, length and depth.
    Raises ValueError for a depth outside 0 to 1, a length too short for the needle, and prose that is too short.
    """
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise ValueError(f"a depth lies between 0 and 1, got {wrong[0]}")
    intro = tokens_of(llm, INTRO, start=True)
    fill = _sentences(llm, max(lengths, default=0) - len(intro), prose)
    return [_cell(llm, intro, fill, length, depth, generate, seed) for length in lengths for depth in depths]


def _cell(
    llm: Any, intro: list[int], fill: list[list[int]], length: int, depth: float, generate: int, seed: int
) -> Cell:
    rng = random.Random(f"{seed} {length} {depth}")
    key, value = rng.choice(KEYS), str(rng.randint(10**6, 10**7 - 1))
    needle = tokens_of(llm, " " + NEEDLE.format(key=key, value=value))
    question = tokens_of(llm, QUESTION.format(key=key))
    answer = tokens_of(llm, " " + value)
    room = length - len(intro) - len(needle) - len(question) - max(len(answer), generate)
    ends = [0, *accumulate(map(len, fill))]
    n_sentences = max((i for i, end in enumerate(ends) if end <= room), default=0)
    if not n_sentences:
        raise ValueError(f"{length} tokens have no room for a needle, its question and a sentence")
    if n_sentences == len(fill):
        raise ValueError(f"the prose is too short for a haystack of {room} tokens: it has {ends[-1]}")
    before = max(i for i in range(n_sentences + 1) if ends[i] <= depth * ends[n_sentences])
    head = [*intro, *(token for sentence in fill[:before] for token in sentence)]
    tail = [token for sentence in fill[before:n_sentences] for token in sentence]
    tokens = (*head, *needle, *tail, *question)
    return Cell(length, depth, key, value, len(head), tokens, tuple(answer))


def _sentences(llm: Any, room: int, prose: str | None) -> list[list[int]]:
    """The first sentences, until one is past `room` tokens or the prose ends: a haystack's last one is then whole."""
    texts = ENDS.split(NOISE) if prose is None else ENDS.split(prose)
    found: list[list[int]] = []
    for text in cycle(texts) if prose is None else texts:
        found.append(sentence_tokens(llm, text))
        room -= len(found[-1])
        if room < 0:
            break
    return found
