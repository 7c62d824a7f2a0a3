"""Conversations by name: messages and the tokens the model saw, one JSON file each, replaced whole when it changes.

A file ends in a proof under the user's key: a conversation says what the user and the model said, so what another
program put into it must not be taken for that.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ..aside import private_folder
from ..errors import FileTrouble, Refused
from ..gguf.copy import O_BINARY, sync_dir, sync_file, write_at
from ..gguf.stage import delete, file_errors
from ..text import printable
from ..user_key import user_key
from .locks import try_lock

VERSION = 1
_KINDS: dict[str, Any] = {
    "system": (str, type(None)), "documents": list, "pieces": list, "sampling": dict, "parts": dict,
    "created": (int, float), "saved": (int, float), "tokens": int,
}  # fmt: skip
_PROOF = re.compile(rb', "proof": "([0-9a-f]{64})"\}\s*$')
_LONGEST = 80  # characters of a name: quoted, it must still be a file name


class Named:
    """One conversation, held by this process alone until `close`.

    Raises Refused for a name that cannot be one, or that another process has open; FileTrouble where the folder cannot
    be made or written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = check_name(name)
        self.path = folder / f"{quote(name, safe=' ')}.json"
        with _file_errors(self.path):
            private_folder(folder)
            self._lock = _locked(self.path.with_suffix(".lock"))
        if self._lock >= 0:
            self._sweep()
        else:
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
        text = json.dumps(values, ensure_ascii=True).encode()
        with _file_errors(self.path):
            data = sealed(text, user_key(self.path.parents[1]))
        temp = self.path.with_name(f".{self.path.stem}.{secrets.token_hex(8)}.tmp")
        with _file_errors(self.path):
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

    def _sweep(self) -> None:
        """Delete what a process that was killed left half written: nobody else writes under this name."""
        mine = re.compile(rf"\.{re.escape(self.path.stem)}\.[0-9a-f]{{16}}\.tmp")
        with suppress(OSError):
            for name in os.listdir(self.path.parent):
                if mine.fullmatch(name):
                    delete(self.path.with_name(name))

    def remove(self) -> None:
        """Delete the conversation."""
        delete(self.path)

    def close(self) -> None:
        """Let other processes have the name."""
        if self._lock >= 0:
            if not self.path.exists():
                delete(self.path.with_suffix(".lock"))
            with suppress(OSError):
                os.close(self._lock)
            self._lock = -1


@contextmanager
def _file_errors(path: Path, doing: str = "written") -> Iterator[None]:
    """file_errors, with the way out that sessions have."""
    try:
        with file_errors(path, doing):
            yield
    except FileTrouble as trouble:
        fix = f"{trouble.fix}; MRROPE_DATA names another folder for conversations"
        raise FileTrouble(trouble.what, why=trouble.why, fix=fix) from None


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
        with _file_errors(path, "read"):
            data = path.read_bytes() if path.exists() else None
            if data is None:
                return None
            key = user_key(path.parents[1])
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not _is_proved(data, key):
        raise _damaged(path, "its proof does not fit: it was changed since it was saved, or another user's key made it")
    if not isinstance(values, dict) or values.get("version") != VERSION:
        version = values.get("version") if isinstance(values, dict) else None
        raise _damaged(path, f"its version is {version}, this mrrope reads {VERSION}")
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages, range(len(messages)))):
        raise _damaged(path, "its messages are not questions and answers by turns")
    for part, kinds in _KINDS.items():
        if not isinstance(values.get(part), kinds):
            raise _damaged(path, f"there is no {part} in it, or it is something else")
    if not all(isinstance(one, list) and [type(word) for word in one] == [str, str] for one in values["documents"]):
        raise _damaged(path, "its documents are not names and texts")
    return values


def sealed(text: bytes, key: bytes) -> bytes:
    """A JSON object with its proof as the last value: HMAC-SHA256 of what it is without."""
    return text[:-1] + b', "proof": "' + hmac.digest(key, text, "sha256").hex().encode() + b'"}'


def _is_proved(data: bytes, key: bytes) -> bool:
    match = _PROOF.search(data)
    if match is None:
        return False
    made = hmac.digest(key, data[: match.start()] + b"}", "sha256")
    return hmac.compare_digest(made, bytes.fromhex(match[1].decode()))


def named_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every conversation in a folder."""
    with suppress(OSError):
        for path in sorted(folder.glob("*.json")):
            if not path.name.startswith("."):
                yield unquote(path.stem), path


def _locked(path: Path) -> int:
    """A lock file, open and locked; -1 if another process has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | O_BINARY, 0o600)
        if not try_lock(fd):
            os.close(fd)
            return -1
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # who had it before deleted it: there is a new one, or none


def _is_message(message: object, i: int) -> bool:
    role = ("user", "assistant")[i % 2]
    return isinstance(message, dict) and message.get("role") == role and isinstance(message.get("content"), str)


def _damaged(path: Path, why: str) -> FileTrouble:
    return FileTrouble(
        f"{printable(str(path))}: this session cannot be read",
        why=printable(why),
        fix=f"`mrrope sessions rm {printable(unquote(path.stem))}`, or take another name; the file is left as it is",
    )
