"""What an in-place change overwrites, kept beside the file until the change is done, and the way back from it.

A journal file holds, in order: magic, u64 length of the facts, the facts (JSON), the old header, the old bytes of the
tensors that change, the new header, sha256 of all before. It gets its name only when it is whole and on the disk, so a
journal that is there can be trusted, and one that is missing means that the file was not touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mrrope_gguf.aside import NEW
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf.copy import BLOCK, CHUNK, O_BINARY, Copier, read_at, read_exactly, sync_dir, sync_file, write_at
from mrrope_gguf.gguf.names import journal_path, unfinished_path
from mrrope_gguf.gguf.pieces import Layout, Piece, Rows, Span, total
from mrrope_gguf.gguf.ranges import shift_range
from mrrope_gguf.gguf.room import require_room

Changes = list[tuple[int, Piece]]  # what comes after the header, at its offset before the change

MAGIC = b"MRROPEJ1"
SAMPLES = 64  # places of the tensor data that are compared after a way back
SAMPLE_BYTES = 4096
NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
NO_LINK: int = NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)


@dataclass
class Facts:
    """Sizes of the file and its header before and after; [offset before, bytes] of tensors that change; samples."""

    old_size: int
    new_size: int
    old_prefix: int
    new_prefix: int
    changed: list[list[int]]
    samples: list[list[int | str]]  # [offset before, sha256]

    @property
    def shift(self) -> int:
        return self.new_size - self.old_size


class Journal:
    """One journal file, open for reading. `start` is where the old header lies in it."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd
        self.facts, self.start = _read_facts(fd, path)

    @classmethod
    def create(cls, file: int, path: Path, pieces: list[Piece], prefix: int, changes: Changes) -> Journal:
        """Keep what turning the open `file` into `pieces` will overwrite: its header and what lies under `changes`."""
        old_size, new_size = os.fstat(file).st_size, total(pieces)
        old_prefix = prefix - (new_size - old_size)
        changed = [[at, len(piece)] for at, piece in changes]
        facts = Facts(old_size, new_size, old_prefix, prefix, changed, _samples(file, old_prefix, old_size))
        old: list[Piece] = [Span(0, old_prefix), *(Span(at, at + size) for at, size in changed)]
        name = journal_path(path)
        new = unfinished_path(name)
        require_room(name, total(old) + prefix, "what this change overwrites", "give a DST on another disk")
        with suppress(FileNotFoundError):
            new.unlink()  # left by a process that was killed, or a link that somebody put there
        fd = os.open(new, NEW, 0o600)
        try:
            _write(fd, file, facts, old, Layout(pieces).slice(0, prefix))
            os.replace(new, name)
            sync_dir(name.parent)
            return cls(name, fd)
        except BaseException:
            os.close(fd)
            for leftover in (new, name):
                with suppress(OSError):
                    leftover.unlink()
            raise

    @classmethod
    def open(cls, path: Path, file: int) -> Journal:
        """The journal of the file at `path`, which is open as `file`.

        FileTrouble if it is damaged, or of somebody who may not write that file.
        """
        name = journal_path(path)
        fd = os.open(name, os.O_RDONLY | O_BINARY | NO_LINK)
        try:
            require_trusted(fd, name, os.fstat(file).st_uid, path.name)
            size = os.fstat(fd).st_size
            if size < 48 or _digest(fd, size - 32) != read_at(fd, 32, size - 32):
                raise _damaged(name, "its sha256 is not the one it ends with")
            return cls(name, fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        os.close(self.fd)

    def remove(self) -> None:
        """The change is done, or undone: forget what it overwrote."""
        self.path.unlink()
        with suppress(OSError):  # after a power cut it may be there again, and undo the change: nothing is lost
            sync_dir(self.path.parent)

    def apply(self, file: int, changes: Changes) -> None:
        """Make the change: move the data, write the new header, then the tensors that change, from their old bytes."""
        facts = self.facts
        if facts.shift:
            shift_range(file, facts.shift)
        at = self.start + facts.old_prefix
        _copy(self.fd, at + sum(size for _, size in facts.changed), facts.new_prefix, file, 0)
        for offset, piece in changes:
            if isinstance(piece, Rows):
                piece = Rows(at, at + len(piece), piece.row_bytes, piece.order)
            Copier(self.fd, file).write([piece], offset + facts.shift)
            at += len(piece)
        sync_file(file)

    def roll_back(self, file: int) -> None:
        """Put the file back as it was, wherever the change was cut short. Can itself be cut short and repeated.

        The size tells whether the data was moved, since that is one call of the file system. FileTrouble, with nothing
        written, if the data is not what it was: then the journal is of another file, or the power failed within that
        call, on a file system that does not make it whole.
        """
        facts = self.facts
        size = os.fstat(file).st_size
        if size not in (facts.old_size, facts.new_size):
            raise _damaged(self.path, f"the file has {size} bytes, not {facts.old_size} or {facts.new_size}")
        self._require_data(file, facts.shift if size != facts.old_size else 0)
        if size != facts.old_size:
            shift_range(file, -facts.shift)
        at = self.start
        for offset, length in [[0, facts.old_prefix], *facts.changed]:
            _copy(self.fd, at, length, file, offset)
            at += length
        sync_file(file)
        self._require_data(file, 0, put_back=True)
        self.remove()

    def _require_data(self, file: int, moved: int, *, put_back: bool = False) -> None:
        """FileTrouble unless the file's data, `moved` from where it was, is what this journal is of.

        put_back: tensors that change hold their old bytes, so places within them count too.
        """
        for place, digest in self.facts.samples:
            at = int(place)
            changing = any(at < start + size and start < at + SAMPLE_BYTES for start, size in self.facts.changed)
            if (put_back or not changing) and _sample(file, at + moved) != digest:
                raise _damaged(self.path, f"the file's data at byte {at} is not what it was")


def require_trusted(fd: int, name: Path, owner: int, into: str) -> None:
    """What a journal holds goes into the file: in a folder that others share, one of theirs is not taken for ours.

    fd, name: of the journal. owner: the user whose file, called `into`, it is of. Raises FileTrouble.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise _damaged(name, "it is no regular file")
    if found.st_nlink > 1:  # it is made under one name, so somebody has put a file of another place here
        raise FileTrouble(
            f"{name.name}: this journal is not followed",
            why=f"it has {found.st_nlink} names (hard links), and mrrope gives it one",
            fix=f"delete it if nobody changed {into} in place; else put a copy of it (cp) in its place",
        )
    if os.name == "posix" and (
        found.st_uid not in (0, os.geteuid(), owner) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        mode = stat.S_IMODE(found.st_mode)
        raise FileTrouble(
            f"{name.name}: this journal is not ours",
            why=f"user {found.st_uid} owns it, with mode {mode:o}, and what it holds would be written into {into}",
            fix="see who put it there; delete it if nobody changed the file in place",
        )


def _write(fd: int, file: int, facts: Facts, old: list[Piece], new_header: list[Piece]) -> None:
    text = json.dumps(asdict(facts)).encode()
    end = Copier(file, fd).write([MAGIC + struct.pack("<Q", len(text)) + text, *old, *new_header])
    write_at(fd, _digest(fd, end), end)
    sync_file(fd)


def _read_facts(fd: int, path: Path) -> tuple[Facts, int]:
    try:
        magic, length = struct.unpack("<8sQ", read_exactly(fd, 16, 0))
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r}")
        size = os.fstat(fd).st_size
        if length > size:
            raise ValueError(f"its facts have {length} bytes, and it has {size}")
        facts = Facts(**json.loads(read_exactly(fd, length, 16)))
        _require_sound(facts, size - 16 - length)
        return facts, 16 + length
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(path, str(error)) from None


def _require_sound(facts: Facts, rest: int) -> None:
    """Raise ValueError unless these are facts of a change that mrrope makes. rest: bytes of the journal after them."""
    sizes = [facts.old_size, facts.new_size, facts.old_prefix, facts.new_prefix]
    sizes += [number for change in facts.changed for number in change]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a size in it is no number, or below 0")
    end, kept = facts.old_prefix, facts.old_prefix + facts.new_prefix + 32
    for offset, length in facts.changed:
        if offset < end:
            raise ValueError(f"a change at byte {offset} lies before byte {end}, where the one before it ends")
        end, kept = offset + length, kept + length
    if not (end <= facts.old_size and facts.new_prefix <= facts.new_size and kept == rest):
        raise ValueError(f"it holds {rest} bytes of a file of {facts.old_size}, and speaks of {kept}, up to byte {end}")
    if facts.new_prefix - facts.old_prefix != facts.shift or facts.shift % BLOCK:
        raise ValueError(f"a header of {facts.new_prefix - facts.old_prefix} bytes more would move data {facts.shift}")
    if [place for place, _ in facts.samples] != list(_places(facts.old_prefix, facts.old_size)):
        raise ValueError("the places at which the file's data is compared are others than mrrope's")


def _digest(fd: int, size: int) -> bytes:
    digest = hashlib.sha256()
    for at in range(0, size, CHUNK):
        digest.update(read_exactly(fd, min(CHUNK, size - at), at))
    return digest.digest()


def _copy(src: int, start: int, size: int, dst: int, at: int) -> None:
    for done in range(0, size, CHUNK):
        write_at(dst, read_exactly(src, min(CHUNK, size - done), start + done), at + done)


def _samples(file: int, start: int, end: int) -> list[list[int | str]]:
    return [[at, _sample(file, at)] for at in _places(start, end)]


def _places(start: int, end: int) -> range:
    return range(start, end, max(SAMPLE_BYTES, (end - start) // SAMPLES))


def _sample(file: int, at: int) -> str:
    return hashlib.sha256(read_at(file, SAMPLE_BYTES, at)).hexdigest()


def _damaged(path: Path, why: str) -> FileTrouble:
    return FileTrouble(
        f"{path.name}: this journal does not bring its file back whole",
        why=why,
        fix="restore the file from a backup or download it again, then delete the journal",
    )
