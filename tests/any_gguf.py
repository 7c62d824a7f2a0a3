"""Any sound GGUF file, with what a reader must find in it: a Hypothesis strategy, built on gguf_bytes alone.

Every value type and tensor type, empty arrays, text that is not UTF-8, NULs, alignments from 1 to 4096, 0 to 4
dimensions (some of them 0), records in any order, padding that is not zero, garbage at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests import gguf_bytes as g
from tests.ggml_reader import Info, Reading, Record

ALIGNMENT = b"general.alignment"
ALIGNMENTS = [1 << n for n in range(13)]  # a power of two; ggml refuses any other
# ggml_type: number, elements in a block, bytes of a block (ggml/src/ggml.c)
TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A tensor to be: its name, shape, type and data."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    data: bytes

    @property
    def info(self) -> tuple[bytes, tuple[int, ...], int]:
        return self.name, self.dims, self.type


@dataclass(frozen=True)
class AnyFile:
    """A file, what is in it, and each tensor's data in order."""

    data: bytes
    reading: Reading
    weights: tuple[Weight, ...]


def record_bytes(record: Record) -> bytes:
    if record.item is None:
        value = g.string(record.value[0]) if record.type == g.STRING else record.value[0]
    else:
        items = b"".join(map(g.string, record.value)) if record.item == g.STRING else b"".join(record.value)
        value = g.array(record.item, record.n, items)
    return g.kv(record.key, record.type, value)


def build(
    records: Sequence[Record],
    weights: Sequence[Weight] = (),
    *,
    alignment: int = 32,
    version: int = 3,
    fill: bytes = b"\0",
    end_pad: bool = True,
    rest: bytes = b"",
) -> AnyFile:
    """The file of these records and tensors. `fill` pads, `rest` follows the end."""
    infos, body, section = [], g.head(len(weights), len(records), version), b""
    body += b"".join(map(record_bytes, records))
    for weight in weights:
        infos.append(Info(*weight.info, len(section), len(weight.data)))
        section += weight.data + fill * (-len(weight.data) % alignment)
    body += b"".join(g.tensor(info.name, info.dims, info.type, info.offset) for info in infos)
    if weights:
        body += fill * (-len(body) % alignment)
        if not end_pad:
            section = section[: infos[-1].offset + infos[-1].nbytes]
    reading = Reading(version, alignment, len(body), list(records), infos)
    return AnyFile(body + section + rest, reading, tuple(weights))


def text(key: str, value: str | bytes) -> Record:
    raw = value.encode() if isinstance(value, str) else value
    return Record(key.encode(), g.STRING, None, 1, (raw,))


def number(key: str, kind: int, raw: bytes) -> Record:
    return Record(key.encode(), kind, None, 1, (raw,))


# --- strategies -------------------------------------------------------------------------------------------------------

_words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(str.encode),
    st.binary(max_size=12),
    st.sampled_from([b"", b"\0", b"a\0b", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", "\u202e\x1b[2J".encode()]),
)
_text_keys = st.text("abc._-019", min_size=1, max_size=20).map(lambda s: f"x.{s}".encode())
_odd_keys = st.one_of(
    st.binary(min_size=1, max_size=8).map(b"y.".__add__),
    st.sampled_from([b"GGUF.version", b"\xff", b"a\0b", b"a\0c"]),
)
_rare_keys = st.sampled_from([b"k" * 300, b"\0", b" ", b"general.alignmentx", b"general.alignmen"])
# the gguf package does not get past the odd ones, so most files have none
keys = st.integers(0, 29).flatmap(lambda n: _odd_keys if n == 0 else _rare_keys if n < 4 else _text_keys)
_text_names = st.one_of(
    st.text("abc._019", max_size=20).map(str.encode),
    st.integers(0, 99).map(lambda i: b"blk.%d.attn_q.weight" % i),
    st.sampled_from([b"", b"n" * 63, "\u4e2d".encode() * 21, b"w\0rest"]),
)
_names = st.integers(0, 29).flatmap(lambda n: st.binary(max_size=63) if n == 0 else _text_names)


def _scalar(kind: int) -> st.SearchStrategy[tuple[bytes, ...]]:
    return st.tuples(st.binary(min_size=g.SIZES[kind], max_size=g.SIZES[kind]))


@st.composite
def values(draw: st.DrawFn, key: bytes) -> Record:
    """A record of any type. Numbers are any bits: NaNs and bools of 7 among them."""
    kind = draw(st.sampled_from([*g.SIZES, g.STRING, g.ARRAY, g.ARRAY]))
    if kind == g.STRING:
        return Record(key, kind, None, 1, (draw(_words),))
    if kind != g.ARRAY:
        return Record(key, kind, None, 1, draw(_scalar(kind)))
    item, count = draw(st.sampled_from([*g.SIZES, g.STRING, g.STRING])), draw(st.integers(0, 5))
    if item == g.STRING:
        return Record(key, kind, item, count, tuple(draw(st.lists(_words, min_size=count, max_size=count))))
    size = count * g.SIZES[item]
    return Record(key, kind, item, count, (draw(st.binary(min_size=size, max_size=size)),))


@st.composite
def weights(draw: st.DrawFn, name: bytes) -> Weight:
    kind = draw(st.sampled_from(sorted(TYPES)))
    block, size = TYPES[kind]
    dims = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), min_size=int(block > 1), max_size=4))
    if dims:
        dims[0] *= block
    seed, n = draw(st.binary(min_size=1, max_size=3)), math.prod(dims) // block * size
    return Weight(name, tuple(dims), kind, (seed * (n // len(seed) + 1))[:n])


def _up_to_nul(name: bytes) -> bytes:
    return name.partition(b"\0")[0]


@st.composite
def files(draw: st.DrawFn) -> AnyFile:
    records = [draw(values(key)) for key in draw(st.lists(keys, unique=True, max_size=7))]
    if draw(st.integers(0, 3)):
        records.append(text("general.architecture", "llama"))
    alignment = draw(st.sampled_from(ALIGNMENTS))
    if alignment != 32 or draw(st.booleans()):
        # ggml finds a key by what it reads up to a NUL
        ending = draw(st.sampled_from([*[b""] * 18, b"\0", b"\0x"]))
        records.append(Record(ALIGNMENT + ending, g.U32, None, 1, (g.u32(alignment),)))
    names = draw(st.lists(_names, unique_by=_up_to_nul, max_size=5))
    return build(
        draw(st.permutations(records)),
        [draw(weights(name)) for name in names],
        alignment=alignment,
        version=draw(st.sampled_from([2, 3])),
        fill=draw(st.sampled_from([b"\0", b"\0", b"x"])),
        end_pad=draw(st.booleans()),
        rest=draw(st.sampled_from([b"", b"", b"garbage" * 9])),
    )
