"""`mrrope revert`: the original file back, byte for byte, from the extended one alone."""

from __future__ import annotations

import hashlib
import os
import time
from functools import partial
from pathlib import Path

from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.gguf.index import GGUFIndex
from mrrope_gguf.gguf.inplace import change_model, recover
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.split import make_shards, original_shards
from mrrope_gguf.gguf.undo import prefix_end
from mrrope_gguf.gguf.write import WriteReport, make_file
from mrrope_gguf.progress import Progress


def revert(
    path: str | os.PathLike[str],
    dst: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> WriteReport:
    """Write the original of an extended model to `dst`, or put it in the extended one's place.

    In place it is as safe and as fast as the file system allows: see inplace.py. An in-place change that was cut short
    is undone first. force: replace a file called `dst`, as for write_new. Raises Refused if the file was not extended,
    BadFile if its undo record is damaged, FileTrouble if it cannot be written; the extended file is then as it was.
    """
    start = time.perf_counter()
    recovered = recover(path)
    with Source.open(path) as source:
        if recovered and dst is None and not source.was_extended:
            size = sum(shard.stat().st_size for shard in source.shards)
            return WriteReport(source.path, "in-place recovery", 0, size, time.perf_counter() - start)
        _require_extended(source)
        report = _write(source, dst, force, progress)
    report.seconds = time.perf_counter() - start
    return report


def _write(source: Source, dst: str | os.PathLike[str] | None, force: bool, progress: Progress | None) -> WriteReport:
    shards = [source.layout.pieces, *original_shards(source)]
    check = partial(_check_original, digest=source.header_sha256, size=source.index.size)
    if dst is None:
        return change_model(source, shards, prefix_end(source.index), check, progress)
    if len(shards) > 1:
        return make_shards(source, shards, Path(dst), force=force, progress=progress, check=check)
    return make_file(source.path, shards[0], Path(dst), force=force, progress=progress, check=check)


def _require_extended(source: Source) -> None:
    if not source.was_extended:
        raise Refused(
            f"{source.path.name}: this file holds no undo record, so there is nothing to revert",
            why="it was not extended by mrrope, or another tool has dropped the record",
            fix="name the file that `mrrope extend` wrote",
        )


def _check_original(index: GGUFIndex, digest: str, size: int) -> None:
    """Raise FileTrouble unless the written file's header is the original's, byte for byte."""
    found = hashlib.sha256(index.raw(0, prefix_end(index))).hexdigest()
    if (found, index.size) != (digest, size):
        raise FileTrouble(
            f"{index.path.name}: what was written is not the original",
            why=f"sha256 {found[:16]}..., {index.size} bytes; expected {digest[:16]}..., {size}",
            fix="check the disk; nothing was replaced",
        )
