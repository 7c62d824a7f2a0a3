"""Names of the files that lie beside a model while it is written, within what file systems allow."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

LONGEST = 255  # bytes of a name, on nearly every file system
_KEPT = 100  # bytes that a shortened name keeps: some file systems allow far less than 255


def temp_path(dst: Path) -> Path:
    """Where the file `dst` is written before it gets its name: another one at each call."""
    return dst.with_name(f".{_cut(dst.name)}.{os.urandom(4).hex()}.tmp")


def temp_name(dst: Path) -> re.Pattern[str]:
    """What such names look like, and those of files that a set of new ones takes the place of (see together.py)."""
    return re.compile(rf"\.{re.escape(_cut(dst.name))}\.[0-9a-f]{{8}}\.(tmp|old)")


def journal_path(path: Path) -> Path:
    """Where an in-place change of `path` keeps what it overwrites, until it is done: FILE.mrrope-journal.

    A name too long for that ending is cut, and told apart by its sha256.
    """
    name = path.name + ".mrrope-journal"
    if len(os.fsencode(name)) + len(".new") > LONGEST:
        name = f"{_cut(path.name)}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.mrrope-journal"
    return path.with_name(name)


def first_shard(path: Path) -> Path:
    """The name of shard 1 of the model that `path` is a shard of, by its name; `path` itself where it is none.

    >>> first_shard(Path("m-00003-of-00004.gguf")).name, first_shard(Path("m.gguf")).name
    ('m-00001-of-00004.gguf', 'm.gguf')
    """
    return path.with_name(re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-00001-of-\1", path.name))


def unfinished_path(journal: Path) -> Path:
    """Where a journal is written before it gets its name."""
    return journal.with_name(journal.name + ".new")


def _cut(name: str) -> str:
    """The beginning of a name in whole characters.

    >>> len(os.fsencode(_cut("x" + 200 * "é")))
    99
    """
    name = name[:_KEPT]
    while len(os.fsencode(name)) > _KEPT:
        name = name[:-1]
    return name
