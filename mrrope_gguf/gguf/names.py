"""Names of the files that lie beside a model while it is written, within what file systems allow."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

LONGEST = 255  # bytes of a name, on nearly every file system
# temp_path's names, and those of files that a set of new ones takes the place of (see together.py)
TEMP = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)", re.DOTALL)
_KEPT = 100  # bytes that a shortened name keeps: some file systems allow far less than 255


def temp_path(dst: Path) -> Path:
    """Where the file `dst` is written before it gets its name: another one at each call."""
    return dst.with_name(f".{cut(dst.name)}.{os.urandom(4).hex()}.tmp")


def journal_path(path: Path) -> Path:
    """Where an in-place change of `path` keeps what it overwrites, until it is done: FILE.mrrope-journal.

    A name too long for that ending is cut, and told apart by its sha256.
    """
    name = path.name + ".mrrope-journal"
    if len(os.fsencode(name)) + len(".new") > LONGEST:
        name = f"{cut(path.name)}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.mrrope-journal"
    return path.with_name(name)


def shard_set(path: Path) -> list[Path]:
    """The names of all shards of the model that `path` is one of, by its name; [path] where it is none.

    >>> [one.name for one in shard_set(Path("m-00002-of-00002.gguf"))], [one.name for one in shard_set(Path("m.gguf"))]
    (['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf'], ['m.gguf'])
    """
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if match is None or not 0 < int(match[2]) <= int(match[3]):
        return [path]
    return [path.with_name(f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf") for i in range(int(match[3]))]


def unfinished_path(journal: Path) -> Path:
    """Where a journal is written before it gets its name."""
    return journal.with_name(journal.name + ".new")


def cut(name: str) -> str:
    """The beginning of a name in whole characters.

    >>> len(os.fsencode(cut("x" + 200 * "é")))
    99
    """
    name = name[:_KEPT]
    while len(os.fsencode(name)) > _KEPT:
        name = name[:-1]
    return name
