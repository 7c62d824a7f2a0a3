"""The key that proves that a file was written by this user: 32 random bytes in a folder that is the user's alone."""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from .aside import NEW, private_folder
from .errors import FileTrouble
from .gguf.copy import opened, read_at, sync_file, write_at
from .gguf.stage import delete
from .text import printable

SIZE = 32
_STALE = 60.0  # seconds after which a temporary file that nobody has locked is nobody's
NAME = "key"


def user_key(folder: Path) -> bytes:
    """The key in `folder`, made where there is none. Of two processes that make one, the first wins.

    Raises FileTrouble for a key that another user owns, or may read or write: who knows the key can forge what it
    proves.
    OSError where it cannot be read or made.
    """
    path = folder / NAME
    sweep_temps(folder)
    with suppress(FileNotFoundError):
        key = _read(path)
        if len(key) == SIZE:
            return key
        delete(path)  # cut short by a full disk
    private_folder(folder)
    temp = path.with_name(f".{NAME}.{secrets.token_hex(8)}.tmp")
    try:
        fd = os.open(temp, NEW, 0o600)
        try:
            write_at(fd, secrets.token_bytes(SIZE), 0)
            sync_file(fd)
        finally:
            os.close(fd)
        try:
            os.link(temp, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temp, path)
    finally:
        delete(temp)
    return _read(path)


def sweep_temps(folder: Path) -> None:
    """Delete what processes that were killed while they made a key have left."""
    with suppress(OSError):
        for temp in folder.glob(f".{NAME}.*.tmp"):
            if time.time() - temp.stat().st_mtime > _STALE:
                delete(temp)


def _read(path: Path) -> bytes:
    with opened(path) as fd:
        found = os.fstat(fd)
        ours = os.name != "posix" or found.st_uid == os.geteuid()
        if os.name == "posix" and (not ours or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
            # who owns it decides about its mode
            fix = f"`chmod 600 {printable(str(path))}`; if others may have seen it: delete it, and what it proved goes"
            raise FileTrouble(
                f"{printable(str(path))}: this key is not ours alone",
                why=f"user {found.st_uid} owns it, with mode {stat.S_IMODE(found.st_mode):o}; we are {os.geteuid()}",
                fix=fix if ours else "let MRROPE_DATA (or MRROPE_CACHE) name a folder of your own",
            )
        return read_at(fd, SIZE + 1, 0)
