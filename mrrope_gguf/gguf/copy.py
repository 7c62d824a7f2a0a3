"""Writing pieces into a file by the fastest way there is: shared blocks, an in-kernel copy, or read and write.

A reflink needs source and destination at the same place within a block, so the caller lays the new file out that way
(see edit.py) and a span is written as a ragged head, one aligned clone and a ragged tail.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf.pieces import Piece, Rows, Span, reorder, total
from mrrope_gguf.progress import Progress

BLOCK = 4096  # what reflinks and inserted ranges are multiples of, on every file system that has them
CHUNK = 1 << 20  # of the read-and-write path: it bounds memory
KERNEL_CHUNK = 4 << 20  # of copy_file_range, after which the disk is told to start writing
CLONE_FROM = 16 * BLOCK  # a shorter span costs more to clone than to copy
_NOT_POSSIBLE = frozenset(
    getattr(errno, name)
    for name in ("EOPNOTSUPP", "ENOTSUP", "EXDEV", "EINVAL", "ENOSYS", "ENOTTY", "EPERM", "ETXTBSY", "EBADF")
    if hasattr(errno, name)
)
_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
O_BINARY: int = getattr(os, "O_BINARY", 0)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """A file's descriptor, for reading. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | O_BINARY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes at `offset`; fewer only at the end of the file, since a read that gives less goes on."""
    data = _read_once(fd, size, offset)
    while 0 < len(data) < size and (more := _read_once(fd, size - len(data), offset + len(data))):
        data += more
    return data


def _read_once(fd: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`. FileTrouble if the file ends before them."""
    data = read_at(fd, size, offset)
    if len(data) < size:
        raise FileTrouble(
            "the source file ended while it was being read",
            why=f"{size} bytes at {offset} were wanted, {len(data)} are there",
            fix="see whether another program is writing it",
        )
    return data


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`."""
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            done = os.pwrite(fd, view, offset)
        else:
            os.lseek(fd, offset, os.SEEK_SET)
            done = os.write(fd, view)
        view, offset = view[done:], offset + done


def read_pieces(read: Callable[[int, int], bytes | memoryview], pieces: Iterable[Piece]) -> bytes:
    """The bytes that `pieces` make, in memory: for headers, not for tensors. `read(start, size)` gives the file's."""
    out: list[bytes | memoryview] = []
    for piece in pieces:
        if isinstance(piece, bytes):
            out.append(piece)
            continue
        data = read(piece.start, len(piece))
        out.append(reorder(data, piece.row_bytes, piece.order) if isinstance(piece, Rows) else data)
    return b"".join(out)


def clone_range(src: int, start: int, size: int, dst: int, at: int) -> bool:
    """Share blocks of src with dst (all numbers multiples of BLOCK); False where the file system cannot."""
    if sys.platform != "linux":
        return False
    import fcntl

    while True:
        try:
            fcntl.ioctl(dst, _FICLONERANGE, struct.pack("=qQQQ", src, start, size, at))
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in _NOT_POSSIBLE:
                return False
            raise
        return True


class Copier:
    """Writes pieces of the open file `src` into the open file `dst`, from offset 0 or where it is told.

    `how` is the best that worked for what was large: "reflink", "copy_file_range" or "copy"; `copied` counts the
    bytes really written. `progress(done, total)` is called only once bytes have to be copied for want of a reflink.
    """

    def __init__(self, src: int, dst: int, progress: Progress | None = None, *, clone: bool = True) -> None:
        self.src, self.dst = src, dst
        self.how = "copy"
        self.copied = 0
        self._progress = progress
        self._may_clone = clone
        self._may_copy_range = hasattr(os, "copy_file_range")
        self._done = self._total = 0

    def write(self, pieces: list[Piece], at: int = 0) -> int:
        """Write `pieces` one after another from offset `at`; the offset after the last."""
        self._done, self._total = 0, total(pieces)
        for piece in pieces:
            if isinstance(piece, bytes):
                write_at(self.dst, piece, at)
                self._advance(len(piece))
            elif isinstance(piece, Rows):
                self._rows(piece, at)
            else:
                self._span(piece, at)
            at += len(piece)
        return at

    def _advance(self, size: int, *, cloned: bool = False) -> None:
        self._done += size
        if not cloned:
            self.copied += size
        if self._progress is not None and not self._may_clone:
            self._progress(self._done, self._total)

    def _span(self, span: Span, at: int) -> None:
        head = -span.start % BLOCK
        middle = (len(span) - head) // BLOCK * BLOCK
        if self._may_clone and middle >= CLONE_FROM and (span.start - at) % BLOCK == 0:
            if clone_range(self.src, span.start + head, middle, self.dst, at + head):
                self.how = "reflink"
                self._copy(span.start, span.start + head, at)
                self._advance(middle, cloned=True)
                self._copy(span.start + head + middle, span.end, at + head + middle)
                return
            self._may_clone = False
        self._copy(span.start, span.end, at)

    def _copy(self, start: int, end: int, at: int) -> None:
        while start < end:
            size = min(end - start, KERNEL_CHUNK - at % KERNEL_CHUNK)  # a chunk ends where a page does: see below
            done = self._copy_range(start, size, at) if self._may_copy_range else 0
            if not done:
                data = read_exactly(self.src, min(size, CHUNK), start)
                write_at(self.dst, data, at)
                done = len(data)
            self._start_writing(at, done)
            start, at = start + done, at + done
            self._advance(done)

    def _start_writing(self, at: int, size: int) -> None:
        """Let the disk write while the next chunk is copied, so that fsync has little left to wait for.

        The advice makes Linux start to write and forget only what is written already. A page that is being written must
        not be touched again, hence whole pages.
        """
        if size >= BLOCK and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.dst, at, size, os.POSIX_FADV_DONTNEED)

    def _copy_range(self, start: int, size: int, at: int) -> int:
        """Bytes the kernel copied by itself; 0, and never tried again, where it cannot."""
        try:
            done = os.copy_file_range(self.src, self.dst, size, start, at)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
            done = 0
        if not done:
            self._may_copy_range = False
        elif self.how == "copy":
            self.how = "copy_file_range"
        return done

    def _rows(self, rows: Rows, at: int) -> None:
        step = max(1, CHUNK // rows.group_bytes) * rows.group_bytes
        for start in range(rows.start, rows.end, step):
            size = min(step, rows.end - start)
            data = read_exactly(self.src, size, start)
            write_at(self.dst, reorder(data, rows.row_bytes, rows.order), at + start - rows.start)
            self._advance(size)


def sync_file(fd: int) -> None:
    """Onto the disk itself: fsync, or macOS's F_FULLFSYNC where fsync stops at the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a file system without it, such as a network share
            pass
    os.fsync(fd)


def sync_dir(path: str | os.PathLike[str]) -> None:
    """Make a rename in this directory last. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
