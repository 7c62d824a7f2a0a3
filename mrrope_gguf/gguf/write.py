"""An edit made into a file: a new one beside the old, or the old one itself changed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.leftover import sweep
from mrrope_gguf.gguf.pieces import Piece, total
from mrrope_gguf.gguf.stage import Check, publish, require_writable_name, stage
from mrrope_gguf.progress import Progress


@dataclass
class WriteReport:
    """What was written and how.

    how: "reflink", "copy_file_range" or "copy" for a new file; "in-place padding", "in-place insert" or
    "in-place replace" for a changed one, "in-place recovery" for one brought back from a change that was cut short.
    bytes_copied: really written, shared blocks not among them. size: bytes of the model, all its shards.
    """

    path: Path
    how: str
    bytes_copied: int
    size: int
    seconds: float = 0.0


def write_new(
    edit: Edit, dst: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
) -> WriteReport:
    """Write the edited model to `dst`: whole, on the disk and read back before it has its name, or not at all.

    A split model gets all its shards, named after `dst`. progress: called with (bytes done, in all) while bytes must be
    copied for want of shared blocks. force: replace a file called `dst`; where that is a link, the link is replaced and
    not the file it leads to. Raises FileTrouble; the source is never written, nor is a device, pipe or directory.
    """
    start = time.perf_counter()
    if len(edit.source.shards) > 1:
        from mrrope_gguf.gguf.split import write_split

        report = write_split(edit, Path(dst), force=force, progress=progress)
    else:
        plan = edit.plan()
        report = make_file(edit.source.path, plan.pieces, Path(dst), force=force, progress=progress, check=plan.check)
    report.seconds = time.perf_counter() - start
    return report


def write_in_place(edit: Edit, *, progress: Progress | None = None) -> WriteReport:
    """Change the model file itself, keeping what it takes to undo that; the way is chosen as inplace.py says.

    The edit's source is closed by it. Raises Refused for a file that others share, FileTrouble if it is in use or
    cannot be written; it is then as it was.
    """
    from mrrope_gguf.gguf.inplace import change_model
    from mrrope_gguf.gguf.split import edited_shards

    start = time.perf_counter()
    plan = edit.plan(edit.source.current_prefix)
    shards = [plan.pieces, *edited_shards(edit)]
    report = change_model(edit.source, shards, plan.prefix, plan.check, progress)
    report.seconds = time.perf_counter() - start
    return report


def make_file(
    src: Path, pieces: list[Piece], dst: Path, *, force: bool, progress: Progress | None, check: Check | None
) -> WriteReport:
    """One new file from pieces of another."""
    sweep(dst)
    require_writable_name(src, dst, force)
    staged = stage(src, pieces, dst, progress=progress, check=check)
    assert staged is not None  # only must_clone makes stage give up
    publish(staged, force=force)
    return WriteReport(dst, staged.how, staged.copied, total(pieces))
