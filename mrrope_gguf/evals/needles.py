"""Needles in a haystack of noise or prose: RULER's single-needle sentences, several named keys in one text.

Source: RULER (arXiv 2404.06654) for the needle, the question and the noise. Ten keys in one haystack share a single
prefill: each question is decoded after it and rolled back.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ..kernels import nll
from ..progress import Progress
from .decode import Decoder

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
INTRO = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
KEYS = (
    "amber", "basil", "cobalt", "dahlia", "ember", "falcon", "ginger", "hazel", "indigo", "jasper",
)  # fmt: skip
ROOM = 64  # tokens a haystack must leave free in the context for a question and its answer


@dataclass(frozen=True)
class Answer:
    """How one key's number was recalled. `loss` is the mean NLL of the true answer's tokens, in nats."""

    key: str
    position: int  # of the needle's first token
    expected: str
    said: str
    loss: float

    @property
    def exact(self) -> bool:
        return self.expected in self.said


@dataclass(frozen=True)
class Haystack:
    """Tokens of the text, the keys' numbers, and where each needle begins."""

    tokens: tuple[int, ...]
    values: dict[str, str]
    positions: dict[str, int]


def haystack(llm: Any, n_tokens: int, keys: Sequence[str] = KEYS, seed: int = 42, prose: str | None = None) -> Haystack:
    """A text of at most `n_tokens` tokens with one needle for each key, spread evenly over its length.

    Between the needles stands the noise, over and over, or the sentences of `prose` from its first on.
    Raises ValueError if the needles alone do not fit, or if the prose is too short.
    """
    rng = random.Random(seed)
    values = {key: str(rng.randint(10**6, 10**7 - 1)) for key in keys}
    needles = [tokens_of(llm, " " + NEEDLE.format(key=key, value=values[key])) for key in keys]
    tokens = tokens_of(llm, INTRO, start=True)
    room = n_tokens - len(tokens) - sum(map(len, needles))
    fill = _noise(llm, room) if prose is None else _sentences(llm, prose, room)
    if len(fill) < len(keys):
        raise ValueError(f"{len(keys)} needles need more than {n_tokens} tokens")
    total, read = sum(map(len, fill)), 0
    positions: dict[str, int] = {}
    for part in fill:
        due = len(positions)
        if due < len(keys) and read >= (due + 0.5) * total / len(keys):
            positions[keys[due]] = len(tokens)
            tokens += needles[due]
        tokens += part
        read += len(part)
    for i in range(len(positions), len(keys)):  # the last part was longer than what should stand behind a needle
        positions[keys[i]] = len(tokens)
        tokens += needles[i]
    return Haystack(tuple(tokens), values, positions)


def _noise(llm: Any, room: int) -> list[list[int]]:
    """As many repetitions of the noise as `room` tokens hold."""
    noise = tokens_of(llm, " " + NOISE)
    return [noise] * (room // len(noise))


def _sentences(llm: Any, prose: str, room: int) -> list[list[int]]:
    """The first sentences of `prose` that fill `room` tokens, line breaks taken out. The last one may be cut."""
    found: list[list[int]] = []
    for sentence in re.split(r"(?<=[.!?])\s+", prose):
        tokens = sentence_tokens(llm, sentence)[:room]
        room -= len(tokens)
        found.append(tokens)
        if not room:
            return found
    raise ValueError(f"the prose is {room} tokens too short for this haystack")


def ask(llm: Any, hay: Haystack, progress: Progress | None = None) -> list[Answer]:
    """Read the haystack once, then ask for every key: greedy answer, and the loss of the true one."""
    with Decoder(llm) as decoder:
        for _ in decoder.logits(hay.tokens, every=False, progress=progress):
            pass
        return answers(llm, decoder, hay)


def answers(llm: Any, decoder: Decoder, hay: Haystack) -> list[Answer]:
    """The same for a decoder that has read the haystack's tokens and no more."""
    return [_ask_one(llm, decoder, hay, key) for key in hay.values]


def _ask_one(llm: Any, decoder: Decoder, hay: Haystack, key: str) -> Answer:
    import numpy as np

    question = tokens_of(llm, QUESTION.format(key=key))
    answer = tokens_of(llm, " " + hay.values[key])
    base = len(hay.tokens)
    (last,) = decoder.logits(question, every=False)
    first = last.copy()
    (rest,) = decoder.logits(answer)
    rows = np.concatenate([first, rest[:-1]])
    loss = float(nll(rows, np.asarray(answer)).mean())
    decoder.rewind(base + len(question))
    said = _greedy(llm, decoder, first, len(answer) + 2)
    decoder.rewind(base)
    return Answer(key, hay.positions[key], hay.values[key], said, loss)


def _greedy(llm: Any, decoder: Decoder, logits: Any, n: int) -> str:
    said: list[int] = []
    while len(said) < n:
        token = int(logits[0].argmax())
        if token == llm.token_eos():
            break
        said.append(token)
        (logits,) = decoder.logits([token], every=False)
    return str(llm.detokenize(said).decode("utf-8", errors="replace")).strip()


# a haystack of each length and seed is made of the same sentences; a model that is gone takes its tokens along
_known: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()


def sentence_tokens(llm: Any, sentence: str) -> list[int]:
    """The tokens of a sentence within a text, line breaks taken out; each is read once. Not to be changed."""
    known = _known.setdefault(llm, {})
    if sentence not in known:
        known[sentence] = tokens_of(llm, " " + " ".join(sentence.split()))
    return known[sentence]


def tokens_of(llm: Any, text: str, start: bool = False) -> list[int]:
    """The tokens of a piece of text; a tokenizer that puts a space before each piece gets it without its own."""
    own = text.startswith(" ") and _puts_space(llm.metadata)
    return list(llm.tokenize(text[own:].encode(), add_bos=start, special=False))


def _puts_space(metadata: Mapping[str, str]) -> bool:
    """What llama.cpp does with a SentencePiece vocabulary unless the file says otherwise."""
    if metadata.get("tokenizer.ggml.model") != "llama":
        return False
    return metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
