"""The English words RULER's keys and lists are made of: those of the PyPI package wonderwords, an optional extra.

Only its lists are read, so that neither its code nor its random state has a say in what a seed gives.
"""

from __future__ import annotations

import random
from functools import lru_cache

from ..errors import MrropeError

WORDS = ("noun", "adjective", "verb")


@lru_cache
def word_list(kind: str) -> tuple[str, ...]:
    """All words of one kind, in the package's order, each once. kind: noun, adjective or verb.

    Raises MrropeError where wonderwords is not installed, or holds no such list.
    """
    from importlib.resources import files

    try:
        text = files("wonderwords").joinpath(f"assets/{kind}list.txt").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise MrropeError(
            "RULER's words are not there",
            why="its keys and word lists come from the package wonderwords, which is not installed",
            fix="pip install 'mrrope-gguf[eval]'",
        ) from error
    except OSError as error:
        raise MrropeError(
            f"wonderwords: no list of {kind}s",
            why=str(error),
            fix="pip install 'mrrope-gguf[eval]' brings the release that has one",
        ) from error
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))


@lru_cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, sorted, each once."""
    return tuple(sorted({word for kind in WORDS for word in word_list(kind)}))


def word_keys(rng: random.Random, n: int) -> list[str]:
    """`n` different keys as RULER writes them, adjective-noun. Raises ValueError past the pairs there are."""
    adjectives, nouns = word_list("adjective"), word_list("noun")
    pairs = rng.sample(range(len(adjectives) * len(nouns)), n)
    return [f"{adjectives[pair // len(nouns)]}-{nouns[pair % len(nouns)]}" for pair in pairs]
