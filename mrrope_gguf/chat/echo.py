"""What is typed while the model reads or writes must not land in the middle of it: it is kept for the next prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_echo() -> Iterator[None]:
    """The terminal takes keys, Ctrl-C among them, but does not show them. Nothing where stdin is no terminal."""
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
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
