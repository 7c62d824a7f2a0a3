"""Files for other programs: a model under a second name, small text files, each there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .gguf.copy import sync_file
from .gguf.names import temp_path
from .gguf.pieces import Piece, Span
from .gguf.source import Source
from .gguf.split import clear, same_index, stage_shards
from .gguf.stage import Staged, exists, file_errors, publish, require_no_directory, require_writable_name
from .gguf.together import publish_all
from .progress import Progress


def link_or_copy(
    path: Path, folder: Path, *, force: bool = False, progress: Progress | None = None
) -> tuple[list[Path], str]:
    """Every file of the model `path` in `folder`, which is made; their new paths, and how.

    "hardlink" where the disk is the same and allows it, else "reflink", "copy_file_range" or "copy".
    A file that is there already as the same one is left. Raises FileTrouble, and nothing is there then.
    """
    with file_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    with Source.open(path) as source:
        jobs: list[tuple[Path, list[Piece], Path]] = [
            (shard, [Span(0, os.stat(shard).st_size)], folder / shard.name) for shard in source.shards
        ]
        names = [name for *_, name in jobs]
        if all(name.exists() and os.path.samefile(shard, name) for shard, _, name in jobs):
            return names, "hardlink"
        clear(names)
        for shard, _, name in jobs:
            require_writable_name(shard, name, force)
        staged = stage_shards(source, jobs, progress=progress, check=same_index(source.current))
        publish_all(staged, force=force)
    return names, staged[0].how


def write_text(path: Path, text: str, *, force: bool = False) -> Path:
    """A UTF-8 file, whole or not at all; its folder is made. Without `force` FileTrouble where it exists."""
    with file_errors(path.parent, "made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    require_no_directory(path)
    if os.path.lexists(path) and not force:
        raise exists(path)
    temp = temp_path(path)
    staged = Staged(temp, path, "copy", len(text))
    try:
        with file_errors(path), open(temp, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            sync_file(file.fileno())
    except BaseException:
        staged.discard()
        raise
    publish(staged, force=force)
    return path
