"""What is said beside the answers, and the questions put to the user before anything is done: all on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..text import printable


class Talk:
    """`can_ask`: somebody sits at a terminal and can answer."""

    def __init__(self, *, can_ask: bool) -> None:
        self.can_ask = can_ask
        self._dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def say(self, line: str = "") -> None:
        """A line of talk, fainter than the answers; what stands in it must be safe to print."""
        print(f"\x1b[2m{line}\x1b[0m" if self._dim and line else line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """A line about something that stops nothing."""
        self.say(f"note: {printable(line, limit=1000)}")

    def error(self, error: Exception) -> None:
        """An error that does not end the conversation."""
        lines = [printable(line, limit=2000) for line in str(error).split("\n")]
        print("\n".join([f"error: {lines[0]}", *lines[1:]]), file=sys.stderr, flush=True)

    def yes(self, question: str, *, default: bool = True) -> bool:
        """The answer to a question, False where nobody can be asked. Ctrl-C and Ctrl-D mean no."""
        answer = self._ask(f"{question} [{'Y/n' if default else 'y/N'}] ")
        if answer is None:
            return False
        return answer.lower() in ("y", "yes") if answer else default

    def choose(self, question: str, choices: Sequence[str]) -> int | None:
        """The number of one of `choices`, or None for none of them; Enter takes the first."""
        for n, choice in enumerate(choices, 1):
            self.say(f"  {n}  {choice}")
        numbers = "1" if len(choices) == 1 else f"1-{len(choices)}"
        while (answer := self._ask(f"{question} [{numbers}, n: none] ")) is not None:
            if answer.lower() in ("n", "no", "none", "q"):
                return None
            if answer in ("", "y", "yes"):
                return 0
            if answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(choices):
                return int(answer) - 1
        return None

    def _ask(self, question: str) -> str | None:
        if not self.can_ask:
            return None
        print(question, end="", file=sys.stderr, flush=True)
        try:
            return input().strip()
        except (EOFError, KeyboardInterrupt):
            self.say()
            return None
