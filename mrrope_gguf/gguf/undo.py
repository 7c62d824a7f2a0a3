"""The undo record: one string in an extended file from which the original comes back, byte for byte.

The original is told in terms of the file that holds the record: which metadata records to copy, which to rename, which
bytes to put instead, how many tensors went in first, which tensors had their rows reordered. It counts records, not
bytes, so neither the record's own length nor another tool's padding can shift it; and it names layers by ranges, so
its size grows neither with the vocabulary nor with the number of tensors.

The string is base64 of zlib of JSON, NUL, literal bytes (in the order in which the rules use them up).
"""

from __future__ import annotations

import binascii
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mrrope_gguf.errors import BadFile, Refused
from mrrope_gguf.gguf.index import KV, GGUFIndex, Tensor
from mrrope_gguf.gguf.pieces import Layout, Piece, Span
from mrrope_gguf.gguf.rows import MAX_RUNS, RowRules
from mrrope_gguf.gguf.types import ValueType, padded
from mrrope_gguf.text import printable

VERSION = 1
MAX_BYTES = 16 << 20  # of a decompressed record: metadata that was replaced, never a vocabulary
MAX_RULES = 1 << 20  # of its JSON, which counts records and layers in ranges
MAX_DIGITS = 20  # of a number: those of 2^64
COPY, RENAME, LITERAL = 0, 1, 2


@dataclass
class Undo:
    """What the record says, decoded. `kv` holds [COPY, first, n], [RENAME, index, key bytes], [LITERAL, bytes]."""

    size: int  # of the original file
    sha256: str  # of its bytes before the tensor data
    n_kv: int
    n_tensors: int
    kv: list[list[int]] = field(default_factory=list)
    inserted: int = 0  # tensors put first
    shift: int = 0  # bytes of data they take, padded
    gap: list[int] = field(default_factory=lambda: [0, 0])  # padding before the data: bytes, and whether any is not 0
    rows: list[list[Any]] = field(default_factory=list)  # [name template, ranges, n_head, n_rot, head_dim]
    data: list[list[Any]] = field(default_factory=list)  # [tensor name, bytes] of tensors whose data was replaced
    literals: bytes = b""


def undo_key(arch: str) -> str:
    return f"{arch}.rope.scaling.mrrope.undo"


def encode(undo: Undo) -> str:
    """The record as the string that goes into the file."""
    rules = asdict(undo)
    literals = rules.pop("literals")
    text = json.dumps({"v": VERSION, **rules}, separators=(",", ":")).encode()
    runs = sum(len(ranges) for _, ranges, *_ in undo.rows)
    if runs > MAX_RUNS:
        raise Refused(
            "the original cannot be kept as an undo record: too many tensors would have their rows moved",
            why=f"{runs} of them, or ranges of layers, at most {MAX_RUNS}",
            fix="leave out --portable: the patched engine extends the model as it is",
        )
    if len(text) > MAX_RULES or len(text) + len(literals) >= MAX_BYTES:
        raise Refused(
            "the original cannot be kept as an undo record",
            why=f"{len(text)} bytes of rules and {len(literals)} of metadata; at most {MAX_RULES} and {MAX_BYTES}",
            fix="shorten the general.* metadata of the original with another GGUF tool",
        )
    return binascii.b2a_base64(zlib.compress(text + b"\0" + literals, 9), newline=False).decode()


def decode(index: GGUFIndex) -> Undo | None:
    """The record of a file, None where it has none. BadFile if damaged, Refused if a newer version wrote it."""
    kv = _record(index)
    if kv is None:
        return None
    if kv.type is not ValueType.STRING:
        raise damaged(index, f"it is {kv.type.name}, expected STRING")
    if kv.end - kv.value > 2 * MAX_BYTES:
        raise damaged(index, f"it has {kv.end - kv.value} bytes, at most {2 * MAX_BYTES}")
    text, name = index.get(kv.key.partition("\0")[0]), index.path.name
    try:
        unzip = zlib.decompressobj()
        plain = unzip.decompress(binascii.a2b_base64(text.encode("ascii")), MAX_BYTES)
        if not unzip.eof or unzip.unused_data:
            raise ValueError("it does not end where it should")
        head, _, literals = plain.partition(b"\0")
        if len(head) > MAX_RULES:
            raise ValueError(f"{len(head)} bytes of rules, at most {MAX_RULES}")
        rules = json.loads(head, parse_int=_whole)
        version = rules.pop("v")
        if type(version) is not int:
            raise ValueError(f"its version is {version!r}, no whole number")
        if version != VERSION:
            raise Refused(
                f"{name}: its undo record was written by a newer mrrope",
                why=f"the record has version {version}, this mrrope knows {VERSION}",
                fix="`pip install -U mrrope-gguf`",
            )
        return Undo(**rules, literals=literals)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
        raise damaged(index, str(error)) from None


