"""The last lines of a terminal, rewritten in place: only what changed is written, so nothing flickers."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Region:
    """Lines below everything else, the cursor at the end of the last one.

    A line must be narrower than the terminal, and all of them fewer than its lines. write(text): in one piece.

    >>> sent = []
    >>> region = Region(sent.append)
    >>> region.show(["one"]); region.show(["one", "two"]); region.show(["one", "2"]); region.finish()
    >>> sent
    ['\\rone\\x1b[K', '\\ntwo\\x1b[K', '\\r2\\x1b[K', '\\n']
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._lines: list[str] = []

    def show(self, lines: Sequence[str]) -> None:
        """Make the region these lines, of which there is at least one."""
        old, new = self._lines, list(lines)
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        if same == len(old) == len(new):
            return
        below = "\x1b[J" if len(new) < len(old) else ""
        if same == len(new):  # what is left was there already: go to its last line, and erase below
            same -= 1
        up = len(old) - 1 - same
        start = "" if not old else "\n" if up < 0 else f"\x1b[{up}A" if up else ""
        if up >= 0 or not old:
            start += "\r"
        self._write(start + "\n".join(f"{line}\x1b[K" for line in new[same:]) + below)
        self._lines = new

    def keep(self, n: int) -> None:
        """The first n lines are final: they leave the region and stay where they are."""
        if n >= len(self._lines):
            self.finish()
        else:
            del self._lines[:n]

    def finish(self) -> None:
        """All lines are final; what comes next stands below them."""
        if self._lines:
            self._write("\n")
            self._lines = []
