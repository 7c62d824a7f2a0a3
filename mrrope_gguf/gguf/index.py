"""Where everything lies in a GGUF file: opened in a fraction of a millisecond, values decoded only when asked for.

with open_gguf("model.gguf") as index:
    print(index.arch, index.get("llama.context_length"), len(index.tensors))
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mrrope_gguf import _native
from mrrope_gguf.errors import BadFile, FileTrouble
from mrrope_gguf.gguf.types import STRUCT_CODES, ValueType
from mrrope_gguf.text import printable

Bytes = bytes | bytearray | memoryview | mmap.mmap
VALUE_TYPES = tuple(ValueType)
_MOST_ITEMS = 1 << 22  # a list of more would take hundreds of megabytes


@dataclass(frozen=True, slots=True)
class KV:
    """One metadata record; `start`, `value` and `end` are file offsets.

    start: the key's u64 length. value: a scalar's bytes, a string's u64 length or an array's first element.
    count: 1, or the length of an array, whose element type is `item_type`.
    """

    key: str
    type: ValueType
    item_type: ValueType | None
    count: int
    start: int
    value: int
    end: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: dims[0] is the row length, `offset` counts from data_start, start..end is its info record.

    `name` stops at a NUL, as it does for llama.cpp.
    """

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    nbytes: int
    start: int
    end: int


