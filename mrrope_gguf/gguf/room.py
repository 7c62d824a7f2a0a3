"""Room on the disk for what is about to be written, asked for before anything is; and for files held open."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf.copy import BLOCK, O_BINARY, clone_range, opened
from mrrope_gguf.gguf.names import temp_path
from mrrope_gguf.gguf.pieces import Piece, Span, total


def free(directory: Path) -> int:
    """Bytes that we may still write to this directory's file system."""
    if hasattr(os, "statvfs"):
        found = os.statvfs(directory)
        return found.f_bavail * found.f_frsize
    import shutil

    return shutil.disk_usage(directory).free


def own_bytes(pieces: Sequence[Piece], *, clones: bool) -> int:
    """Bytes that a file of these pieces takes on the disk: with `clones` it shares what is a span of another."""
    return total(piece for piece in pieces if not (clones and isinstance(piece, Span)))


def require_room(dst: Path, needed: int, what: str = "this file", fix: str = "write to another disk") -> None:
    """FileTrouble where the file system of `dst` has less than `needed` bytes for us. A hole counts as its bytes."""
    available = free(dst.parent)
    if available < needed:
        raise FileTrouble(
            f"{dst}: the disk has no room for {what}",
            why=f"{needed} bytes needed ({needed / 1e6:.1f} MB), {available} available ({available / 1e6:.1f} MB)",
            fix=f"free some space, or {fix}",
        )


def require_room_for_all(jobs: Sequence[tuple[Path, list[Piece], Path]]) -> None:
    """The same for files (source, its new pieces, new name) that are written one after another into one directory."""
    if not jobs:
        return
    clones = can_clone(max((src for src, _, _ in jobs), key=lambda src: os.stat(src).st_size), jobs[0][2])
    needed = sum(own_bytes(pieces, clones=clones) for _, pieces, _ in jobs)
    require_room(jobs[0][2], needed, "these files" if len(jobs) > 1 else "this file")


def can_clone(src: Path, dst: Path) -> bool:
    """Whether a file `dst` could share blocks with `src`, which a file that is gone again has shown."""
    probe = temp_path(dst)
    with opened(src) as source:
        target = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | O_BINARY, 0o600)
        try:
            return os.fstat(source).st_size >= BLOCK and clone_range(source, 0, BLOCK, target, 0)
        finally:
            with suppress(OSError):
                os.unlink(probe)
            os.close(target)


def allow_open_files(wanted: int) -> None:
    """Raise this process's limit of open files to `wanted`, or as near as it may go: shells give 256 to 1024.

    A mapped file holds one descriptor, and so does a lock: a model in 300 shards would not get through.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
