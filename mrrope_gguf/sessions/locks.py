"""Locks on files that are in use. The system frees them when a process dies, so none is ever left behind."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    # an open file cannot be deleted there, which is all that a shared lock is for
    import msvcrt
    import os

    def try_lock(fd: int, *, shared: bool = False) -> bool:
        """Lock the open file, alone or (shared) with other readers; False if somebody else's lock forbids it."""
        if shared:
            return True
        os.lseek(fd, 1 << 62, os.SEEK_SET)  # behind all data, which a lock would make unreadable
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    from ..gguf.leftover import lock

    def try_lock(fd: int, *, shared: bool = False) -> bool:
        """Lock the open file, alone or (shared) with other readers; False if somebody else's lock forbids it."""
        return lock(fd, shared=shared)
