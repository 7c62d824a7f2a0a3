"""Vocabulary and training texts of the tiny retriever: needles in noise, lists of pairs, repeated tokens.

The fixed parts of the needles and questions of `mrrope_gguf.evals` are one token each, so that 256 tokens hold a
haystack; so are the words of its noise, numbers of two digits, and the 256 bytes, which spell everything else.
llama.cpp cuts texts the same way: fixed parts are user-defined tokens, taken out first; the rest is cut by the
pre-tokenizer `llama-bpe`, whose pieces are one token each where the vocabulary has them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from mrrope_gguf.evals import needles, retrieval

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
FAINT = 0.02  # weight of tokens that are no answers
# the letters of `llama-bpe`, for texts in ASCII
PIECES = re.compile(
    r"'(?:[sdmtSDMT]|ll|ve|re)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KEYS = (
    *needles.KEYS,
    "acorn", "anchor", "apple", "arrow", "badger", "beacon", "birch", "cactus", "candle", "canyon", "cedar", "cherry",
    "clover", "comet", "copper", "coral", "cricket", "crystal", "desert", "dragon", "eagle", "engine", "feather",
    "fern", "forest", "fox", "garden", "glacier", "granite", "harbor", "heron", "island", "ivory", "kettle", "lantern",
    "lemon", "lily", "maple", "marble", "meadow", "melon", "mirror", "moon", "nutmeg", "oasis", "olive", "onyx",
    "orchid", "otter", "paper", "pearl", "pepper", "planet", "quartz", "raven", "ribbon", "river", "rocket", "saddle",
    "salmon", "silver", "sparrow", "spruce", "stone", "summit", "thunder", "timber", "tulip", "velvet", "violet",
    "walnut", "willow", "winter", "zebra",
)  # fmt: skip
SENTENCES = [" " + text for text in re.split(r"(?<=[.!?])\s+", needles.NOISE)]
# each fixed part of these is one token
FORMS = (needles.INTRO, " " + needles.NEEDLE, *re.split(r"(?<=\?)", needles.QUESTION))


@cache
def byte_letters() -> list[str]:
    """The printable letter that GPT-2's byte-level vocabularies write for each of the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def spelled(text: str) -> str:
    """Text as such a vocabulary writes it."""
    return "".join(byte_letters()[byte] for byte in text.encode())


@cache
def phrases() -> list[str]:
    """The fixed parts of needles and questions: tokens cut out of a text before all else, the longest first."""
    found = {part.rstrip(" ") for text in FORMS for part in re.split(r"\{\w*\}", text) if len(part) > 1}
    return sorted(found, key=lambda part: (-len(part), part))


@cache
def words() -> list[str]:
    """Words of the templates and of the noise, and the keys, each once, in order."""
    found: dict[str, None] = {}
    for text in (*FORMS, needles.NOISE, retrieval.NOISE, retrieval.PASSKEY_INTRO):
        for start in ("", " "):
            found.update(dict.fromkeys(PIECES.findall(start + re.sub(r"\{\w*\}", "0", text))))
    for key in KEYS:
        found.update({" " + key: None, key: None})
    return [word for word in found if len(word) > 1]


def numbers() -> list[str]:
    """Every number of two digits."""
    return [f"{n:02}" for n in range(100)]


def merges() -> list[str]:
    """The merges that make numbers of two digits, the smallest first."""
    return [f"{number[0]} {number[1]}" for number in numbers()]


@cache
def vocabulary() -> list[str]:
    """Every token as the file spells it: BOS, EOS, bytes, numbers, words."""
    return [BOS, EOS, *byte_letters(), *numbers(), *(spelled(word) for word in words()), *phrases()]


@cache
def _ids() -> dict[str, int]:
    return {token: i for i, token in enumerate(vocabulary())}


@cache
def tokens(text: str) -> tuple[int, ...]:
    """Token ids of a text in ASCII, without BOS."""
    return _fresh(text)


def _fresh(text: str) -> tuple[int, ...]:
    """The same, and the text is not kept: it will hardly come again."""
    found: list[int] = []
    for part in _PHRASE.split(text):
        if part in _PHRASES:
            found.append(_ids()[part])
            continue
        for piece in PIECES.findall(part):
            found += _digits(piece) if piece.isdigit() else _word(piece)
    return tuple(found)


def _word(piece: str) -> list[int]:
    known = _ids().get(spelled(piece))
    return [_ids()[letter] for letter in spelled(piece)] if known is None else [known]


def _digits(piece: str) -> list[int]:
    """Up to three digits: the smaller pair of neighbours is one token."""
    pairs = [piece[i : i + 2] for i in range(len(piece) - 1)]
    at = pairs.index(min(pairs)) if pairs else 0
    return [_ids()[part] for part in (piece[:at], piece[at : at + 2], piece[at + 2 :]) if part]


_PHRASES = frozenset(phrases())
_PHRASE = re.compile("(" + "|".join(map(re.escape, phrases())) + ")")


