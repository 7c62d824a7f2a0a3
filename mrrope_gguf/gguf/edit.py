"""Changes to the header of one GGUF file, laid out so that the new file shares the old one's blocks.

An edited file is a new prefix and the old bytes. Metadata that is not touched is copied as raw bytes, in order, so what
ggml accepts and other tools cannot parse stays as it is. New tensors go first in the data: then every old offset grows
by the same number and the change stays within the prefix. Two padding records make the large parts (vocabulary, tensor
data) move by whole blocks, which is what a reflink or an inserted range needs.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrrope_gguf.errors import BadFile, FileTrouble, Refused
from mrrope_gguf.gguf.copy import BLOCK
from mrrope_gguf.gguf.index import KV, GGUFIndex
from mrrope_gguf.gguf.pieces import Piece, Span, total
from mrrope_gguf.gguf.rows import RowPermutation, RowRules, row_piece, row_rules
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.types import STRUCT_CODES, ValueType, padded
from mrrope_gguf.gguf.undo import (
    COPY,
    LITERAL,
    RENAME,
    Undo,
    data_pieces,
    encode,
    key_end,
    prefix_end,
    tensor_infos,
    undo_key,
)

LARGE = 16 * BLOCK  # metadata worth keeping in step with its blocks


def padding_key(arch: str, number: int = 1) -> str:
    return f"{arch}.rope.scaling.mrrope.padding{number if number > 1 else ''}"


@dataclass(frozen=True)
class NewTensor:
    name: str
    dims: tuple[int, ...]
    type: int
    data: bytes


@dataclass
class Entry:
    """One metadata record of the new file: an old one as it is, an old one under a new key, or new bytes."""

    key: str
    origin: KV | None = None
    record: bytes | None = None

    @property
    def renamed(self) -> bool:
        return self.record is None and self.origin is not None and self.origin.key != self.key

    def pieces(self, index: GGUFIndex) -> list[Piece]:
        if self.record is not None:
            return [self.record]
        assert self.origin is not None  # an entry without bytes of its own stands for an old record
        if self.renamed:
            return [_text(self.key), Span(key_end(self.origin, index), self.origin.end)]
        return [Span(self.origin.start, self.origin.end)]


@dataclass
class Plan:
    """A whole new file, and what its index must say once it is written.

    pieces: of the file on disk that `source` opened; the first `prefix` bytes replace its prefix.
    """

    pieces: list[Piece]
    size: int
    prefix: int
    kvs: list[tuple[str, int, int]] = field(default_factory=list)  # key, start, end
    tensors: list[tuple[str, tuple[int, ...], int, int]] = field(default_factory=list)  # name, dims, type, offset

    def check(self, index: GGUFIndex) -> None:
        """Raise FileTrouble where the index of the written file says anything else than this plan."""
        kvs = [(kv.key, kv.start, kv.end) for kv in index.kvs.values()]
        tensors = [(t.name, t.dims, t.type, t.offset) for t in index.tensors.values()]
        if (kvs, tensors, index.size) != (self.kvs, self.tensors, self.size):
            raise FileTrouble(
                f"{index.path.name}: what was written does not read back as what was meant",
                why=f"{len(kvs)} metadata records, {len(tensors)} tensors, {index.size} bytes; expected "
                f"{len(self.kvs)}, {len(self.tensors)}, {self.size}, each as planned",
                fix="check the disk; nothing was replaced",
            )


class Edit:
    """Changes to one file's header, applied when a plan is asked for; the file itself is not touched.

    Everything is in terms of the original: editing a file that was extended before starts from what it was.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = source.index
        self.keys_set: list[str] = []
        self._entries = [Entry(key, kv) for key, kv in self.index.kvs.items()]
        self._inserted: list[NewTensor] = []
        self._data: dict[str, bytes] = {}
        self._rows: dict[str, RowPermutation] = {}
        self._arch: str | None = None

    @property
    def arch(self) -> str:
        """general.architecture as the edited file will have it."""
        return self._arch if self._arch is not None else self.index.arch

    @property
    def rows(self) -> dict[str, RowPermutation]:
        """The tensors whose rows move, in whichever shard they lie."""
        return self._rows

    def set(self, key: str, kind: ValueType, value: Any, item_type: ValueType | None = None) -> None:
        """Give `key` a value: in the old record's place, or after the last record of its family (`general`, `llama`).

        Keys are one that read alike up to a NUL, as llama.cpp compares them: the first is replaced, others are dropped.
        A list needs ValueType.ARRAY and the type of its items. Raises ValueError if the value does not fit its type.
        """
        if key == "general.alignment":
            raise ValueError("the alignment of a file that shares another's tensor data cannot change")
        self.keys_set.append(key)
        if key == "general.architecture":
            self._arch = str(value)
        record = kv_record(key, kind, value, item_type)
        places = self._places(key)
        if not places:
            self._entries.insert(self._family_end(self._entries, key), Entry(key, None, record))
            return
        origin = self._entries[places[0]].origin
        same = origin is not None and record == self.index.raw(origin.start, origin.end)
        self._entries[places[0]] = Entry(key, origin, None if same else record)
        for at in reversed(places[1:]):
            del self._entries[at]

    def remove(self, key: str) -> None:
        """Drop the record of `key`, if there is one, and all that read alike up to a NUL."""
        for at in reversed(self._places(key)):
            del self._entries[at]

    def remove_family(self, prefix: str) -> None:
        """Drop every record whose key begins with `prefix`, in one pass."""
        self._entries = [entry for entry in self._entries if not entry.key.startswith(prefix)]

    def rename_key(self, old: str, new: str) -> None:
        """Give the value of `old` the key `new`, in its place. ValueError if there is no `old` or a `new` already."""
        self.rename_keys({old: new})

    def rename_keys(self, names: Mapping[str, str]) -> None:
        """The same for many keys, old to new, in one pass."""
        entries = {entry.key: entry for entry in self._entries}
        for old, new in names.items():
            if old not in entries or new in entries:
                raise ValueError(
                    f"cannot rename {old!r} to {new!r}: {'that exists' if old in entries else 'there is none'}"
                )
            entry = entries[new] = entries.pop(old)
            if entry.record is not None:
                entry.record = _text(new) + entry.record[len(_text(old)) :]
            entry.key = new

    def insert_tensor(self, name: str, dims: Sequence[int], ggml_type: int, data: bytes) -> None:
        """Put a tensor before all others; later calls go after earlier ones."""
        if name in self.index.tensors or any(t.name == name for t in self._inserted):
            raise ValueError(f"there is a tensor {name!r} already")
        self._require_new(name)
        self._inserted.append(NewTensor(name, tuple(dims), int(ggml_type), bytes(data)))
        if int(self.index.get("split.count", 0)) > 1:
            kv = self.index.find("split.tensors.count")
            kind = ValueType.INT32 if kv is None else kv.type
            self.set("split.tensors.count", kind, self.index.get("split.tensors.count", 0) + len(self._inserted))

    def replace_tensor(self, name: str, data: bytes) -> None:
        """Give a tensor other data of the same size. The old data goes into the undo record, so keep it small."""
        if name in self._rows:
            raise ValueError(f"the rows of tensor {name!r} are reordered already")
        if len(data) != self.index.tensors[name].nbytes:
            raise ValueError(f"tensor {name!r} has {self.index.tensors[name].nbytes} bytes, not {len(data)}")
        self._data[name] = bytes(data)

    def permute_rows(self, tensor_name: str, permutation: RowPermutation) -> None:
        """Reorder the rows of a 2-D tensor of any type, or the elements of a 1-D bias; in any shard of the model."""
        if tensor_name in self._data:
            raise ValueError(f"the data of tensor {tensor_name!r} is replaced already")
        index = self.source.shard_of(tensor_name)
        row_piece(index.tensors[tensor_name], index.data_start, permutation, permutation.order)
        self._rows[tensor_name] = permutation

    def plan(self, prefix: int | None = None) -> Plan:
        """The new file. `prefix`: make its prefix this long if that takes no more than padding."""
        plan = _Planner(self, self._entries, self._inserted, self._data).plan(0)
        if prefix is not None and prefix > plan.prefix and (prefix - plan.prefix) % BLOCK == 0:
            wider = _Planner(self, self._entries, self._inserted, self._data).plan(prefix - plan.prefix)
            return wider if wider.prefix == prefix else plan
        return plan

    def _require_new(self, name: str) -> None:
        for shard in self.source.shards[1:]:
            if name in self.source.shard_index(shard).tensors:
                raise Refused(
                    f"{shard.name}: this shard holds {name}, which belongs in shard 1",
                    why="only the header of shard 1 is rewritten, and a tensor cannot be in two shards",
                    fix="join the shards first: llama-gguf-split --merge",
                )

    def _places(self, key: str) -> list[int]:
        """Where the records lie that llama.cpp would take for `key`: it compares up to a NUL and takes the first."""
        read = key.partition("\0")[0]
        return [i for i, entry in enumerate(self._entries) if entry.key.partition("\0")[0] == read]

    @staticmethod
    def _family_end(entries: Sequence[Entry], key: str) -> int:
        family = key.partition(".")[0] + "."
        members = [i for i, entry in enumerate(entries) if entry.key.startswith(family)]
        return members[-1] + 1 if members else len(entries)


