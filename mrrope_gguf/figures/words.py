"""The text a figure is measured on: one of `mrrope texts`, or a file of the user's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import texts
from ..errors import FileTrouble, MrropeError
from ..fetch import Say
from ..text import printable

DEFAULT = "britannica"


@dataclass(frozen=True)
class Words:
    """A text by its name."""

    name: str
    text: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def tokens(self, llm: Any, n: int) -> list[int]:
        """Its first n tokens, BOS included where the model has one. Raises MrropeError if it has fewer."""
        found = list(llm.tokenize(self.text.encode(), add_bos=True, special=False))
        if len(found) < n:
            raise MrropeError(
                f"{self.name}: the text is too short",
                why=f"it has {len(found)} tokens of this model's, and {n} are needed",
                fix="a longer text (`mrrope texts` lists some), or a smaller --ctx-size",
            )
        return found[:n]


def read_words(text: str, say: Say | None = None) -> Words:
    """A text of `mrrope texts` by name, fetched if need be, or a UTF-8 file.

    Raises FileTrouble for a file that cannot be read and MrropeError for a name that is neither.
    """
    if text in texts.TEXTS:
        return Words(text, texts.read(text, say))
    path = Path(text)
    try:
        return Words(printable(path.name), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileTrouble(
            f"{printable(text)}: cannot be read as text",
            why=getattr(error, "strerror", None) or str(error),
            fix=f"name a UTF-8 text file, or one of {', '.join(texts.TEXTS)}",
        ) from None