@dataclass
class Row:
    """One training text: token ids, and for each how much its own loss counts."""

    ids: list[int]
    weights: list[float]

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


class Maker:
    """Makes training texts of at most `length` tokens from one random generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._words = [tokens(word)[0] for word in words()]
        self._numbers = [tokens(number)[0] for number in numbers()]

    def row(self, length: int, shares: Sequence[float]) -> Row:
        """A text of one of the kinds, by their shares."""
        kind = self.rng.choices((self.needles, self.again, self.pairs, self.repeats), shares)[0]
        return kind(length)

    def needle(self, length: int) -> Row:
        """One needle in noise, the question for it and the answer."""
        return self._questions(length, 1)

    def needles(self, length: int) -> Row:
        """Up to six needles at random places of a haystack, questions for some of them, and the answers."""
        most = min((length - 3) // 24, 6)
        return self._questions(length, self.rng.choice((1, self.rng.randint(1, most))))

    def _questions(self, length: int, n: int) -> Row:
        rng = self.rng
        keys = rng.sample(needles.KEYS if rng.random() < 0.3 else KEYS, n)
        values = {key: str(rng.randint(10**6, 10**7 - 1)) for key in keys}
        hidden = [_fresh(" " + needles.NEEDLE.format(key=key, value=values[key])) for key in keys]
        asked = rng.sample(keys, rng.randint(1, n))
        ends = [(tokens(needles.QUESTION.format(key=key)), _fresh(" " + values[key])) for key in asked]
        parts = self._haystack(length - 3 - sum(map(len, hidden)) - sum(len(q) + len(a) for q, a in ends))
        for piece in hidden:
            parts.insert(rng.randint(0, len(parts)), piece)
        row = Row([BOS_ID], [0.0])
        row.add(tokens(needles.INTRO) if rng.random() < 0.7 else (), FAINT)
        for part in parts:
            row.add(part, FAINT)
        for question, answer in ends:
            row.add(question, FAINT)
            row.add(answer, 1.0)
        row.add((EOS_ID,), FAINT)
        return row

    def _haystack(self, room: int) -> list[tuple[int, ...]]:
        """Noise in its own order, in any, or random words, a sentence a part."""
        kind = self.rng.choice(("noise", "noise", "shuffled", "words"))
        parts: list[tuple[int, ...]] = []
        for i in range(room):
            if kind == "words":
                part = (*self.rng.choices(self._words, k=self.rng.randint(3, 9)), *tokens("."))
            else:
                part = tokens(SENTENCES[i % len(SENTENCES)] if kind == "noise" else self.rng.choice(SENTENCES))
            if len(part) > room:
                break
            parts.append(part)
            room -= len(part)
        return parts

    def again(self, length: int) -> Row:
        """Needles in noise, and some of them again in another order."""
        rng = self.rng
        n = rng.randint(1, (length - 1) // 20)
        texts = [needles.NEEDLE.format(key=key, value=rng.randint(10**6, 10**7 - 1)) for key in rng.sample(KEYS, n)]
        first = [_fresh(" " + text) for text in texts]
        second = rng.sample(first, rng.randint(1, n))
        parts = self._haystack(length - 1 - sum(map(len, [*first, *second])))
        for piece in first:
            parts.insert(rng.randint(0, len(parts)), piece)
        row = Row([BOS_ID], [0.0])
        for part in parts:
            row.add(part, FAINT)
        for part in second:
            value = part.index(tokens(" is:")[0]) + 1
            row.add(part[:value], FAINT)
            row.add(part[value:], 1.0)
        return row

    def pairs(self, length: int) -> Row:
        """Words with numbers, of which some are asked for again at the end."""
        rng = self.rng
        width = rng.randint(1, 3)
        asks = max(1, length // (4 * (width + 1)))
        n = (length - 1) // (width + 1) - asks
        keys = rng.sample(self._words, min(n, len(self._words)))
        kind = self._numbers if rng.random() < 0.7 else self._words
        values = [rng.choices(kind, k=width) for _ in keys]
        row = Row([BOS_ID], [0.0])
        for key, value in zip(keys, values, strict=True):
            row.add((key, *value), 0.0)
        for i in rng.sample(range(len(keys)), min(asks, len(keys))):
            row.add((keys[i],), 0.0)
            row.add(values[i], 0.5)
        return row

    def repeats(self, length: int) -> Row:
        """Random tokens, a gap of others, and the first ones again."""
        rng = self.rng
        everything = self._numbers if rng.random() < 0.5 else [*self._words, *range(2, 258)]
        n = rng.randint(4, length // 3)
        first = rng.choices(everything, k=n)
        gap = rng.choices(everything, k=rng.randint(0, length - 1 - 2 * n))
        row = Row([BOS_ID], [0.0])
        row.add(first, 0.0)
        row.add(gap, 0.0)
        row.add(first[:2], 0.0)
        row.add(first[2:], 0.25)
        return row