class _Planner:
    """One new file in the making: entries with undo record and padding, then infos, then data."""

    def __init__(self, edit: Edit, entries: list[Entry], inserted: list[NewTensor], data: dict[str, bytes]) -> None:
        self.index, self.source, self.arch = edit.index, edit.source, edit.arch
        self.inserted, self.data = inserted, data
        self.rules = row_rules(edit.rows)
        self.shift = sum(padded(len(t.data), self.index.alignment) for t in inserted)
        self.block = max(BLOCK, self.index.alignment)
        self.entries = list(entries)
        self._add_bookkeeping()

    def plan(self, room: int) -> Plan:
        infos = self._infos()
        n_tensors = len(self.inserted) + len(self.index.tensors)
        self._pad_data(len(infos), room)
        header = bytes(self.index.raw(0, 8)) + struct.pack("<QQ", n_tensors, len(self.entries))
        kv_pieces = [entry.pieces(self.index) for entry in self.entries]
        pieces: list[Piece] = [header, *(piece for group in kv_pieces for piece in group), infos]
        pieces.append(bytes(-total(pieces) % self.index.alignment))
        pieces += (t.data + bytes(-len(t.data) % self.index.alignment) for t in self.inserted)
        prefix = total(pieces)
        pieces += self._tail()
        plan = Plan(self.source.layout.under(pieces), total(pieces), prefix, tensors=self._tensors())
        at = len(header)
        for entry, group in zip(self.entries, kv_pieces, strict=True):
            plan.kvs.append((entry.key, at, at := at + total(group)))
        return plan

    def _add_bookkeeping(self) -> None:
        """Put the undo record after its family, padding before the first large old record, in this order.

        The undo record names records by their number, so its place and the padding's are chosen before it is written.
        """
        undo = Entry(undo_key(self.arch))
        for key in (undo.key, padding_key(self.arch), padding_key(self.arch, 2)):
            if any(entry.key == key for entry in self.entries):
                raise BadFile(
                    f"{self.index.path.name}: the original already holds the key {key}",
                    why="mrrope keeps its own records under that name, and this one is not of its making",
                    fix="remove the key with another GGUF tool",
                )
        self.entries.insert(Edit._family_end(self.entries, undo.key), undo)
        large = self._first_large()
        padding = Entry(padding_key(self.arch))
        if large is not None:
            self.entries.insert(large, padding)
        undo.record = kv_record(undo.key, ValueType.STRING, self._undo())
        if large is not None:
            before = 24 + sum(total(entry.pieces(self.index)) for entry in self.entries[:large])
            origin = self.entries[large + 1].origin
            assert origin is not None  # a large record is an old one
            padding.record = _padding(padding.key, (origin.start - before) % self.block, self.block)

    def _first_large(self) -> int | None:
        for i, entry in enumerate(self.entries):
            kv = entry.origin
            if kv is not None and entry.record is None and not entry.renamed and kv.end - kv.start >= LARGE:
                return i
        return None

    def _pad_data(self, infos: int, room: int) -> None:
        """A last record that makes the old data move by whole blocks, and leaves `room` more."""
        end = 24 + sum(total(entry.pieces(self.index)) for entry in self.entries) + infos
        wanted = padded(self.index.infos_end, self.index.alignment) - self.shift
        key = padding_key(self.arch, 2)
        self.entries.append(Entry(key, None, _padding(key, (wanted - end) % self.block, self.block, room)))

    def _infos(self) -> bytes:
        out, offset = [], 0
        for t in self.inserted:
            dims = struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *t.dims)
            out += [_text(t.name), dims, struct.pack("<IQ", t.type, offset)]
            offset += padded(len(t.data), self.index.alignment)
        return b"".join(out) + tensor_infos(self.index.tensors.values(), self.index, self.shift)

    def _tensors(self) -> list[tuple[str, tuple[int, ...], int, int]]:
        out, offset = [], 0
        for t in self.inserted:
            out.append((t.name, t.dims, t.type, offset))
            offset += padded(len(t.data), self.index.alignment)
        return out + [(t.name, t.dims, t.type, t.offset + self.shift) for t in self.index.tensors.values()]

    def _tail(self) -> list[Piece]:
        return data_pieces(self.index, prefix_end(self.index), RowRules(self.rules), self.data)

    def _undo(self) -> str:
        index = self.index
        gap = self.source.header_bytes(index.infos_end, prefix_end(index))
        kv, literals = self._kv_rules()
        if any(gap):
            literals.append(gap)
        changed = [t for t in index.tensors.values() if t.name in self.data]  # in the order of the data
        literals += (bytes(index.tensor_bytes(t.name)) for t in changed)
        undo = Undo(
            size=index.size,
            sha256=self.source.header_sha256,
            n_kv=len(index.kvs),
            n_tensors=len(index.tensors),
            kv=kv,
            inserted=len(self.inserted),
            shift=self.shift,
            gap=[len(gap), int(any(gap))],
            rows=self.rules,
            data=[[t.name, t.nbytes] for t in changed],
            literals=b"".join(literals),
        )
        return encode(undo)

    def _kv_rules(self) -> tuple[list[list[int]], list[bytes]]:
        """How the original's records come from the new file's."""
        now = {entry.origin.key: i for i, entry in enumerate(self.entries) if entry.origin and entry.record is None}
        rules: list[list[int]] = []
        literals: list[bytes] = []
        for key, kv in self.index.kvs.items():
            at = now.get(key)
            if at is None:
                literals.append(bytes(self.index.raw(kv.start, kv.end)))
                if rules and rules[-1][0] == LITERAL:
                    rules[-1][1] += kv.end - kv.start
                else:
                    rules.append([LITERAL, kv.end - kv.start])
            elif self.entries[at].renamed:
                old = bytes(self.index.raw(kv.start + 8, key_end(kv, self.index)))
                literals.append(old)
                rules.append([RENAME, at, len(old)])
            elif rules and rules[-1][0] == COPY and sum(rules[-1][1:]) == at:
                rules[-1][2] += 1
            else:
                rules.append([COPY, at, 1])
        return rules, literals


