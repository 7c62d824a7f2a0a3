"""Changing a model file itself, in the safest way that the file system makes cheap.

In order: a new file that shares the old one's blocks and replaces it at once (xfs, btrfs); the header overwritten where
the new one fits exactly, which padding from an earlier edit allows; blocks inserted or taken away in front of the data
(ext4), both with a journal; a full copy that replaces the file.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.gguf.copy import BLOCK, O_BINARY
from mrrope_gguf.gguf.index import GGUFIndex, require_regular
from mrrope_gguf.gguf.journal import NO_FOLLOW, Journal
from mrrope_gguf.gguf.leftover import delete_unlocked, sweep
from mrrope_gguf.gguf.names import journal_path, shard_set, unfinished_path
from mrrope_gguf.gguf.pieces import Piece, Span, total
from mrrope_gguf.gguf.ranges import lease
from mrrope_gguf.gguf.source import FileState, Source, file_state
from mrrope_gguf.gguf.stage import Check, file_errors, publish, stage
from mrrope_gguf.gguf.together import publish_all, recover_set
from mrrope_gguf.gguf.write import WriteReport
from mrrope_gguf.progress import Progress

_CANNOT_SHIFT = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@dataclass
class Change:
    """A file to become `pieces` of itself, of which the first `prefix` bytes are its new header.

    close: gives up every view of the file, so that it can be had alone. check: of the result's index. state: of the
    file that the pieces were planned for.
    """

    path: Path
    pieces: list[Piece]
    prefix: int
    check: Check
    close: Callable[[], None]
    state: FileState


def change(wanted: Change, progress: Progress | None = None) -> tuple[str, int]:
    """Make the change; how it was done, and the bytes copied. The file is as it was after any error.

    Raises Refused for a file that others share (hard links, a Hub cache), FileTrouble if it is in use or not writable.
    """
    path = wanted.path
    require_changeable(path)
    sweep(path)
    staged = stage(path, wanted.pieces, path, check=wanted.check, must_clone=True)
    if staged is None:
        done = _with_journal(wanted)
        if done is not None:
            return done
        staged = stage(path, wanted.pieces, path, progress=progress, check=wanted.check)
        assert staged is not None  # only must_clone makes stage give up
    wanted.close()  # Windows replaces no file that is mapped
    try:
        _require_unchanged(path, path, wanted.state)
    except BaseException:
        staged.discard()
        raise
    publish(staged, force=True)
    return "in-place replace", staged.copied


def change_model(
    source: Source, shards: list[list[Piece]], prefix: int, check: Check, progress: Progress | None
) -> WriteReport:
    """Change the files of a model in place, from the pieces of each. `source` is closed by it."""
    jobs = [
        (shard, pieces, shard)
        for shard, pieces in zip(source.shards, shards, strict=True)
        if shard == source.path or pieces != [Span(0, os.stat(shard).st_size)]
    ]
    size = sum(map(total, shards))
    if len(jobs) == 1:
        wanted = Change(source.path, shards[0], prefix, check, source.close, source.states[source.path])
        return WriteReport(source.path, *change(wanted, progress), size)
    from mrrope_gguf.gguf.split import stage_shards

    for shard, _, _ in jobs:
        require_changeable(shard)
    staged = stage_shards(source, jobs, progress=progress, check=check)
    source.close()
    try:
        for shard, _, _ in jobs:
            _require_unchanged(shard, shard, source.states[shard])
    except BaseException:
        for one in staged:
            one.discard()
        raise
    publish_all(staged, force=True)
    return WriteReport(source.path, "in-place replace", sum(one.copied for one in staged), size)


def require_changeable(path: Path) -> None:
    """Refuse a file whose bytes are not this name's alone, or that we may not write."""
    real = path.resolve()
    if "blobs" in real.parts and any(part.startswith("models--") for part in real.parts):
        raise Refused(
            f"{path.name}: this file belongs to the Hugging Face cache",
            why=f"it is {real}, which every program that uses the cache shares",
            fix="give a DST, or copy the file out of the cache first",
        )
    if path.is_symlink():
        fix = f"name {real} itself, or give a DST"
        raise Refused(f"{path.name}: this is a symbolic link", why=f"it leads to {real}", fix=fix)
    with file_errors(path, "changed"):
        os.close(_opened(path))


def _opened(path: Path) -> int:
    """A file open for writing into it: no link, and under no other name. Refused for one with several."""
    fd = os.open(path, os.O_RDWR | O_BINARY | NO_FOLLOW)
    links = os.fstat(fd).st_nlink
    if links > 1:
        os.close(fd)
        raise Refused(
            f"{path.name}: this file has {links} names (hard links)",
            why="a change in place would change the file under every one of them",
            fix="give a DST",
        )
    return fd


def _with_journal(wanted: Change) -> tuple[str, int] | None:
    """The two ways that write into the file itself; None where neither is possible."""
    size = os.stat(wanted.path).st_size
    shift = total(wanted.pieces) - size
    if shift % BLOCK:
        return None
    changes = _changes(wanted, shift)
    wanted.close()
    with file_errors(wanted.path, "changed"):
        fd = _opened(wanted.path)  # by now somebody may have put another file there
        try:
            alone = lease(fd)
            if alone is None:
                return None
            if not alone:
                raise _in_use(wanted.path)
            _require_unchanged(fd, wanted.path, wanted.state)
            if not _apply(fd, wanted, changes):
                wanted.state = file_state(fd)  # as it was, but written to
                return None
        finally:
            os.close(fd)
    copied = wanted.prefix + sum(len(piece) for _, piece in changes)
    return ("in-place insert" if shift else "in-place padding"), copied


