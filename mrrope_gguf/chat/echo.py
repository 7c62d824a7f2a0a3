"""What is typed while the model reads or writes must not land in the middle of it: it is kept for the next prompt."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_MARK_PASTES, _NO_MARKS = "\x1b[?2004h", "\x1b[?2004l"


@contextmanager
def no_echo() -> Iterator[None]:
    """The terminal takes keys, Ctrl-C among them, but does not show them. Nothing where stdin is no terminal.

    A text of several lines that is pasted meanwhile comes with the marks of a paste, so that it will be one turn.
    """
    try:
        import termios
    except ImportError:  # Windows, whose console shows nothing that nobody reads
        yield
        return
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (AttributeError, OSError, ValueError, termios.error):
        yield
        return
    quiet = list(before)
    quiet[3] &= ~termios.ECHO  # of the local modes; the others stay as they are
    termios.tcsetattr(fd, termios.TCSANOW, quiet)
    _tell(_MARK_PASTES)
    try:
        yield
    finally:
        _tell(_NO_MARKS)
        termios.tcsetattr(fd, termios.TCSANOW, before)


def _tell(sequence: str) -> None:
    """Write a sequence to the terminal, if it is one that knows any."""
    if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
        with suppress(OSError, ValueError):
            sys.stderr.write(sequence)
            sys.stderr.flush()
