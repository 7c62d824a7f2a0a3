"""A GGUF file seen as its original: an extended file shows the header it had before, so extending again replaces."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

from mrrope_gguf.errors import BadFile, FileTrouble
from mrrope_gguf.gguf.copy import read_pieces
from mrrope_gguf.gguf.index import Bytes, GGUFIndex, open_gguf, open_split, require_regular
from mrrope_gguf.gguf.names import journal_path
from mrrope_gguf.gguf.pieces import Layout, Piece, Span
from mrrope_gguf.gguf.room import allow_open_files
from mrrope_gguf.gguf.rows import RowRules
from mrrope_gguf.gguf.undo import Undo, damaged, data_pieces, decode, original_layout, prefix_end

FileState = tuple[int, int, int, int]  # device, inode, size, time of the last change in nanoseconds


def file_state(file: Path | int) -> FileState:
    """What tells whether a file is still the one it was."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Source:
    """One model file, or shard 1 of a split model, with its original header.

    path, shards (all files of the model); current: the index of the file as it lies; index: that of the original;
    layout: the original in pieces of the file; header_sha256: of the original up to its tensor data; was_extended;
    states: of the files when they were opened.
    A context manager: `close` gives up the file.
    """

    def __init__(self, path: Path, shards: list[Path], current: GGUFIndex) -> None:
        self.path, self.shards, self.current = path, shards, current
        self.undo = decode(current)
        self.was_extended = self.undo is not None
        self.states: dict[Path, FileState] = {}
        self._shard_indexes: dict[Path, GGUFIndex] = {path: current}
        if self.undo is None:
            self.index, self.layout = current, Layout([Span(0, current.size)])
        else:
            self.layout, header_size = original_layout(current, self.undo)
            self.index = self._rebuilt(self.undo, header_size)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Source:
        """Open a model by any of its files.

        Raises FileTrouble where it cannot be read or an in-place change was cut short, BadFile where it is no GGUF or
        its undo record is damaged.
        """
        path = Path(path)
        require_no_journal(path)  # a header half written would be called malformed
        states = {path: file_state(path)}
        current, shards = open_gguf(path), [path]
        if current.find("split.count") is not None:
            current.close()
            shards = open_split(path)
            allow_open_files(4 * len(shards) + 64)
            for shard in shards:
                require_no_journal(shard)
            states = {shard: file_state(shard) for shard in shards}
            current = open_gguf(shards[0])
        try:
            source = cls(shards[0], shards, current)
        except BaseException:
            current.close()
            raise
        source.states = states
        return source

    @property
    def current_prefix(self) -> int:
        """Bytes of the file as it lies that come before what no edit moves by anything but whole blocks."""
        return self.current.size - (self.index.size - prefix_end(self.index))

    @cached_property
    def header_sha256(self) -> str:
        if self.undo is not None:
            return self.undo.sha256
        return hashlib.sha256(self.index.raw(0, prefix_end(self.index))).hexdigest()

    def header_bytes(self, start: int, end: int) -> bytes:
        """Bytes of the original within its header, padding included."""
        return self._read(self.layout.slice(start, end))

    def shard_index(self, shard: Path) -> GGUFIndex:
        """The index of a shard as it lies."""
        if shard not in self._shard_indexes:
            self._shard_indexes[shard] = open_gguf(shard)
        return self._shard_indexes[shard]

    def shard_layout(self, shard: Path) -> Layout:
        """The original of a shard in pieces of the shard: later ones differ by reordered rows at most.

        Raises BadFile where the undo record does not fit the shard.
        """
        if shard == self.path:
            return self.layout
        try:
            return Layout(data_pieces(self.shard_index(shard), 0, self._rules, {}, undo=True))
        except ValueError as error:
            raise damaged(self.current, f"{shard.name}: {error}") from None

    def shard_of(self, tensor: str) -> GGUFIndex:
        """The index of the shard that holds a tensor, the original's for shard 1. KeyError if none does."""
        return self._holders[tensor]

    def close(self) -> None:
        self.index.close()
        for index in self._shard_indexes.values():
            index.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def _rules(self) -> RowRules:
        return RowRules(self.undo.rows if self.undo else [])

    @cached_property
    def _holders(self) -> dict[str, GGUFIndex]:
        files = [self.index, *(self.shard_index(shard) for shard in self.shards[1:])]
        return {tensor: file for file in files for tensor in file.tensors}

    def _read(self, pieces: list[Piece]) -> bytes:
        return read_pieces(lambda start, size: self.current.raw(start, start + size), pieces)

    def _rebuilt(self, undo: Undo, header_size: int) -> GGUFIndex:
        header = self._read(self.layout.slice(0, header_size))
        if hashlib.sha256(header).hexdigest() != undo.sha256:
            raise damaged(self.current, "the header it makes has another sha256 than the original's")
        try:
            return _OriginalIndex(header, self)
        except BadFile as error:
            raise damaged(self.current, error.what) from None


class _OriginalIndex(GGUFIndex):
    """The index of a rebuilt header, whose tensors lie in the file at hand."""

    def __init__(self, header: Bytes, source: Source) -> None:
        super().__init__(header, source.path, source.layout.size)
        self._source = source

    def tensor_bytes(self, name: str) -> memoryview:
        tensor = self.tensors[name]
        start = self.data_start + tensor.offset
        return memoryview(self._source._read(self._source.layout.slice(start, start + tensor.nbytes)))


def require_no_journal(path: Path) -> None:
    """Raise FileTrouble where an in-place change of this file was cut short, or where it is no file.

    Of a link, the file that it leads to counts too: a change in place, and its journal, lie there.
    """
    require_regular(path)
    for file in dict.fromkeys([path, path.resolve()] if path.is_symlink() else [path]):
        if os.path.lexists(journal_path(file)):
            raise FileTrouble(
                f"{path.name}: an in-place change of this file was cut short",
                why=f"{journal_path(file).name} beside it holds what it overwrote, unless another mrrope is at it now",
                fix=f"`mrrope revert {file}` brings the original back whole",
            )
