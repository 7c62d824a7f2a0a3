"""Conversations by name: messages and the tokens the model saw, one JSON file each, replaced whole when it changes."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ..errors import FileTrouble, Refused
from ..gguf.copy import O_BINARY, sync_dir, sync_file, write_at
from ..gguf.stage import delete, file_errors
from ..text import printable
from .locks import try_lock

VERSION = 1
_LONGEST = 80  # characters of a name: quoted, it must still be a file name


class Named:
    """One conversation, held by this process alone until `close`.

    Raises Refused for a name that cannot be one, or that another process has open; FileTrouble where the folder cannot
    be made or written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = check_name(name)
        self.path = folder / f"{quote(name, safe=' ')}.json"
        with file_errors(self.path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | O_BINARY, 0o600)
        if not try_lock(self._lock):
            os.close(self._lock)
            raise Refused(
                f"the session {printable(name)!r} is open elsewhere",
                why="another process has it, and two would overwrite each other",
                fix="leave it there first, or take another name",
            )

    def load(self) -> dict[str, Any] | None:
        """What was saved, or None for a new name. Raises FileTrouble where the file is damaged: it is left as it is."""
        return read_named(self.path)

    def save(self, values: dict[str, Any]) -> None:
        """Replace the file; what was there stays until the new one is on the disk. Raises FileTrouble."""
        values = {"version": VERSION, "name": self.name, "saved": time.time(), **values}
        # lone surrogates, which no UTF-8 file can hold, are written as escapes
        data = json.dumps(values, ensure_ascii=True).encode()
        temp = self.path.with_name(f".{secrets.token_hex(8)}.tmp")
        with file_errors(self.path):
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_BINARY, 0o600)
            try:
                try:
                    write_at(fd, data, 0)
                    sync_file(fd)
                finally:
                    os.close(fd)
                os.replace(temp, self.path)
            except BaseException:
                delete(temp)
                raise
            sync_dir(self.path.parent)

    def remove(self) -> None:
        """Delete the conversation."""
        delete(self.path)

    def close(self) -> None:
        """Let other processes have the name."""
        if self._lock >= 0:
            if not self.path.exists():
                delete(self.path.with_suffix(".lock"))
            os.close(self._lock)
            self._lock = -1


def check_name(name: str) -> str:
    """`name`, if it can be one of a conversation. Raises Refused."""
    why = ""
    if not 0 < len(name) <= _LONGEST or len(quote(name, safe=" ")) > 200:
        why = f"it has {len(name)} characters, and a name has 1 to {_LONGEST}"
    elif not name.isprintable() or name != name.strip():
        why = "it begins or ends with a space, or holds characters that cannot be seen"
    elif name == "all" or name.startswith((".", "-")):
        why = "'all' means every session, and a name does not begin with '.' or '-'"
    if why:
        raise Refused(f"{printable(name)!r} cannot be a session's name", why=why, fix="choose another name")
    return name


def read_named(path: Path) -> dict[str, Any] | None:
    """The conversation in a file, None where there is none. Raises FileTrouble where it is damaged."""
    try:
        with file_errors(path, "read"):
            values = json.loads(path.read_bytes()) if path.exists() else None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if values is None:
        return None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        version = values.get("version") if isinstance(values, dict) else None
        raise _damaged(path, f"its version is {version}, this mrrope reads {VERSION}")
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise _damaged(path, "its messages are not a list of roles and contents")
    return values


def named_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every conversation in a folder."""
    with suppress(OSError):
        for path in sorted(folder.glob("*.json")):
            if not path.name.startswith("."):
                yield unquote(path.stem), path


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(part), str) for part in ("role", "content"))


def _damaged(path: Path, why: str) -> FileTrouble:
    return FileTrouble(
        f"{printable(str(path))}: this session cannot be read",
        why=printable(why),
        fix=f"`mrrope sessions rm {printable(unquote(path.stem))}`, or take another name; the file is left as it is",
    )
