"""One question put to a model: prompt tokens in parts that other questions may share, and what is right.

Every generator of tasks makes a `Sample` through a `Job`. Prompts are built by joining the tokens of pieces of text, so
that two prompts which share their first pieces share their first tokens exactly; a scheduler computes those once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from ..errors import Refused

Tokens = tuple[int, ...]


class Tokenizer(Protocol):
    """What turns bytes into token ids: a llama_cpp.Llama, or anything with its `tokenize`."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...


class Pieces:
    """The tokens of pieces of text as they stand inside a prompt; what was asked for lately is kept.

    Vocabularies that put a space before every text they are given would put one before every piece: the piece is read
    after a line break, which is then taken off. special: names of control tokens in a piece are those tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._anchor = self._plain("\n")
        self._kept = lru_cache(1 << 16)(self._inside)

    def __call__(self, text: str) -> Tokens:
        return self._kept(text)

    def start(self, text: str) -> Tokens:
        """The first piece of a prompt: with BOS, where the model has one."""
        return tuple(self._tokenizer.tokenize(text.encode(), add_bos=True, special=self._special))

    def _inside(self, text: str) -> Tokens:
        n = len(self._anchor)
        anchored = self._plain("\n" + text)
        if anchored[:n] == self._anchor:
            return anchored[n:]
        return self._plain(text)  # the line break melts into the piece: such vocabularies add no space

    def _plain(self, text: str) -> Tokens:
        return tuple(self._tokenizer.tokenize(text.encode(), add_bos=False, special=self._special))


@dataclass(frozen=True)
class Sample:
    """A prompt, in parts, and its answers.

    prefix, question, answer_prefix: token ids; their concatenation is the prompt. Samples on one text share `prefix`.
    length: the budget in tokens, `generate`, the tokens left for the answer, included.
    metric: a name in `scoring.METRICS`; references: what the answer must hold.
    seed: makes this sample alone again. positions: of the first token of each needle that holds an answer.
    unit: tokens of the piece of filler that did not fit any more. tags: what must be named with the score.
    """

    task: str
    index: int
    seed: int
    length: int
    generate: int
    metric: str
    prefix: Tokens
    question: Tokens
    answer_prefix: Tokens
    references: tuple[str, ...]
    positions: Tokens = ()
    unit: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> Tokens:
        return self.prefix + self.question + self.answer_prefix

    @property
    def n_prompt(self) -> int:
        return len(self.prefix) + len(self.question) + len(self.answer_prefix)

    def to_json(self) -> dict[str, object]:
        """What a log keeps of it: all but the tokens."""
        names = ("task", "index", "seed", "length", "generate", "metric")
        facts = {name: getattr(self, name) for name in names}
        size = {"n_prompt": self.n_prompt, "n_prefix": len(self.prefix), "positions": list(self.positions)}
        return {**facts, **size, "references": list(self.references), "tags": dict(self.tags)}


@dataclass(frozen=True)
class Job:
    """What a generator is told about the sample it must make. `rng` starts anew from the sample's own seed."""

    pieces: Pieces
    task: str
    metric: str
    length: int
    generate: int
    seed: int
    index: int

    def rng(self) -> random.Random:
        return random.Random(self.seed)

    def room(self, *parts: Sequence[int]) -> int:
        """Tokens left for filler beside `parts` and the answer. Raises Refused if there are none."""
        left = self.length - self.generate - sum(map(len, parts))
        if left < 0:
            raise self.too_short(self.length - left)
        return left

    def too_short(self, least: int) -> Refused:
        """The error for a budget that cannot hold even the least this task needs."""
        return Refused(
            f"{self.task}: does not fit in {self.length} tokens",
            why=f"it needs at least {least}, the {self.generate} of the answer included",
            fix="ask for a greater length, or leave this task out",
        )

    def sample(
        self,
        prefix: Iterable[int],
        question: Iterable[int],
        answer_prefix: Iterable[int],
        references: Iterable[str],
        *,
        positions: Iterable[int] = (),
        unit: int = 0,
        tags: Mapping[str, str] | None = None,
    ) -> Sample:
        parts = tuple(prefix), tuple(question), tuple(answer_prefix)
        self.room(*parts)  # no generator's slip may overrun a context
        return Sample(
            self.task, self.index, self.seed, self.length, self.generate, self.metric,
            *parts, tuple(references), tuple(positions), unit, dict(tags or {}),
        )  # fmt: skip


def fill(units: Iterable[Tokens], room: int) -> tuple[list[Tokens], int]:
    """The first `units` that fit in `room` tokens, and the size of the one that did not (0: there were no more).

    Raises ValueError for an empty unit, of which no number would ever fill anything.
    """
    taken: list[Tokens] = []
    for unit in units:
        if not unit:
            raise ValueError("a unit of filler has no tokens")
        if len(unit) > room:
            return taken, len(unit)
        taken.append(unit)
        room -= len(unit)
    return taken, 0


def flat(parts: Iterable[Sequence[int]]) -> Iterator[int]:
    """The tokens of all parts, one after the other."""
    for part in parts:
        yield from part


def insert(units: list[Tokens], needles: Sequence[tuple[int, Tokens]]) -> tuple[list[Tokens], list[int]]:
    """`units` with each (index, needle) put before unit `index`, and the token at which each needle begins.

    Indices rise, refer to `units` as given, and may be len(units): behind the last. The first unit begins at 0.
    """
    out: list[Tokens] = []
    starts: list[int] = []
    at = done = 0
    for index, needle in needles:
        out += units[done:index]
        at += sum(map(len, units[done:index]))
        done = index
        starts.append(at)
        out.append(needle)
        at += len(needle)
    return out + units[done:], starts
