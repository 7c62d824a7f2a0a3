"""Programs run on a pseudo-terminal, as a user has them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.screen import Screen


class Terminal:
    """A program on a pseudo-terminal. A context manager; the program is killed where it is still there at the end."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None, *, columns: int = 100,
        rows: int = 40, stdout: int | None = None,
    ) -> None:  # fmt: skip
        self.screen = Screen(columns, rows)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave if stdout is None else stdout, stderr=slave, cwd=cwd,
            env={**env, "TERM": "xterm-256color"}, preexec_fn=own_terminal, close_fds=True,
        )  # fmt: skip
        os.close(slave)
        self._mark = 0  # what was on the screen before the last thing that was typed

    def type(self, text: str) -> None:
        """Type, as keys."""
        self.read(0.0)
        self._mark = len(self.screen.text)
        os.write(self._master, text.encode())

    def line(self, text: str) -> None:
        """Type a line and press Enter."""
        self.type(text + "\r")

    def paste(self, text: str) -> None:
        """Paste a text as terminals do: lines end as Enter does, with marks around it all if the program wants them."""
        self.read(0.0)
        text = text.replace("\n", "\r")
        self.type(f"\x1b[200~{text}\x1b[201~" if self.screen.marks_pastes else text)

    def read(self, seconds: float) -> bool:
        """Take what the program writes within `seconds`; False if it has ended."""
        until = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([self._master], [], [], max(until - time.monotonic(), 0))
            if not ready:
                return True
            try:
                data = os.read(self._master, 65536)
            except OSError:  # Linux says so when the last process on the other side has gone
                return False
            if not data:
                return False
            self.screen.feed(data.decode("utf-8", "replace"))
            while self.screen.replies:
                os.write(self._master, self.screen.replies.pop(0).encode())

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Wait until the screen shows `pattern` (a regular expression) anywhere."""
        return self.until(lambda text: re.search(pattern, text) is not None, pattern, seconds)

    def until(self, shown: Callable[[str], bool], what: str, seconds: float = 60) -> str:
        """Wait until shown(text of the screen)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if shown(self.screen.text):
                return self.screen.text
            if not self.read(0.1):
                if shown(self.screen.text):
                    return self.screen.text
                raise AssertionError(f"the program ended before {what!r}:\n{self.screen.text}")
        raise AssertionError(f"no {what!r} within {seconds} s:\n{self.screen.text}")

    def count(self, text: str) -> int:
        return self.screen.text.count(text)

    def ended(self, seconds: float = 30) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.1)
        self.read(0.1)
        return self.process.wait(timeout=1)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
