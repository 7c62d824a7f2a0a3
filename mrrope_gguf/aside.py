"""Files that are whole or not there, and folders that are this user's alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEW: int = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def written_aside(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside `path`, to be written by its name; it becomes `path` where the block ends without an error.

    Nobody can have put a link where it will be: its name is random, and it is made, never found. A link called `path`
    is replaced, not followed. mode: permissions, less the umask. Raises OSError.
    """
    # the suffix stays: by it matplotlib and Pillow choose a format
    aside = path.with_name(f".mrrope-{os.urandom(8).hex()}{path.suffix}")
    os.close(os.open(aside, NEW, mode))
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def private_folder(path: Path) -> Path:
    """Make a folder, and what is missing above it, for this user alone (0700); one that is there stays as it is."""
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except FileExistsError:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    return path
