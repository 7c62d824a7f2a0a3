"""Linux calls that change a file from its front: moving all of its data by whole blocks, and having it to ourselves."""

from __future__ import annotations

import errno
import os
import sys

_COLLAPSE_RANGE, _INSERT_RANGE = 0x08, 0x20  # linux/falloc.h


def shift_range(fd: int, shift: int) -> None:
    """Move all bytes of the file by `shift`, forwards (the gap reads as zeros) or backwards over what was in front.

    It takes no longer for a large file: the file system moves extents. `shift` is a multiple of its block size.
    Raises OSError (EOPNOTSUPP, EINVAL, ENOSYS) where it cannot; ext4 and xfs can.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes

    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while fallocate(fd, _INSERT_RANGE if shift > 0 else _COLLAPSE_RANGE, 0, abs(shift)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def lease(fd: int) -> bool | None:
    """Have the open file to ourselves until it is closed: others who open it wait.

    True: ours. False: it is open or mapped somewhere else. None: there are no leases here.
    """
    if sys.platform != "linux":
        return None
    import fcntl
    import signal

    try:
        # whoever opens the file makes the kernel signal us; the default signal, SIGIO, would end the process
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None
    return True
