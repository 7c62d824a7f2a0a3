"""The library that makes faults: compiled by cc, preloaded into a Python, armed there in forked children."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("inject.c")
ROOT = Path(__file__).parents[2]
_KILL_BEFORE, _KILL_AFTER, _KILL_HALF, _FAIL, _HALF, _VANISH = 1, 2, 3, 4, 5, 6
_ALL = "corwnsfamlu"  # what a call does, see inject.c
_TAKES_SPACE = "cwnsa"
STDIO = {"fopen", "fread", "fwrite", "fclose"}
_PARTIAL = {"read", "readv", "pread", "write", "writev", "pwrite", "copy_file_range", "sendfile"}


@dataclass(frozen=True)
class Mode:
    """A fault: what happens at a call, of which kinds; lasting where every later call of these kinds fails too."""

    name: str
    how: int
    kinds: str
    number: int = 0
    lasting: bool = False
    partial: bool = False  # only for calls that can do a part of their work
    stdio: bool = True  # of C's streams too

    @property
    def kills(self) -> bool:
        return self.how in (_KILL_BEFORE, _KILL_AFTER, _KILL_HALF)

    def fits(self, call: Call) -> bool:
        if call.name in STDIO and not self.stdio:
            return False
        return call.kind in self.kinds and (call.name in _PARTIAL or not self.partial)


@dataclass(frozen=True)
class Call:
    """The n-th call that was counted."""

    n: int
    name: str
    kind: str


MODES = {
    mode.name: mode
    for mode in (
        Mode("kill before", _KILL_BEFORE, _ALL),
        Mode("kill after", _KILL_AFTER, _ALL),
        Mode("kill half", _KILL_HALF, "wa", partial=True),
        Mode("short", _HALF, "rwa", partial=True),
        Mode("EIO", _FAIL, _ALL, errno.EIO),
        Mode("EINTR", _FAIL, "corwsfal", errno.EINTR, stdio=False),
        Mode("ENOSPC", _FAIL, _TAKES_SPACE, errno.ENOSPC),
        Mode("EDQUOT", _FAIL, _TAKES_SPACE + "f", errno.EDQUOT),
        Mode("full disk", _FAIL, _TAKES_SPACE, errno.ENOSPC, lasting=True),
        Mode("dead disk", _FAIL, _ALL, errno.EIO, lasting=True),
    )
}
# the source goes while it is read; a number is the bytes that are left
VANISHING = {
    mode.name: mode
    for mode in (
        Mode("deleted", _VANISH, _ALL, -1),
        Mode("emptied", _VANISH, _ALL, 0),
        Mode("cut in the header", _VANISH, _ALL, 3000),
        Mode("cut in the data", _VANISH, _ALL, 70_000),
    )
}


@cache
def compiled() -> Path:
    """The library, compiled once a process. Skips the test where it cannot be."""
    if sys.platform != "linux":
        pytest.skip("faults are made by LD_PRELOAD and /proc: Linux")
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None:
        pytest.skip("no C compiler")
    path = Path(tempfile.mkdtemp(prefix="faults-")) / "inject.so"
    command = [cc, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(path), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


class Injector:
    """The preloaded library, in the process that it is in."""

    def __init__(self, path: str) -> None:
        self._lib = ctypes.CDLL(path)
        self._lib.fault_arm.argtypes = [
            ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p,
        ]  # fmt: skip
        self._lib.fault_victim.argtypes = [ctypes.c_char_p]
        self._lib.fault_kind.argtypes = self._lib.fault_name.argtypes = [ctypes.c_long]
        self._lib.fault_kind.restype, self._lib.fault_name.restype = ctypes.c_char, ctypes.c_char_p
        self._lib.fault_count.restype = ctypes.c_long

    def arm(self, folder: Path, n: int = 0, mode: Mode | None = None, victim: Path | None = None) -> None:
        """From now on count this process's calls below `folder`; have the fault at the n-th, or none.

        victim: the file that goes, in the modes of VANISHING.
        """
        self._lib.fault_victim(os.fsencode(victim) if victim else b"")
        how, number, lasting, kinds = (mode.how, mode.number, mode.lasting, mode.kinds) if mode else (0, 0, False, "")
        self._lib.fault_arm(os.fsencode(folder.resolve()), n, how, number, lasting, kinds.encode())

    def disarm(self) -> None:
        self._lib.fault_disarm()

    def calls(self) -> list[Call]:
        """What was counted since it was armed, here or in a child that may be dead."""
        found = []
        for n in range(1, self._lib.fault_count() + 1):
            found.append(Call(n, self._lib.fault_name(n).decode(), self._lib.fault_kind(n).decode()))
        return found
