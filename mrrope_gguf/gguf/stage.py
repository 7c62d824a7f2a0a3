"""New files that are either there, whole and checked, or not there: temp file, fsync, re-parse, rename."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf.copy import BLOCK, O_BINARY, Copier, clone_range, opened, sync_dir, sync_file
from mrrope_gguf.gguf.index import GGUFIndex, open_gguf
from mrrope_gguf.gguf.leftover import lock, still_named
from mrrope_gguf.gguf.names import journal_path, temp_path
from mrrope_gguf.gguf.pieces import Piece, Span, total
from mrrope_gguf.gguf.room import free, own_bytes, require_room
from mrrope_gguf.progress import Progress

Check = Callable[[GGUFIndex], None]
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def file_errors(path: Path, doing: str = "written") -> Iterator[None]:
    """Turn an OSError about `path` into a FileTrouble with the fix."""
    try:
        yield
    except OSError as error:
        raise _trouble(path, doing, error) from None


def _trouble(path: Path, doing: str, error: OSError) -> FileTrouble:
    fixes = {
        errno.ENOENT: "make the directory first, or check its name",
        errno.EACCES: f"check the permissions of {path.parent}, or write to another directory",
        errno.EPERM: f"check the permissions of {path.parent}, or write to another directory",
        errno.EROFS: "write to a directory on another file system",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EMFILE: "`ulimit -n 4096` in this shell, and again",
        errno.EFBIG: "write to a file system that takes files this large",
    }
    fix = "free some space there, or write elsewhere" if error.errno in _FULL else "check the disk"
    why = error.strerror or str(error)
    if error.errno in _FULL:
        with suppress(OSError):
            why += f"; {free(path.parent)} bytes available"
    return FileTrouble(f"{path}: the file cannot be {doing}", why=why, fix=fixes.get(error.errno or 0, fix))


@dataclass
class Staged:
    """A finished temp file beside the place it is meant for. `held`: it open and locked, which others' sweeps heed."""

    temp: Path
    dst: Path
    how: str
    copied: int
    held: int = field(default=-1, repr=False)

    def discard(self) -> None:
        delete(self.temp)
        self.release()

    def release(self) -> None:
        """It has its name, or is gone: give up the lock."""
        held, self.held = self.held, -1
        if held >= 0:
            with suppress(OSError):
                os.close(held)


def delete(path: Path) -> None:
    """Delete a file of ours if we can. Windows deletes none that is read-only, as a temp file is if its source is."""
    with suppress(OSError):
        try:
            os.unlink(path)
        except PermissionError:
            found = os.lstat(path)
            if found.st_nlink > 1 or not stat.S_ISREG(found.st_mode):
                raise  # its mode is that of its other names too, or of what a link leads to
            os.chmod(path, 0o600)
            os.unlink(path)


def stage(
    src: Path,
    pieces: list[Piece],
    dst: Path,
    *,
    progress: Progress | None = None,
    check: Check | None = None,
    must_clone: bool = False,
) -> Staged | None:
    """Write `pieces` of `src` to a temp file in the directory of `dst`, onto the disk, and let `check` see its index.

    It has the mode of `src`. Nothing is left on any error. None, with `must_clone`, where blocks cannot be shared.
    """
    staged = Staged(temp_path(dst), dst, "", 0)
    try:
        with file_errors(src, "read"), opened(src) as source, file_errors(dst):
            done = _write_temp(source, src, staged, pieces, progress, must_clone)
        if done is None:
            staged.discard()
            return None
        if check is not None:
            with open_gguf(staged.temp) as index:
                check(index)
    except BaseException:
        staged.discard()
        raise
    staged.how, staged.copied = done.how, done.copied
    return staged


def _write_temp(
    source: int, src: Path, staged: Staged, pieces: list[Piece], progress: Progress | None, must_clone: bool
) -> Copier | None:
    whole = _clone_file(source, src, staged.temp, pieces)
    fd = staged.held = _open_temp(staged, whole)
    temp, dst = staged.temp, staged.dst
    try:
        clones = not whole and os.fstat(source).st_size >= BLOCK and clone_range(source, 0, BLOCK, fd, 0)
        if must_clone and not (clones or whole):
            return None
        if not whole:
            fix = "write to another disk, or use --in-place" if dst != src else "give a DST on another disk"
            require_room(dst, own_bytes(pieces, clones=clones), fix=fix)
        copier = Copier(source, fd, progress, clone=clones)
        copier.write(pieces[:-1] if whole else pieces)
        copier.how = "reflink" if whole else copier.how
        os.ftruncate(fd, total(pieces))
        os.chmod(temp, stat.S_IMODE(os.fstat(source).st_mode))
        sync_file(fd)
    finally:
        if sys.platform == "win32":
            staged.release()  # an open file gets no other name there
    return copier


