"""Saved states in the user's data folder, found by what they hold: the longest beginning that two texts share counts.

    sessions/key                        what proves that a state was written by this user
    sessions/states/FINGERPRINT/*.state
    sessions/named/*.json               conversations, see named.py

Folders are the user's alone (0700, files 0600). A file is written beside its name, synced and renamed; any number of
processes may use one store at once. What was not used for longest goes first when the limit is passed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..aside import NEW, private_folder
from ..errors import FileTrouble, Refused
from ..gguf.copy import O_BINARY, opened, sync_dir
from ..gguf.stage import delete, file_errors
from ..paths import data_dir
from ..text import printable
from ..user_key import user_key
from .entry import Damaged, Head, OtherVersion, check_state, read_head, seal
from .fingerprint import Fingerprint
from .locks import try_lock

LIMIT = "MRROPE_SESSIONS_MAX"
DEFAULT_LIMIT = 10_000_000_000
_STALE = 60.0  # seconds after which an unlocked temporary file is nobody's
_SUFFIX = ".state"

Note = Callable[[str], object]


@dataclass(frozen=True)
class Found:
    """A saved state of which the first `usable` tokens are those that were asked for."""

    path: Path
    head: Head
    usable: int


@dataclass(frozen=True)
class Entry:
    """A file of the store: its size in bytes, and when it was last used, in seconds since 1970."""

    path: Path
    size: int
    used: float


class Store:
    """The saved states in `folder` (default: `sessions` in the user's data folder), at most `limit` bytes of them.

    limit: None asks MRROPE_SESSIONS_MAX, else 10 GB; 0 keeps nothing. note(line) is told what was refused and why.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, limit: int | None = None, note: Note = lambda _: None
    ) -> None:
        self.folder = Path(folder) if folder is not None else data_dir() / "sessions"
        self.limit = limit_in_bytes() if limit is None else limit
        self.note = note
        self._states = self.folder / "states"

    def find(self, fingerprint: Fingerprint, tokens: Sequence[int], *, more_than: int, n_ctx: int) -> list[Found]:
        """States that begin as `tokens` do, for more than `more_than` tokens; the most useful one first.

        Only heads are read. States that would not fit in n_ctx tokens are passed over. What is damaged is told and
        deleted. A store that is not there or cannot be read finds nothing.
        """
        wanted, found = array("i", tokens), []
        for path in _states(self._states / fingerprint.key):
            head = self._head(path, fingerprint)
            if head is None or len(head.tokens) > n_ctx:
                continue
            n = shared(head.tokens, wanted)
            usable = n if head.whole or n == len(head.tokens) else 0
            if usable > more_than:
                found.append(Found(path, head, usable))
        return sorted(found, key=lambda one: (-one.usable, len(one.head.tokens)))

    def load(self, found: Found, read: Callable[[str], None]) -> None:
        """Check every byte of a state and let read(path) hand llama.cpp's file to llama.cpp.

        Raises Damaged, and the file is gone then, FileTrouble where it cannot be read, and what `read` raises.
        """
        with file_errors(found.path, "read"):
            fd = os.open(found.path, os.O_RDONLY | O_BINARY)
        try:
            try_lock(fd, shared=True)  # a lock that is refused is a deletion under way, which an open file outlives
            with file_errors(found.path, "read"):
                head = read_head(fd, self._key(), found.head.parts)
                check_state(fd, head)
            # the very file that was checked, whatever its name means by now
            proc = f"/proc/self/fd/{fd}"
            read(proc if os.path.exists(proc) else str(found.path))
        except Damaged:
            delete(found.path)
            raise
        finally:
            with suppress(OSError):
                os.close(fd)
        with suppress(OSError):
            os.utime(found.path)

    def save(
        self, fingerprint: Fingerprint, tokens: Sequence[int], write: Callable[[str], None], *, size: int, whole: bool,
        scale: float,
    ) -> Path:  # fmt: skip
        """Keep a state under its tokens: write(path) makes llama.cpp's file, of about `size` bytes. Returns its place.

        The place does not hold less than before, whenever this is cut short. Raises FileTrouble.
        """
        folder = self._states / fingerprint.key
        dst = folder / f"{_name(fingerprint, tokens)}{_SUFFIX}"
        if size > self.limit:
            raise FileTrouble(
                f"{printable(str(dst))}: the state was not saved",
                why=f"it has {size} bytes, and all of them together may have {self.limit}",
                fix=f"raise {LIMIT} (now {limit_words(self.limit)})",
            )
        with file_errors(dst):
            self._private(folder)
            self._sweep()
            if not self._kept(dst, fingerprint):
                self._write(dst, fingerprint, tokens, write, size, whole, scale)
        self._evict(keep=dst)
        return dst

    def discard(self, path: Path) -> bool:
        """Delete a state that nobody is reading; whether it is gone."""
        try:
            fd = os.open(path, os.O_RDONLY | O_BINARY)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            free = try_lock(fd)
            if free and os.name == "posix":
                delete(path)
        finally:
            with suppress(OSError):
                os.close(fd)
        if free:
            delete(path)
        return not path.exists()

    def entries(self) -> list[Entry]:
        """Every state in the store, the one that was not used for longest first."""
        found = []
        for path in _states(self._states, deep=True):
            with suppress(OSError):
                stat = path.stat()
                found.append(Entry(path, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def head(self, path: Path) -> Head | None:
        """What a state says about itself, or None where it is damaged, of another version, or gone."""
        with suppress(FileTrouble, OSError), opened(path) as fd:
            return read_head(fd, self._key())
        return None

    def _head(self, path: Path, fingerprint: Fingerprint) -> Head | None:
        try:
            with opened(path) as fd:
                return read_head(fd, self._key(), fingerprint.parts)
        except OtherVersion:
            return None
        except Damaged as damaged:
            self.note(f"{printable(path.name)}: refused, and read again: {damaged.why}")
            delete(path)
        except (OSError, FileTrouble):
            pass  # gone meanwhile, or not to be read: as good as not there
        return None

    def _kept(self, dst: Path, fingerprint: Fingerprint) -> bool:
        """Whether the same state is there already; then it counts as used now."""
        if not dst.exists() or self._head(dst, fingerprint) is None:
            return False
        os.utime(dst)
        return True

    def _write(
        self, dst: Path, fingerprint: Fingerprint, tokens: Sequence[int], write: Callable[[str], None], size: int,
        whole: bool, scale: float,
    ) -> None:  # fmt: skip
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise FileTrouble(
                f"{printable(str(dst))}: the state was not saved",
                why=f"it has {size} bytes, and {free} are free there",
                fix="free some space, or let MRROPE_DATA name a folder on another disk",
            )
        temp = dst.with_name(f".{dst.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            fd = os.open(temp, NEW, 0o600)
        except FileNotFoundError:  # another process removed the folder, which was empty
            self._private(dst.parent)
            fd = os.open(temp, NEW, 0o600)
        try:
            try_lock(fd)  # says to others that it is not left over
            write(str(temp))
            seal(
                fd, self._key(), tokens, whole=whole, scale=scale, parts=fingerprint.parts, model=fingerprint.name
            )  # fmt: skip
            if os.name == "posix":
                os.replace(temp, dst)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            delete(temp)
            raise
        os.close(fd)
        if os.name != "posix":
            os.replace(temp, dst)  # an open file cannot be renamed there
        sync_dir(dst.parent)

    def _private(self, folder: Path) -> None:
        private_folder(folder)
        if os.name == "posix" and self.folder.stat().st_mode & 0o077:
            self.folder.chmod(0o700)

    def _key(self) -> bytes:
        return user_key(self.folder)

    def _sweep(self) -> None:
        """Delete what killed processes left half written."""
        for pattern in (".*.tmp", "states/*/.*.tmp", "named/.*.tmp"):
            with suppress(OSError):  # a folder that cannot be listed now is no reason not to save
                for path in self.folder.glob(pattern):
                    with suppress(OSError):
                        if time.time() - path.stat().st_mtime > _STALE:
                            self.discard(path)

    def _evict(self, keep: Path) -> None:
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if total <= self.limit:
                break
            if entry.path != keep and self.discard(entry.path):
                total -= entry.size
                with suppress(OSError):
                    entry.path.parent.rmdir()  # only where it was the last


def shared(one: array[int], other: array[int]) -> int:
    """How many tokens two texts begin with alike.

    >>> shared(array("i", [1, 2, 3, 4]), array("i", [1, 2, 9]))
    2
    """
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:  # the first `low` are alike, the first `high` + 1 are not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def limit_in_bytes(text: str | None = None) -> int:
    """A size as MRROPE_SESSIONS_MAX has it (20GB, 500M, 0); by default that variable's. Raises Refused.

    >>> limit_in_bytes("20GB"), limit_in_bytes("1.5m"), limit_in_bytes("0")
    (20000000000, 1500000, 0)
    """
    text = os.environ.get(LIMIT, "") if text is None else text
    if not text.strip():
        return DEFAULT_LIMIT
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if match is None:
        raise Refused(f"{LIMIT}={printable(text)}", why="it is no size", fix="write it as 20GB, 500MB or 0")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def limit_words(size: int) -> str:
    """Bytes as people read them.

    >>> limit_words(553_000_000), limit_words(10_000_000_000)
    ('553 MB', '10 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _name(fingerprint: Fingerprint, tokens: Sequence[int]) -> str:
    return hashlib.sha256(fingerprint.key.encode() + array("i", tokens).tobytes()).hexdigest()[:32]


def _states(folder: Path, *, deep: bool = False) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(folder.glob(f"*/*{_SUFFIX}" if deep else f"*{_SUFFIX}"))