def _apply(fd: int, wanted: Change, changes: list[tuple[int, Piece]]) -> bool:
    """Journal, change, check, forget; False, with the file as it was, where the file system moves no data."""
    journal = Journal.create(fd, wanted.path, wanted.pieces, wanted.prefix, changes)
    try:
        try:
            journal.apply(fd, changes)
            with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view, GGUFIndex(view, wanted.path, len(view)) as index:
                wanted.check(index)
        except BaseException as error:
            _roll_back(journal, fd, wanted.path, error)
            if isinstance(error, OSError) and error.errno in _CANNOT_SHIFT:
                return False
            raise
        journal.remove()
    finally:
        journal.close()
    return True


def _roll_back(journal: Journal, fd: int, path: Path, why: BaseException) -> None:
    try:
        journal.roll_back(fd)
    except OSError as error:
        raise FileTrouble(
            f"{path.name}: the file was changed in part, and could not be put back",
            why=f"{why}; {error}",
            fix=f"when the disk is well, `mrrope revert {path}` brings the original back from {journal.path.name}",
        ) from None


def _changes(wanted: Change, shift: int) -> list[tuple[int, Piece]]:
    """What differs after the header, at its offset before the change; all other data moves by `shift` as one."""
    at, out = 0, list[tuple[int, Piece]]()
    for piece in wanted.pieces:
        start, at = at, at + len(piece)
        if at <= wanted.prefix:
            continue
        if isinstance(piece, bytes):
            own = piece[max(0, wanted.prefix - start) :]  # what precedes it belongs to the header
            out.append((at - len(own) - shift, own))
            continue
        assert piece.start == start - shift, (piece, start, shift)
        if not isinstance(piece, Span):
            out.append((piece.start, piece))
    return out


def _require_unchanged(file: Path | int, path: Path, state: FileState) -> None:
    """FileTrouble where another process changed or replaced the file after its header was read."""
    if file_state(file) != state:
        raise FileTrouble(
            f"{path.name}: another process has changed this file meanwhile",
            why="what was to be written was made from what it held before",
            fix="see what it is now (`mrrope inspect`), and give the command again if that is still wanted",
        )


def _in_use(path: Path) -> FileTrouble:
    return FileTrouble(
        f"{path.name}: the file is open or mapped in another program",
        why="moving its data in place would change it under that program",
        fix="end that program (llama.cpp? another mrrope?), or give a DST",
    )


def recover(path: str | os.PathLike[str]) -> bool:
    """Undo a change that was cut short; False if there was none. The model is then as it was before the change.

    path: a file of the model; the shards of a split one are looked for by its name. Nothing is written into a file
    that `path` is only a link to, or that has other names: a change in place is made to no such file, so a journal
    beside one was put there. Raises FileTrouble for such a journal, and for one that is damaged or not ours.
    """
    path = Path(path)
    if os.path.lexists(path):  # a shard may be missing now and be there afterwards
        require_regular(path)
    names = shard_set(path)
    with file_errors(path, "brought back"):
        found = [_recover(one) for one in dict.fromkeys([names[0], path])]
    require_regular(path)
    sweep(*names, replaced=True)
    return any(found)


def _recover(path: Path) -> bool:
    journal = journal_path(path)
    unfinished = unfinished_path(journal)
    if os.path.lexists(journal):
        try:
            if recover_set(path):
                return True
        except FileNotFoundError:
            if os.path.lexists(journal):
                raise
    if not os.path.lexists(journal) and (not os.path.lexists(unfinished) or path.is_symlink()):
        return False
    if path.is_symlink():
        raise _beside_a_link(path, journal)
    # who is changing the file has a lease: this waits for it, and what is there afterwards was left behind
    fd = os.open(path, os.O_RDWR | O_BINARY | NO_FOLLOW)
    try:
        alone = lease(fd) is not False
        if os.path.lexists(journal):
            if not alone:
                raise _in_use(path)
            _require_one_name(fd, path, journal)
            kept = Journal.open(path, fd)
            try:
                kept.roll_back(fd)
            finally:
                kept.close()
            return True
        if alone:
            delete_unlocked(unfinished)  # cut short before the file was touched
    finally:
        os.close(fd)
    return False


def _require_one_name(fd: int, path: Path, journal: Path) -> None:
    links = os.fstat(fd).st_nlink
    if links > 1:
        raise FileTrouble(
            f"{path.name}: this file has {links} names (hard links), so the journal beside it is not followed",
            why=f"what {journal.name} holds would change the file under every one of them",
            fix=f"see who made them (find -samefile {path.name}). To go on with this name alone: put a copy (cp) of "
            f"the file in its place, then `mrrope revert {path}`",
        )


def _beside_a_link(path: Path, journal: Path) -> FileTrouble:
    real = path.resolve()
    return FileTrouble(
        f"{path.name}: the journal beside this symbolic link is not followed",
        why=f"what {journal.name} holds would go into {real}, and mrrope changes no file in place through a link",
        fix=f"delete the journal. If you moved the file away after a change of it was cut short: rename the journal to "
        f"{journal_path(real)}, then `mrrope revert {real}`",
    )