class GGUFIndex:
    """The header of a GGUF file, and views of its bytes. A context manager: `close` gives up the file.

    path, version, alignment, size (of the file); infos_start, infos_end (the tensor info records); data_start, which is
    infos_end padded, or infos_end itself in a file without tensors.
    """

    def __init__(self, buffer: Bytes, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._buffer = buffer
        self._header = _scan(buffer, path, size)
        self.version: int = self._header.version
        self.alignment: int = self._header.alignment
        self.infos_start: int = self._header.infos_start
        self.infos_end: int = self._header.infos_end
        self.data_start: int = self._header.data_start
        self._view = memoryview(buffer)

    @cached_property
    def kvs(self) -> dict[str, KV]:
        """The metadata records by key, in file order. Keys that are not UTF-8 hold surrogate escapes."""
        records = {}
        for start, key_len, value, end, count, kind, item in self._header.kvs():
            key = self._text(start + 8, key_len)
            item_type = None if item < 0 else VALUE_TYPES[item]
            records[key] = KV(key, VALUE_TYPES[kind], item_type, count, start, value, end)
        return records

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in file order, which is the order of their data too."""
        records = {}
        for start, name_len, end, offset, nbytes, kind, dims in self._header.tensors():
            name = self._text(start + 8, name_len)
            records[name] = Tensor(name, dims, kind, offset, nbytes, start, end)
        return records

    @cached_property
    def _found(self) -> dict[str, KV]:
        """What llama.cpp finds under each key: it compares keys up to a NUL and takes the first."""
        found: dict[str, KV] = {}
        for key, kv in self.kvs.items():
            found.setdefault(key.partition("\0")[0], kv)
        return found

    def find(self, key: str) -> KV | None:
        """The record llama.cpp would find under `key`."""
        return self._found.get(key)

    def get(self, key: str, default: Any = None, *, most: int | None = None) -> Any:
        """The value llama.cpp would find under `key`, decoded now: int, float, bool, str or a list of them.

        most: the first so many elements of an array are enough. Raises BadFile for an array too long to be decoded.
        """
        kv = self.find(key)
        if kv is None:
            return default
        return self._items(kv, most) if kv.type is ValueType.ARRAY else self._values(kv.type, kv.value, 1)[0]

    @property
    def arch(self) -> str:
        """general.architecture. Raises BadFile where it is missing or no string."""
        kv = self.find("general.architecture")
        if kv is None or kv.type is not ValueType.STRING:
            raise BadFile(
                f"{self.path.name}: the file does not say which architecture its model has",
                why="it is missing" if kv is None else f"it is {kv.type.name}, expected STRING",
                fix="convert the model again with llama.cpp's converter",
                offset=self.infos_start if kv is None else kv.start,
                field="general.architecture",
            )
        arch: str = self.get("general.architecture")
        return arch

    def raw(self, start: int, end: int) -> memoryview:
        """The bytes start..end of the file, not copied. A view still held keeps the file mapped after `close`."""
        if not 0 <= start <= end <= len(self._view):
            raise ValueError(f"{start}..{end} is not within the {len(self._view)} bytes at hand")
        return self._view[start:end]

    def tensor_bytes(self, name: str) -> memoryview:
        """The data of a tensor, without padding, not copied. Raises KeyError if there is no such tensor."""
        tensor = self.tensors[name]
        start = self.data_start + tensor.offset
        return self.raw(start, start + tensor.nbytes)

    def close(self) -> None:
        """Give up the file. Views that `raw` returned stay good; the mapping goes when the last of them does."""
        self._view.release()
        if isinstance(self._buffer, mmap.mmap):
            try:
                self._buffer.close()
            except BufferError:
                self._buffer = b""

    def __enter__(self) -> GGUFIndex:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFIndex of {self.path.name}, version {self.version}, {self.size} bytes>"

    def _text(self, start: int, length: int) -> str:
        return str(self._view[start : start + length], "utf-8", "surrogateescape")

    def _items(self, kv: KV, most: int | None) -> list[Any]:
        assert kv.item_type is not None  # an array has one
        count = kv.count if most is None else min(kv.count, most)
        if count > _MOST_ITEMS:
            field = printable(kv.key)
            raise BadFile(
                f"{printable(self.path.name)}: {field} is an array too long to be read",
                why=f"{count} elements, at most {_MOST_ITEMS}; the largest vocabularies have a million",
                fix="download the file again",
                offset=kv.start,
                field=field,
            )
        return self._values(kv.item_type, kv.value, count)

    def _values(self, kind: ValueType, at: int, count: int) -> list[Any]:
        if kind is ValueType.STRING:
            return self._strings(at, count)
        values = struct.unpack_from(f"<{count}{STRUCT_CODES[kind]}", self._view, at)
        return [v != 0 for v in values] if kind is ValueType.BOOL else list(values)

    def _strings(self, at: int, count: int) -> list[str]:
        strings = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self._view, at)
            strings.append(self._text(at + 8, length))
            at += 8 + length
        return strings


def open_gguf(path: str | os.PathLike[str]) -> GGUFIndex:
    """Map a GGUF file and find everything in its header, without reading its vocabulary or weights.

    Raises BadFile, with offset and field, where llama.cpp would refuse the file; FileTrouble if it cannot be read.
    """
    path = Path(path)
    require_regular(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as e:  # ValueError: emptied just now, or more than 32 bits can map
        raise _cannot_read(path, e) from None
    try:
        return GGUFIndex(buffer, path, len(buffer))
    except BaseException:
        if isinstance(buffer, mmap.mmap):
            buffer.close()
        raise


def index_bytes(buffer: Bytes, name: str | os.PathLike[str], size: int | None = None) -> GGUFIndex:
    """The index of a header at hand as bytes: the beginning of a file called `name` that has `size` bytes in all.

    Without `size`, the buffer is the whole file. Raises BadFile as `open_gguf` does.
    """
    return GGUFIndex(buffer, Path(name), len(buffer) if size is None else size)


def _scan(buffer: Bytes, path: Path, size: int) -> _native.GGUFHeader:
    try:
        return _native.scan_gguf(buffer, size)
    except _native.GGUFError as e:
        offset, field, what, why, fix = e.args
    if bytes(buffer[:24]) == b"version https://git-lfs.":
        why, fix = "it is the pointer that Git LFS leaves in place of a file", "`git lfs pull`"
    raise BadFile(
        f"{path.name}: {what}",
        why=why,
        fix=fix or "download the file again",
        offset=offset,
        field=field,
    )


def require_regular(path: Path) -> None:
    """Raise FileTrouble for what is missing, and for what would hang or never end: directories, devices, pipes."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:
        raise _cannot_read(path, e) from None
    if stat.S_ISDIR(mode):
        raise FileTrouble(
            f"{path}: a directory, not a GGUF file", why="a model is a file", fix="name a .gguf file in it"
        )
    if not stat.S_ISREG(mode):
        why = "it is a device, a pipe or a socket"
        raise FileTrouble(f"{path}: this is not a regular file", why=why, fix="save it to a file and name that")


_FIXES: dict[int | None, str] = {
    errno.ENOENT: "check the name",
    errno.EMFILE: "`ulimit -n 4096` in this shell, and again",
}


def _cannot_read(path: Path, error: OSError | ValueError) -> FileTrouble:
    missing = isinstance(error, FileNotFoundError)
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return FileTrouble(
        f"{path}: {'there is no such file' if missing else 'the file cannot be read'}",
        why=why,
        fix=_FIXES.get(getattr(error, "errno", None), "check its permissions and the disk"),
    )


def open_split(path: str | os.PathLike[str]) -> list[Path]:
    """All files of the model that `path` belongs to, in order: its shards, named by any of them, or [path] alone.

    Checks what llama.cpp checks: names `PREFIX-00001-of-00003.gguf`, split.no and the number of tensors in all.
    Raises FileTrouble where a shard is missing or has another name, BadFile where one does not belong.
    """
    path = Path(path)
    with open_gguf(path) as index:
        count = _split_number(index, "split.count", default=1)
        if count <= 1:
            return [path]
        number = _split_number(index, "split.no")
    shards = _shard_paths(path, number, count)
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise FileTrouble(
            f"{path.name}: a shard of the split model is missing: {', '.join(missing)}",
            why=f"{count - len(missing)} of {count} files are in {path.parent}",
            fix="download the missing file to the same directory",
        )
    _check_shards(shards)
    return shards


def _split_number(index: GGUFIndex, key: str, kind: ValueType = ValueType.UINT16, default: int | None = None) -> int:
    """An integer of the split.* family, of the only type that llama.cpp takes for it."""
    kv = index.find(key)
    if kv is None and default is not None:
        return default
    if kv is None or kv.type is not kind:
        raise _bad_shard(index, key, f"it is {'missing' if kv is None else kv.type.name}, expected {kind.name}")
    value: int = index.get(key)
    return value


def _shard_paths(path: Path, number: int, count: int) -> list[Path]:
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    prefix = path.name.removesuffix(ending)
    if prefix in ("", path.name):
        raise FileTrouble(
            f"{path.name}: a shard of a split model has a name that llama.cpp would not find",
            why=f"it is shard {number + 1} of {count}, so its name should end in {ending}",
            fix="rename it, and the others likewise",
        )
    return [path.with_name(f"{prefix}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def _check_shards(shards: list[Path]) -> None:
    total, seen = 0, set[str]()
    for i, shard in enumerate(shards):
        with open_gguf(shard) as index:
            number = _split_number(index, "split.no")
            if number != i:
                raise _bad_shard(index, "split.no", f"it is {number}, expected {i}")
            twice = seen & index.tensors.keys()
            if twice:
                name = min(twice)
                where = index.tensors[name].start
                raise _bad_shard(index, "tensor name", f"{printable(name)!r} is in an earlier shard too", where)
            seen |= index.tensors.keys()
            if i == 0:
                total = _split_number(index, "split.tensors.count", ValueType.INT32)
    if len(seen) != total:
        with open_gguf(shards[0]) as index:
            raise _bad_shard(index, "split.tensors.count", f"it says {total}, the shards hold {len(seen)}")


def _bad_shard(index: GGUFIndex, key: str, why: str, offset: int | None = None) -> BadFile:
    kv = index.find(key)
    if offset is None:
        offset = index.infos_start if kv is None else kv.value
    return BadFile(
        f"{index.path.name}: this is not the shard of a split model that its name says",
        why=why,
        fix="download all shards again",
        offset=offset,
        field=key,
    )
