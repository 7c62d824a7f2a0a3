"""What a program's escape sequences make of a terminal's screen."""

from __future__ import annotations

import re

_SEQUENCE = re.compile(r"\x1b(?:\[([?>=]?)([0-9;]*)([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9A-B]|[=>78M])")
_INCOMPLETE = re.compile(r"\x1b(?:\[[?>=]?[0-9;]*|\][^\x07\x1b]*|[()]?)?$")


class Screen:
    """Lines of text, the cursor, and what has scrolled out above. `overdrawn` counts characters written onto others."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.above: list[str] = []
        self._cells = [[" "] * columns for _ in range(rows)]
        self._x = self._y = 0
        self._rest = ""
        self.replies: list[str] = []
        self.overdrawn = 0
        self.marks_pastes = False  # whether the program has asked for it

    @property
    def lines(self) -> list[str]:
        """Everything, scrolled out or on the screen, without blanks at the ends."""
        return [*self.above, *("".join(row).rstrip() for row in self._cells)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    def feed(self, text: str) -> None:
        text, at = self._rest + text, 0
        while at < len(text):
            if text[at] == "\x1b":
                found = _SEQUENCE.match(text, at)
                if not found:
                    assert _INCOMPLETE.match(text, at), f"unknown sequence {text[at : at + 12]!r}"
                    break
                self._command(found[1] or "", found[2] or "", found[3] or "")
                at = found.end()
            else:
                self._char(text[at])
                at += 1
        self._rest = text[at:]

    def _char(self, char: str) -> None:
        if char == "\n":
            self._down()
        elif char == "\r":
            self._x = 0
        elif char == "\b":
            self._x = max(self._x - 1, 0)
        elif char not in "\x07\x00":
            if self._x == self.columns:
                self._x = 0
                self._down()
            self.overdrawn += self._cells[self._y][self._x] != " "
            self._cells[self._y][self._x] = char
            self._x += 1

    def _down(self) -> None:
        if self._y + 1 < self.rows:
            self._y += 1
            return
        self.above.append("".join(self._cells.pop(0)).rstrip())
        self._cells.append([" "] * self.columns)

    def _command(self, mark: str, numbers: str, letter: str) -> None:
        given = [int(n or 0) for n in numbers.split(";")] if numbers else []
        n = max(given[0] if given else 1, 1)
        if mark == "?" and numbers == "2004":
            self.marks_pastes = letter == "h"
        if mark or letter in ("m", "h", "l", "q", "t", ""):
            return
        if letter == "A":
            self._y = max(self._y - n, 0)
        elif letter == "B":
            self._y = min(self._y + n, self.rows - 1)
        elif letter == "C":
            self._x = min(self._x + n, self.columns - 1)
        elif letter == "D":
            self._x = max(min(self._x, self.columns - 1) - n, 0)
        elif letter == "G":
            self._x = n - 1
        elif letter == "H":
            self._y, self._x = n - 1, (given[1] - 1 if len(given) > 1 else 0)
        elif letter == "K":
            self._erase_line(given[0] if given else 0)
        elif letter == "J":
            self._erase_below(given[0] if given else 0)
        elif letter == "n":
            self.replies.append(f"\x1b[{self._y + 1};{self._x + 1}R")
        else:
            raise AssertionError(f"unknown command {letter!r}")

    def _erase_line(self, how: int) -> None:
        assert how == 0
        # as real terminals: in the last column, with a line full, the last character goes
        for x in range(min(self._x, self.columns - 1), self.columns):
            self._cells[self._y][x] = " "

    def _erase_below(self, how: int) -> None:
        if how == 2:
            self._cells = [[" "] * self.columns for _ in range(self.rows)]
            return
        assert how == 0
        self._erase_line(0)
        for y in range(self._y + 1, self.rows):
            self._cells[y] = [" "] * self.columns
