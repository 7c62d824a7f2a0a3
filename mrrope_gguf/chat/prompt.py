"""What the user types: a line, a paste, or several lines between triple quotes; with a history in the data folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MrropeError
from ..gguf.copy import O_BINARY
from ..paths import data_dir
from ..text import printable

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

INSTALL = "pip install 'mrrope-gguf[chat]'"
BLOCK = '"""'
_KEPT = 1 << 20  # bytes of history, more is cut down to the newer half


class Leave(Exception):
    """The user wants to go."""


def require() -> None:
    """MrropeError without prompt_toolkit and rich, which a conversation at a terminal needs."""
    import importlib.util

    missing = [name for name in ("prompt_toolkit", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise MrropeError(
            "a conversation at the terminal needs the chat extra",
            why=f"{' and '.join(missing)} not installed",
            fix=f"`{INSTALL}`; -p 'QUESTION' or a pipe does without",
        )


class Prompt:
    """Asks for the next turn. words: commands, completed with Tab. note(line): told once if there is no history."""

    def __init__(self, words: Iterable[str], note: Callable[[str], object]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        self._warned = False  # one Ctrl-C at the empty prompt was given
        self._session: PromptSession[str] = PromptSession(
            history=_history(data_dir() / "chat_history", note),
            multiline=True,
            key_bindings=self._keys(),
            completer=WordCompleter(sorted(words), sentence=True),
            complete_while_typing=False,
            prompt_continuation=lambda _width, _line, wraps: "  " if wraps else ". ",
        )

    def ask(self) -> str:
        """The next turn, without the marks of a block. Raises Leave on Ctrl-D, and on Ctrl-C twice."""
        self._warned = False
        try:
            return unblocked(self._session.prompt("> "))
        except (EOFError, KeyboardInterrupt):
            raise Leave from None

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.application import run_in_terminal
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: Any) -> None:
            buffer = event.current_buffer
            if is_open(buffer.text):
                buffer.insert_text("\n")
            elif buffer.text.strip():
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: Any) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
                self._warned = False
            elif self._warned:
                event.app.exit(exception=KeyboardInterrupt())
            else:
                self._warned = True
                run_in_terminal(lambda: print("Ctrl-C again, Ctrl-D or /exit leaves"))

        @keys.add("c-d")
        def _(event: Any) -> None:
            if event.current_buffer.text:
                event.current_buffer.delete()
            else:
                event.app.exit(exception=EOFError())

        return keys


def is_open(text: str) -> bool:
    """Whether a block was begun that has no end yet.

    >>> is_open('a line'), is_open('\"""a'), is_open('\"""a\\nb\"""'), is_open('\"""')
    (False, True, False, True)
    """
    text = text.strip()
    return text.startswith(BLOCK) and (len(text) < 2 * len(BLOCK) or not text.endswith(BLOCK))


def unblocked(text: str) -> str:
    """A turn without the marks of a block.

    >>> unblocked('\"""\\na\\n b\\n\"""'), unblocked(" a ")
    ('a\\n b', 'a')
    """
    text = text.strip()
    if text.startswith(BLOCK) and not is_open(text):
        return text[len(BLOCK) : -len(BLOCK)].strip("\n")
    return text


def _history(path: Path, note: Callable[[str], object]) -> History:
    """What was typed before, readable by the user alone; kept in memory only where the folder cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError, ValueError):  # a full disk, half a surrogate pair: it stays in memory
                super().store_string(string)

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | O_BINARY, 0o600))
        if path.stat().st_mode & 0o077 and os.name == "posix":
            path.chmod(0o600)
        shorten(path)
        return Kept(path)
    except OSError as error:
        note(f"what is typed is not kept: {printable(str(error))}")
        return InMemoryHistory()


def shorten(path: Path, most: int = _KEPT) -> None:
    """Keep the newer half of a history that has grown past `most` bytes."""
    data = path.read_bytes()
    if len(data) <= most:
        return
    # an entry begins with a comment line that holds its time
    at = data.find(b"\n# ", len(data) - most // 2)
    temp = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_BINARY, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data[at:] if at >= 0 else b"")
    os.replace(temp, path)
