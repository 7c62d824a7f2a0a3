"""What killed processes left half written beside a model, told from what others are writing by a lock that dies too."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from mrrope_gguf.gguf.copy import O_BINARY
from mrrope_gguf.gguf.names import TEMP, cut

if sys.platform == "win32":

    def lock(fd: int, *, shared: bool = False, wait: bool = False) -> bool:
        """No lock there: an open file is neither renamed nor deleted."""
        return False

else:

    def lock(fd: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Lock the open file until it is closed; False where another holds it or the file system has no locks."""
        import fcntl

        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            return False
        return True


def still_named(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file: a sweep may have been quicker than the lock."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def sweep(*dsts: Path, replaced: bool = False) -> None:
    """Delete what processes that died left half written for these files of one folder. What is in use stays.

    replaced: also what they had replaced, where no journal needs that any more (see together.py).
    """
    if sys.platform == "win32":
        return
    wanted = {cut(dst.name) for dst in dsts}
    with suppress(OSError):
        for name in os.listdir(dsts[0].parent):
            match = TEMP.fullmatch(name)
            if match and match[1] in wanted and (replaced or match[2] == "tmp"):
                delete_unlocked(dsts[0].with_name(name))


def delete_unlocked(path: Path) -> None:
    """Delete a file that no living process holds, if we can."""
    if sys.platform == "win32":
        with suppress(OSError):  # one that is open is not deleted there
            os.unlink(path)
        return
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | O_BINARY)
        try:
            if lock(fd):
                os.unlink(path)
        finally:
            os.close(fd)
