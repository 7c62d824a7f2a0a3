"""An answer on its way to the screen: as text where that is wanted, else as Markdown that is formatted as it comes."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from . import markdown
from .neutral import neutral
from .region import Region

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 0.04  # seconds between two redraws at least, and never more than a fifth of the time for drawing
_SPARE = 3  # lines of a terminal that are left to what stands above an unfinished block


class Answer(Protocol):
    """Takes the pieces of one answer; `end` when there are no more, however it ended."""

    def push(self, text: str) -> None: ...
    def end(self) -> None: ...


class Plain:
    """Text as it is; on a terminal without what could command it."""

    def __init__(self, out: TextIO, *, safe: bool) -> None:
        self._out, self._safe, self._last = out, safe, "\n"

    def push(self, text: str) -> None:
        self._out.write(neutral(text) if self._safe else text)
        self._out.flush()
        self._last = text[-1:] or self._last

    def end(self) -> None:
        if self._last != "\n":
            self._out.write("\n")
        self._out.flush()


class Formatted:
    """Markdown. status(): a line that stands below the answer while it is written."""

    def __init__(
        self, out: TextIO, console: Console, status: Callable[[], str] = lambda: "",
        size: Callable[[], os.terminal_size] = shutil.get_terminal_size, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._console, self._status, self._size, self._clock = console, status, size, clock
        self._region = Region(lambda text: (out.write(text), out.flush()))
        self._text = ""  # of the blocks that are not final
        self._above = 0  # lines of the last block that have left the region
        self._gap = False  # a block stands above: a blank line parts the next one from it
        self._columns = 0
        self._next = 0.0

    def push(self, text: str) -> None:
        self._text += neutral(text)
        began = self._clock()
        if began >= self._next:
            self._draw(last=False)
            ended = self._clock()
            self._next = ended + max(_EVERY, 5 * (ended - began))

    def end(self) -> None:
        self._draw(last=True)
        self._region.finish()

    def _draw(self, *, last: bool) -> None:
        columns, rows = self._size()
        if self._columns not in (0, columns):  # lines have been wrapped anew: begin again below them
            self._region.finish()
            self._above = 0
        self._columns = columns
        if n := markdown.settled(self._text):
            self._show(self._text[:n], columns, rows, final=True)
            self._text = self._text[n:]
        shown = self._text if last else markdown.presentable(self._text)
        if shown.strip():
            self._show(shown, columns, rows, final=last)
        elif last:
            self._region.show([""])  # the status goes

    def _show(self, text: str, columns: int, rows: int, *, final: bool) -> None:
        found = markdown.lines(text, self._console, max(columns - 1, 8))
        found = ["", *found] if self._gap else found
        below = [] if final else self._below(columns)
        visible, most = found[self._above :], max(rows - _SPARE, 4)
        while len(visible) + len(below) > most:  # what does not fit on the screen cannot be changed any more
            step = min(len(visible) + len(below) - most, len(visible), most)
            self._region.show(visible[:most])
            self._region.keep(step)
            visible, self._above = visible[step:], self._above + step
        self._region.show([*visible, *below] or [""])
        if final:
            self._region.finish()
            self._above, self._gap = 0, True

    def _below(self, columns: int) -> list[str]:
        status = self._status()
        return [f"\x1b[2m{status[: columns - 1]}\x1b[0m"] if status else []


def plain_wanted(out: TextIO) -> bool:
    """Whether answers are to be text alone: no terminal, NO_COLOR, TERM=dumb, or no rich."""
    import importlib.util

    return (
        not out.isatty()
        or bool(os.environ.get("NO_COLOR"))
        or os.environ.get("TERM", "") in ("dumb", "unknown")
        or importlib.util.find_spec("rich") is None
    )


def answer(out: TextIO | None = None, status: Callable[[], str] = lambda: "") -> Answer:
    """How the next answer is shown on `out` (stdout)."""
    out = out or sys.stdout
    if plain_wanted(out):
        return Plain(out, safe=out.isatty())
    from rich.console import Console

    console = Console(file=out, highlight=False)
    return Plain(out, safe=True) if console.legacy_windows else Formatted(out, console, status)