def _text(text: str) -> bytes:
    """A GGUF string: its length as u64, its bytes."""
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _padding(key: str, fill: int, block: int, room: int = 0) -> bytes:
    """A string record of `fill` + `room` bytes, or of whole blocks more where its key alone takes more than `fill`."""
    record = len(_text(key)) + 12
    while fill < record:
        fill += block
    return kv_record(key, ValueType.STRING, " " * (fill + room - record))


def kv_record(key: str, kind: ValueType, value: Any, item_type: ValueType | None = None) -> bytes:
    """A metadata record as it lies in a file. ValueError if the value does not fit its type.

    >>> kv_record("a.b", ValueType.UINT32, 7).hex()
    '0300000000000000612e620400000007000000'
    """
    if kind is not ValueType.ARRAY:
        return _text(key) + struct.pack("<I", kind) + _values(kind, [value])
    if item_type is None or item_type is ValueType.ARRAY:
        raise ValueError(f"{key}: an array needs a type for its items, and none of arrays")
    return _text(key) + struct.pack("<IIQ", kind, item_type, len(value)) + _values(item_type, value)


def _values(kind: ValueType, values: Sequence[Any]) -> bytes:
    if kind is ValueType.STRING:
        return b"".join(map(_text, values))
    try:
        return struct.pack(f"<{len(values)}{STRUCT_CODES[kind]}", *values)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{values} as {kind.name}: {error}") from None
