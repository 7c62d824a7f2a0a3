"""Prose as a haystack: public-domain texts or any file of the user's, cut into sentences."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import texts
from ..errors import FileTrouble, MrropeError, Refused
from ..fetch import Say
from ..text import printable

DEFAULT = "voyage-out"  # 180,000 tokens: enough for 128K without saying anything twice
# after a stop, and after the quotation mark behind it
_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))\s+")


@dataclass(frozen=True)
class Essay:
    """Sentences, line breaks taken out, and how scores on them are tagged: `pd` for texts in the public domain."""

    sentences: tuple[str, ...]
    tag: str
    name: str

    @property
    def tags(self) -> dict[str, str]:
        return {"essay": self.tag, "text": self.name}

    def endless(self) -> Iterator[str]:
        """Its sentences over and over, as RULER repeats an essay that is too short."""
        while self.sentences:
            yield from self.sentences


def essay(text: str, *, name: str, tag: str = "user") -> Essay:
    """The essay in `text`. Raises MrropeError if there is nothing in it but white space, Refused as `words_of` does."""
    words_of(text)
    sentences = tuple(filter(None, _END.split(" ".join(text.split()))))
    if not sentences:
        raise MrropeError(f"{name}: no prose in it", why="it is empty", fix="name a text file with English prose")
    return Essay(sentences, tag, name)


def words_of(text: str) -> str:
    """The text itself. Raises Refused for one line that is a file's name: the name would be measured, not the file."""
    if "\n" not in text and os.path.isfile(text):
        name = printable(text)
        raise Refused(
            f"{name}: a file's name where its text is wanted",
            why=f"the {len(text)} characters of the name would be read, not the file's {os.path.getsize(text)} bytes",
            fix=f"pathlib.Path({name!r}).read_text()",
        )
    return text


def public_domain(name: str = DEFAULT, say: Say | None = None) -> Essay:
    """One of the texts of `mrrope texts`, fetched if need be, tagged essay=pd. Raises as `texts.read` does."""
    return essay(texts.read(name, say), name=name, tag="pd")


def from_file(path: Path) -> Essay:
    """A UTF-8 file of the user's, tagged essay=user. Raises FileTrouble if it cannot be read, MrropeError if empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileTrouble(f"{path}: cannot be read as text", why=str(error), fix="name a UTF-8 text file") from error
    return essay(text, name=path.name)
