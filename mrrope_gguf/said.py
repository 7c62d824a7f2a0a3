"""What verbs say: talk on stderr, data on stdout. Names and texts from files are among it, and command no terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from .text import printable

_LONGEST = 1 << 16  # characters of a line of talk


def say(line: str) -> None:
    """One line for people, on stderr."""
    print(printable(line, limit=_LONGEST), file=sys.stderr, flush=True)


def put(text: str | Path) -> None:
    """A verb's outcome, on stdout: as it is for programs, with control characters written out at a terminal."""
    if sys.stdout.isatty():
        from .chat.neutral import neutral

        text = neutral(str(text))
    print(text, flush=True)
