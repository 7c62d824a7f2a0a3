"""Several files that get their names together or not at all, whenever that is cut short: the shards of a model.

Before the first of them gets its name, a journal beside it lists them all: magic, sha256 of the list, the list (JSON).
While it is there nobody reads the model, and `recover_set` puts every name back to what it was. When it goes, the model
is the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from mrrope_gguf.aside import NEW
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf.copy import O_BINARY, read_at, sync_dir, sync_file, write_at
from mrrope_gguf.gguf.journal import NO_LINK, require_trusted
from mrrope_gguf.gguf.leftover import delete_unlocked, lock
from mrrope_gguf.gguf.names import TEMP, cut, journal_path, shard_set, unfinished_path
from mrrope_gguf.gguf.stage import Staged, delete, file_errors, publish

MAGIC = b"MRROPES1"
_START = len(MAGIC) + hashlib.sha256().digest_size
_MOST = 64 << 20  # bytes of a list


@dataclass(frozen=True)
class _Move:
    """One file: its temp name, the name that keeps what it replaces, its own name, and whether it replaces a file."""

    temp: str
    aside: str
    dst: str
    replaces: bool

    def safe(self, shards: set[str]) -> bool:
        """Whether these are names that we would have chosen, for a shard of the journal's own model."""
        return (
            isinstance(self.replaces, bool)
            and all(isinstance(name, str) for name in (self.temp, self.aside, self.dst))
            and self.dst in shards
            and (match := TEMP.fullmatch(self.temp)) is not None
            and (match[1], match[2]) == (cut(self.dst), "tmp")
            and self.aside == self.temp.removesuffix("tmp") + "old"
        )

    def undo(self, folder: Path) -> None:
        """The name as it was before; nothing where that is so already."""
        temp, aside, dst = folder / self.temp, folder / self.aside, folder / self.dst
        if self.replaces:
            if os.path.lexists(aside):
                os.replace(aside, dst)
                delete(aside)  # two names of one file are left as they are by a rename
        elif os.path.lexists(dst) and (not os.path.lexists(temp) or os.path.samestat(os.lstat(temp), os.lstat(dst))):
            os.unlink(dst)
        delete(temp)


def publish_all(staged: list[Staged], *, force: bool) -> None:
    """Name all files or none. force: replace files of these names."""
    if len(staged) == 1:
        publish(staged[0], force=force)
        return
    try:
        journal = journal_path(staged[0].dst)
        with file_errors(staged[0].dst):
            moves = [
                _Move(one.temp.name, one.temp.with_suffix(".old").name, one.dst.name, os.path.lexists(one.dst))
                for one in staged
            ]
            fd = _create(journal, moves)
        try:
            try:
                for one, move in zip(staged, moves, strict=True):
                    with file_errors(one.dst):
                        replaces = force and move.replaces
                        if replaces:
                            _set_aside(one.dst, one.dst.with_name(move.aside))
                    publish(one, force=replaces)
                with file_errors(staged[0].dst):
                    journal.unlink()
            except BaseException as error:
                _roll_back(journal, moves, error)
                raise
        finally:
            if fd >= 0:
                with suppress(OSError):  # it is synced, and gone
                    os.close(fd)
    finally:
        for one in staged:
            one.discard()
    for move in moves:
        delete(journal.with_name(move.aside))
    with file_errors(staged[0].dst):
        sync_dir(journal.parent)


def recover_set(first: Path) -> bool:
    """Undo what a process that died had begun with a model; False where its journal is of another kind.

    first: the model's first shard; the journal beside it can name no file but the shards of that model. Raises
    FileTrouble where it is damaged, names others, is not ours or belongs to a living process, OSError without one.
    """
    journal = journal_path(first)
    fd = os.open(journal, os.O_RDONLY | O_BINARY | NO_LINK)
    try:
        require_trusted(fd, journal, os.stat(journal.parent).st_uid, first.name)
        if read_at(fd, len(MAGIC), 0) != MAGIC:
            return False
        if sys.platform != "win32" and not lock(fd):
            raise _in_use(journal)
        moves = _read(fd, first)
        _undo(journal, moves)
    finally:
        os.close(fd)
    return True


def _create(journal: Path, moves: list[_Move]) -> int:
    """Write the journal; it, open and locked for as long as its process lives (-1 on Windows, which has no locks)."""
    new = unfinished_path(journal)
    delete_unlocked(new)  # of a process that was killed
    if os.path.lexists(journal):
        raise _in_use(journal)
    fd = os.open(new, NEW, 0o600)
    try:
        lock(fd)
        text = json.dumps([astuple(move) for move in moves]).encode()
        write_at(fd, MAGIC + hashlib.sha256(text).digest() + text, 0)
        sync_file(fd)
        if sys.platform == "win32":
            os.close(fd)
            fd = -1
        os.replace(new, journal)
        sync_dir(journal.parent)
    except BaseException:
        for leftover in (new, journal):
            delete(leftover)
        if fd >= 0:
            os.close(fd)
        raise
    return fd


def _set_aside(dst: Path, aside: Path) -> None:
    """Keep a file under another name. It keeps its own too, where the file system has hard links."""
    try:
        os.link(dst, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):
        os.replace(dst, aside)


def _roll_back(journal: Path, moves: list[_Move], why: BaseException) -> None:
    """After an error. Where even that fails, the journal stays and the next run does it."""
    try:
        _undo(journal, moves)
    except OSError as error:
        raise FileTrouble(
            f"{journal.parent / moves[0].dst}: some of the model's files were changed, and could not be put back",
            why=f"{why}; {error}",
            fix="run the same command again when the disk is well: it begins with that",
        ) from None


def _undo(journal: Path, moves: list[_Move]) -> None:
    for move in reversed(moves):
        move.undo(journal.parent)
    with suppress(FileNotFoundError):
        journal.unlink()
    sync_dir(journal.parent)


def _read(fd: int, first: Path) -> list[_Move]:
    shards = [shard.name for shard in shard_set(first)]
    size = os.fstat(fd).st_size
    data = read_at(fd, min(size, _MOST), 0)
    text = data[_START:]
    try:
        if hashlib.sha256(text).digest() != data[len(MAGIC) : _START]:
            raise ValueError("its sha256 is not the one it holds")
        moves = [_Move(*values) for values in json.loads(text)]
        if first.name != shards[0] or not all(move.safe(set(shards)) for move in moves):
            raise ValueError(f"it names files that mrrope would not have written with {first.name}")
        if len(moves) < 2 or len({move.dst for move in moves}) < len(moves):
            raise ValueError(f"it names {len(moves)} files, of which some are the same, or too few")
    except (ValueError, TypeError, RecursionError) as error:
        raise FileTrouble(
            f"{journal_path(first).name}: this journal is damaged, so it is not followed",
            why=str(error),
            fix="delete it, and the model's files beside it if they do not open; then run the command again",
        ) from None
    return moves


def _in_use(journal: Path) -> FileTrouble:
    return FileTrouble(
        f"{journal.name.removesuffix('.mrrope-journal')}: another process is writing this model",
        why=f"it holds {journal.name}",
        fix="wait until it is done",
    )
