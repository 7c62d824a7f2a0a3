"""Split models: shard 1 holds the header and is rewritten, the others get a second name, and all of it or nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from mrrope_gguf.gguf.copy import O_BINARY
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.index import GGUFIndex
from mrrope_gguf.gguf.leftover import lock, sweep
from mrrope_gguf.gguf.names import journal_path, temp_path
from mrrope_gguf.gguf.pieces import Piece, Span, total
from mrrope_gguf.gguf.room import require_room_for_all
from mrrope_gguf.gguf.rows import RowRules, row_rules
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.stage import (
    Check,
    Staged,
    file_errors,
    is_another_name,
    require_no_directory,
    require_writable_name,
    stage,
)
from mrrope_gguf.gguf.together import publish_all, recover_set
from mrrope_gguf.gguf.undo import data_pieces
from mrrope_gguf.gguf.write import WriteReport
from mrrope_gguf.progress import Progress


def shard_names(dst: Path, count: int) -> list[Path]:
    """Names llama.cpp finds: PREFIX-00001-of-00003.gguf and so on, PREFIX being `dst` without such an ending.

    >>> [p.name for p in shard_names(Path("out-00001-of-00002.gguf"), 2)]
    ['out-00001-of-00002.gguf', 'out-00002-of-00002.gguf']
    >>> shard_names(Path("out.gguf"), 2)[1].name
    'out-00002-of-00002.gguf'
    """
    prefix = dst.name.removesuffix(f"-00001-of-{count:05d}.gguf").removesuffix(".gguf")
    return [dst.with_name(f"{prefix}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def edited_shards(edit: Edit) -> list[list[Piece]]:
    """The pieces of shards 2.. as the edit makes them: themselves, but for tensors whose rows move."""
    source, rules = edit.source, RowRules(row_rules(edit.rows))
    return [
        source.shard_layout(shard).under(data_pieces(source.shard_index(shard), 0, rules, {}))
        for shard in source.shards[1:]
    ]


def original_shards(source: Source) -> list[list[Piece]]:
    """The pieces of shards 2.. as they were."""
    return [source.shard_layout(shard).pieces for shard in source.shards[1:]]


def write_split(edit: Edit, dst: Path, *, force: bool, progress: Progress | None) -> WriteReport:
    plan = edit.plan()
    return make_shards(
        edit.source, [plan.pieces, *edited_shards(edit)], dst, force=force, progress=progress, check=plan.check
    )


def make_shards(
    source: Source, shards: list[list[Piece]], dst: Path, *, force: bool, progress: Progress | None, check: Check
) -> WriteReport:
    """All shards of a new model, from `shards`, the pieces of each; `check` sees the index of the first."""
    require_no_directory(dst)
    names = shard_names(dst, len(source.shards))
    clear(names)
    for src, pieces, name in zip(source.shards, shards, names, strict=True):
        if not (force and _untouched(src, pieces) and is_another_name(src, name)):
            require_writable_name(src, name, force)
    jobs = list(zip(source.shards, shards, names, strict=True))
    staged = stage_shards(source, jobs, progress=progress, check=check)
    publish_all(staged, force=force)
    return WriteReport(names[0], staged[0].how, sum(one.copied for one in staged), sum(map(total, shards)))


def stage_shards(
    source: Source, jobs: list[tuple[Path, list[Piece], Path]], *, progress: Progress | None, check: Check
) -> list[Staged]:
    """A temp file for each (shard, its new pieces, its new name), or none."""
    out: list[Staged] = []
    with ExitStack() as undo:
        links = {}
        for src, pieces, name in jobs:
            if _untouched(src, pieces) and (link := _link(src, name)) is not None:
                undo.callback(link.discard)
                links[name] = link
        with file_errors(jobs[0][2]):
            require_room_for_all([job for job in jobs if job[2] not in links])
        for src, pieces, name in jobs:
            one: Staged | None = links.get(name)
            if one is None:
                seen = same_index(source.shard_index(src)) if src != source.path else check
                one = stage(src, pieces, name, progress=progress, check=seen)
                assert one is not None  # only must_clone makes stage give up
                undo.callback(one.discard)
            out.append(one)
        undo.pop_all()
    return out


def clear(names: list[Path]) -> None:
    """Put back, and delete, what a process that died had begun to write under the names of a model's files."""
    journal = journal_path(names[0])
    with file_errors(names[0], "brought back"):
        if os.path.lexists(journal):
            recover_set(names[0])
    sweep(*names, replaced=True)


def _untouched(src: Path, pieces: list[Piece]) -> bool:
    return pieces == [Span(0, os.stat(src).st_size)]


def _link(src: Path, name: Path) -> Staged | None:
    """A second name for an untouched shard; None where the file system or its owner does not allow one."""
    if sys.platform == "win32" and not os.access(src, os.W_OK):
        return None  # a name of a read-only file could not be taken back
    staged = Staged(temp_path(name), name, "hardlink", 0)
    try:
        if sys.platform != "win32":
            staged.held = os.open(src, os.O_RDONLY | O_BINARY)
            lock(staged.held, shared=True)
        os.link(src.resolve(), staged.temp)
    except OSError:
        staged.discard()
        return None
    return staged


def same_index(old: GGUFIndex) -> Callable[[GGUFIndex], None]:
    """A check that a rewritten shard's header is the old one, byte for byte."""

    def check(new: GGUFIndex) -> None:
        if new.size != old.size or new.raw(0, new.data_start) != old.raw(0, old.data_start):
            raise ValueError(f"{new.path}: the header of a shard changed")

    return check