def _open_temp(staged: Staged, whole: bool) -> int:
    """The temp file, new unless it is `whole` already, open and locked."""
    while True:
        fd = os.open(staged.temp, os.O_RDWR | O_BINARY | (0 if whole else os.O_CREAT | os.O_EXCL), 0o600)
        lock(fd, wait=True)
        if whole or sys.platform == "win32" or still_named(fd, staged.temp):
            return fd
        os.close(fd)  # another process took it for left over before it was locked
        staged.temp = temp_path(staged.dst)


def _clone_file(source: int, src: Path, temp: Path, pieces: list[Piece]) -> bool:
    """macOS shares whole files only: of use where the data keeps its place, so that nothing but the prefix differs."""
    last = pieces[-1]
    if not isinstance(last, Span) or last.start != total(pieces[:-1]) or last.end != os.fstat(source).st_size:
        return False
    return clonefile(src, temp)


def clonefile(src: Path, dst: Path) -> bool:
    """macOS's call of that name; False on other systems and where the file system cannot."""
    if sys.platform != "darwin":
        return False
    import ctypes

    return ctypes.CDLL(None).clonefile(os.fsencode(src.resolve()), os.fsencode(dst), 0) == 0


def require_writable_name(src: Path, dst: Path, force: bool) -> None:
    """Refuse a destination that is the source, a directory, in no directory, a device or a pipe, or taken.

    A link to a file is replaced itself, under `force`; one that leads to anything else is refused like that.
    """
    require_no_directory(dst)
    with file_errors(dst):
        _require_name(src, dst, force)


def require_no_directory(dst: Path) -> None:
    with file_errors(dst):
        found = dst.is_dir()
    if found:
        raise FileTrouble(f"{dst}: this is a directory", why="the new file needs a name", fix="give a file name in it")


def _require_name(src: Path, dst: Path, force: bool) -> None:
    if not dst.parent.is_dir():
        raise FileTrouble(f"{dst}: its directory does not exist", why=f"no {dst.parent}", fix=f"mkdir -p {dst.parent}")
    if dst.exists() and not dst.is_file():
        why = "it is a device, a pipe or a socket, which a new file would replace"
        raise FileTrouble(f"{dst}: this is not a regular file", why=why, fix="give another name")
    if dst.exists() and os.path.samefile(src, dst):
        raise FileTrouble(
            f"{dst}: source and destination are the same file",
            why="the source is never overwritten unless that is asked for",
            fix="give another name, or use --in-place (revert: leave DST out)",
        )
    if os.path.lexists(dst) and not force:
        raise exists(dst)
    journal = journal_path(dst)
    if os.path.lexists(journal):
        raise FileTrouble(
            f"{dst}: a new file of this name would be taken for one that was changed in part",
            why=f"{journal.name} beside it is of an in-place change that was cut short",
            fix=f"give another name, or `mrrope revert {dst}`; delete the journal if its file is gone",
        )


def is_another_name(src: Path, dst: Path) -> bool:
    """Whether `dst` is a hard link of the file `src`, under another name: what linking an untouched shard leaves."""
    return dst.is_file() and os.path.samefile(src, dst) and dst.resolve() != src.resolve()


def exists(dst: Path) -> FileTrouble:
    return FileTrouble(f"{dst}: the file exists", why="it is not overwritten", fix="give another name, or use --force")


def publish(staged: Staged, *, force: bool) -> None:
    """Give a staged file its name, at once and for good. Without `force` a file that appeared meanwhile is kept."""
    if sys.platform == "win32":
        staged.release()
    try:
        with file_errors(staged.dst):
            if force:
                os.replace(staged.temp, staged.dst)
            else:
                _publish_new(staged.temp, staged.dst)
            sync_dir(staged.dst.parent)
    except BaseException:
        staged.discard()
        raise
    staged.release()


def _publish_new(temp: Path, dst: Path) -> None:
    try:
        if sys.platform == "win32":
            os.rename(temp, dst)
            return
        try:
            os.link(temp, dst)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: claim the name, then replace the claim
            os.close(os.open(dst, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            os.replace(temp, dst)
        else:
            os.unlink(temp)
    except FileExistsError:
        raise exists(dst) from None