def _whole(digits: str) -> int:
    """A number of a record: Python 3.10 takes hours for one of a million digits."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, at most {MAX_DIGITS}")
    return int(digits)


def _record(index: GGUFIndex) -> KV | None:
    arch = index.get("general.architecture", most=0)
    return index.find(undo_key(arch)) if isinstance(arch, str) else None


def damaged(index: GGUFIndex, why: str) -> BadFile:
    """The error for the undo record of a file."""
    kv = _record(index)
    return BadFile(
        f"{index.path.name}: the undo record is damaged, so the original cannot be rebuilt from this file",
        why=printable(why),  # it may quote the record
        fix="download the original again, or restore this file from a backup",
        offset=0 if kv is None else kv.value,
        field="mrrope.undo",
    )


def prefix_end(index: GGUFIndex) -> int:
    """Where a header with its padding ends and the bytes begin that an edit leaves where they are.

    It is the data's start, but for a file without tensors: there, what the data's start would be.
    """
    return min(padded(index.infos_end, index.alignment), index.size)


def tensor_infos(tensors: Iterable[Tensor], index: GGUFIndex, shift: int) -> bytes:
    """The info records of `tensors`, with every offset moved by `shift`: the offset is a record's last 8 bytes."""
    out: list[bytes | memoryview] = []
    for tensor in tensors:
        out += index.raw(tensor.start, tensor.end - 8), struct.pack("<Q", tensor.offset + shift)
    return b"".join(out)


class _Literals:
    """The record's literal bytes, taken in order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if not 0 <= size <= len(self.data) - self.at:
            raise ValueError("it names more bytes than it holds")
        self.at += size
        return self.data[self.at - size : self.at]


def original_layout(index: GGUFIndex, undo: Undo) -> tuple[Layout, int]:
    """The original file in pieces of the file that `index` describes, and the length of its header with padding.

    BadFile if the record does not fit the file. Its sha256 is for the caller to check, once the header is rebuilt.
    """
    try:
        literals = _Literals(undo.literals)
        header = _header(index, undo, literals)
        size = sum(map(len, header))
        if size > prefix_end(index) + len(undo.literals) + MAX_BYTES:
            raise ValueError(f"it makes a header of {size} bytes, copying records more than once")
        tail = _tail(index, undo, literals)
        if size + sum(map(len, tail)) != undo.size:
            raise ValueError(f"the original had {undo.size} bytes, the record makes {size + sum(map(len, tail))}")
        return Layout(header + tail), size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error) as error:
        raise damaged(index, str(error)) from None


def _header(index: GGUFIndex, undo: Undo, literals: _Literals) -> list[Piece]:
    old = list(index.tensors.values())[undo.inserted :]
    if len(old) != undo.n_tensors or not 0 <= undo.inserted <= len(index.tensors):
        raise ValueError(f"the original had {undo.n_tensors} tensors, this file has {len(index.tensors)}")
    records = list(index.kvs.values())
    pieces: list[Piece] = [bytes(index.raw(0, 8)) + struct.pack("<QQ", undo.n_tensors, undo.n_kv)]
    for op, *args in undo.kv:
        pieces += _kv_pieces(op, args, records, index, literals)
    if undo.shift or undo.inserted:
        pieces.append(tensor_infos(old, index, -undo.shift))
    else:
        pieces.append(Span(index.infos_start, index.infos_end))
    length, nonzero = undo.gap
    pieces.append(literals.take(length) if nonzero else bytes(min(length, MAX_BYTES)))
    return pieces


def _kv_pieces(op: int, args: list[int], records: list[KV], index: GGUFIndex, literals: _Literals) -> list[Piece]:
    if op == LITERAL:
        return [literals.take(args[0])]
    first, n = args
    if op == COPY and 0 <= first <= first + n - 1 < len(records):
        return [Span(records[first].start, records[first + n - 1].end)]
    if op == RENAME and 0 <= first < len(records):
        return [struct.pack("<Q", n) + literals.take(n), Span(key_end(records[first], index), records[first].end)]
    raise ValueError(f"it has no rule {op} {args} for {len(records)} metadata records")


def key_end(kv: KV, index: GGUFIndex) -> int:
    """Where a record's key ends and its type begins."""
    (length,) = struct.unpack("<Q", index.raw(kv.start, kv.start + 8))
    return kv.start + 8 + int(length)


def _tail(index: GGUFIndex, undo: Undo, literals: _Literals) -> list[Piece]:
    start = padded(index.infos_end, index.alignment) + undo.shift
    if undo.shift < 0 or start > index.size:
        raise ValueError(f"the original's data would begin at {start} of {index.size} bytes")
    if not all(type(name) is str for name, _ in undo.data):  # other keys can be made to share one hash
        raise ValueError("a tensor's name in it is no string")
    special: dict[str, Piece] = {name: literals.take(size) for name, size in undo.data}
    return data_pieces(index, start, RowRules(undo.rows), special, undo=True)


def data_pieces(
    index: GGUFIndex, start: int, rules: RowRules, special: Mapping[str, Piece], *, undo: bool = False
) -> list[Piece]:
    """The file from `start` to its end, with rows reordered by `rules` and the tensors named in `special` replaced.

    Raises ValueError where a tensor has another size or shape than they say.
    """
    pieces: list[Piece] = []
    for tensor in index.tensors.values() if rules or special else ():
        piece = rules.piece(tensor, index.data_start, undo=undo) or special.get(tensor.name)
        if piece is None:
            continue
        at = index.data_start + tensor.offset
        if len(piece) != tensor.nbytes or at < start:
            raise ValueError(f"tensor {tensor.name!r} has {tensor.nbytes} bytes, not {len(piece)}")
        if tensor.nbytes:
            pieces += [Span(start, at), piece]
            start = at + tensor.nbytes
    return [*pieces, Span(start, index.size)]
