"""Malformed GGUF files, one named case each, and odd ones that llama.cpp reads all the same.

A bad file is what lies before the wrong bytes, the wrong bytes and what follows, so the offset its error should name
is the length of the first part. `python -m tests.bad_gguf DIR` writes every case to DIR.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tests.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    SIZES,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    gguf,
    head,
    kv,
    pad,
    string,
    strings,
    tensor,
    u32,
    u64,
)

TENSOR_F32, TENSOR_F16, TENSOR_Q4_0, TENSOR_Q8_0, TENSOR_Q4_K, TENSOR_I8, TENSOR_F64 = 0, 1, 2, 8, 12, 24, 28
GIB = 2**30
HUGE = {"2^61": 2**61, "2^62": 2**62, "2^63": 2**63, "2^64-1": 2**64 - 1, "1GiB+1": GIB + 1, "1GiB": GIB}

ARCH = kv("general.architecture", STRING, string("llama"))
CONTEXT = kv("llama.context_length", U32, u32(2048))
ROOM = b"\0" * 4096  # so that a record is refused for what it says, not for the end of the file


@dataclass(frozen=True)
class Bad:
    """A file to refuse, the byte and the field its error names; `ggml_reads`: ggml itself lets it pass."""

    data: bytes
    offset: int
    field: str
    ggml_reads: bool = False


CASES: dict[str, Bad] = {}


def bad(name: str, field: str, before: bytes, wrong: bytes, after: bytes = b"", *, ggml_reads: bool = False) -> None:
    assert name not in CASES, name
    CASES[name] = Bad(before + wrong + after, len(before), field, ggml_reads)


def bad_kv(name: str, part: str, before: bytes, wrong: bytes, after: bytes = ROOM) -> None:
    """Wrong in the second record, whose key is "k" wherever it could be read."""
    field = f"kv[1].{part}" + (" (k)" if before else "")
    bad(name, field, head(0, 3) + ARCH + before, wrong, after)


def bad_tensor(name: str, part: str, before: bytes, wrong: bytes, after: bytes = ROOM) -> None:
    """Wrong in the info record of the only tensor, called "t" wherever its name could be read."""
    field = f"tensor[0].{part}" + (" (t)" if before else "")
    bad(name, field, head(1, 1) + ARCH + before, wrong, after)


def add_preambles() -> None:
    sound = gguf([ARCH])
    bad("empty", "magic", b"", b"")
    bad("magic-truncated", "magic", b"", b"GGU")
    magics = {
        "GGML": b"GGML",
        "reversed": b"FUGG",
        "lower-case": b"gguf",
        "zip": b"PK\x03\x04",
        "html": b"<!DO",
        "zero": b"\0" * 4,
    }
    for name, magic in magics.items():
        bad(f"magic-{name}", "magic", b"", magic, sound[4:])
    bad("git-lfs-pointer", "magic", b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    for version in (0, 1, 4, 99, 0x10003, 2**31, 2**32 - 1, 0x03000000, 0x02000000, 0x10000):
        bad(f"version-{version:#x}", "version", b"GGUF", u32(version), sound[8:])
    for field, start in {"version": 4, "n_tensors": 8, "n_kv": 16}.items():
        bad(f"{field}-missing", field, sound[:start], b"")
        bad(f"{field}-truncated", field, sound[:start], sound[start : start + 3])


def add_counts() -> None:
    # ggml compares with SIZE_MAX / sizeof its record: 88 bytes for metadata, 344 for a tensor in usual 64-bit builds
    counts = {"-1": -1, "-2^63": -(2**63), "2^40": 2**40, "2^61": 2**61, "2^63-1": 2**63 - 1}
    for name, n in [*counts.items(), ("SIZE_MAX-over-88+1", (2**64 - 1) // 88 + 1)]:
        bad(f"n_kv-{name}", "n_kv", head(0, 0)[:16], u64(n), ARCH + ROOM)
    for name, n in [*counts.items(), ("SIZE_MAX-over-344+1", (2**64 - 1) // 344 + 1)]:
        bad(f"n_tensors-{name}", "n_tensors", head(0, 0)[:8], u64(n), u64(1) + ARCH + ROOM)
    bad("n_kv-one-too-many", "kv[2].key", head(0, 3) + ARCH + CONTEXT, b"")
    bad("n_tensors-one-too-many", "tensor[1].name", head(2, 1) + ARCH + tensor("t", (8,)), b"")


def add_keys() -> None:
    for name, n in HUGE.items():
        bad_kv(f"key-length-{name}", "key", b"", u64(n))
    bad_kv("key-one-byte-too-long", "key", b"", u64(30), b"k" * 29)
    bad_kv("key-length-truncated", "key", b"", b"\1\0\0", b"")
    bad_kv("key-truncated", "key", b"", u64(100) + b"k" * 40, b"")
    bad_kv("key-empty", "key", b"", kv("", U32, u32(1)))
    for name, second in {"same-type": CONTEXT, "other-type": kv("llama.context_length", U8, b"\1")}.items():
        before = head(0, 3) + CONTEXT + ARCH
        bad(f"key-twice-{name}", "kv[2].key (llama.context_length)", before, second)
    for name, key, shown in [("nul", b"a\0b", "a\\x00b"), ("escapes", b"\x1b[2J\xff", "\\x1b[2J\\xff")]:
        record = kv(key, U8, b"\1")
        bad(f"key-twice-with-{name}", f"kv[1].key ({shown})", head(0, 2) + record, record)


def add_values() -> None:
    key = string("k")
    for name, kind in {"13": 13, "-1": -1, "255": 255, "2^31": 2**31}.items():
        bad_kv(f"value-type-{name}", "type", key, u32(kind))
        bad_kv(f"item-type-{name}", "item type", key + u32(ARRAY), u32(kind))
    bad_kv("value-type-truncated", "type", key, b"\4\0", b"")
    bad_kv("item-type-truncated", "item type", key + u32(ARRAY), b"\4\0", b"")
    bad_kv("count-truncated", "count", key + u32(ARRAY) + u32(U8), b"\4\0", b"")
    for kind, size in SIZES.items():
        bad_kv(f"value-truncated-type-{kind}", "value", key + u32(kind), b"\0" * (size - 1), b"")
        exact = b"\0" * (3 * size - 1)
        bad_kv(f"array-truncated-type-{kind}", "count", key + u32(ARRAY) + u32(kind), u64(3), exact)
    for name, n in HUGE.items():
        bad_kv(f"string-length-{name}", "value", key + u32(STRING), u64(n))
        bad_kv(f"array-u8-count-{name}", "count", key + u32(ARRAY) + u32(U8), u64(n))
        bad_kv(f"array-f64-count-{name}", "count", key + u32(ARRAY) + u32(F64), u64(n))
        bad_kv(f"array-str-count-{name}", "count", key + u32(ARRAY) + u32(STRING), u64(n))
        bad_kv(f"array-str-item-length-{name}", "value", key + u32(ARRAY) + u32(STRING) + u64(2) + string("a"), u64(n))
    bad_kv("string-truncated", "value", key + u32(STRING), u64(9), b"a" * 8)
    bad_kv("string-length-truncated", "value", key + u32(STRING), b"\1", b"")
    bad_kv("array-str-truncated", "value", key + u32(ARRAY) + array(STRING, 2, string("abcdefgh")), u64(2), b"a")
    bad_kv("array-nested", "item type", key + u32(ARRAY), array(ARRAY, 1, array(U8, 1, b"\1")))
    bad_kv("array-nested-empty", "item type", key + u32(ARRAY), array(ARRAY, 0, b""))


def bad_alignment(name: str, value: bytes, kind: int = U32, key: str = "general.alignment") -> None:
    part = "value" if kind == U32 else "type"
    before = head(1, 2) + ARCH + string(key) + (u32(kind) if kind == U32 else b"")
    field = f"kv[1].{part} ({key})".replace("\0", "\\x00")
    after = tensor("t", (8,)) + ROOM
    bad(f"alignment-{name}", field, before, value if kind == U32 else u32(kind) + value, after)


def add_alignments() -> None:
    for n in (0, 3, 33, 2**31 + 1, 2**32 - 1):
        bad_alignment(str(n), u32(n))
    bad_alignment("i32", u32(32), I32)
    bad_alignment("u64", u64(32), U64)
    bad_alignment("str", string("32"), STRING)
    bad_alignment("array-of-u32", array(U32, 1, u32(32)), ARRAY)
    bad_alignment("3-key-with-nul", u32(3), key="general.alignment\0x")  # ggml compares keys as C strings
    body = head(1, 2) + ARCH + kv("general.alignment", U32, u32(2**31)) + tensor("t", (8,))
    bad("alignment-2^31", "data", body, ROOM)


def add_names() -> None:
    for n in (64, 65, 200, 2000):
        name = "n" * n
        shown = name if n <= 80 else name[:80] + "..."
        bad(f"tensor-name-{n}", f"tensor[0].name ({shown})", head(1, 1) + ARCH, tensor(name, (8,)), ROOM)
    for name, n in HUGE.items():
        bad_tensor(f"tensor-name-length-{name}", "name", b"", u64(n))
    for case, first, second, shown in [
        ("same", "t", "t", "t"),
        ("empty", "", "", ""),
        ("after-nul", "t\0a", "t\0b", "t"),
        ("nul-or-none", "t", "t\0", "t"),
    ]:
        before = head(2, 1) + ARCH + tensor(first, (8,))
        bad(f"tensor-twice-{case}", f"tensor[1].name ({shown})", before, tensor(second, (8,), 0, 32), ROOM)


def add_shapes() -> None:
    name = string("t")
    for n in (5, 6, 2**31, 2**32 - 1):
        bad_tensor(f"n_dims-{n}", "n_dims", name, u32(n))
    for n, what in {-1: "-1", -(2**63): "-2^63"}.items():
        for i in range(4):
            bad_tensor(f"dims[{i}]-{what}", f"dims[{i}]", name + u32(4) + u64(1) * i, u64(n))
    products = {  # where it overflows, dims
        "2^32x2^32": (1, (2**32, 2**32)),
        "2^62x2": (1, (2**62, 2)),
        "2^31x2^31x2^31": (2, (2**31, 2**31, 2**31)),
        "2^62x2x0": (1, (2**62, 2, 0)),  # ggml multiplies from the left, so the zero comes too late
        "max-x-max": (1, (2**63 - 1, 2**63 - 1)),
        "zero-hides-it": (3, (1, 2**40, 0, 2**30)),  # passes ggml's reader, then ggml_new_tensor aborts
        "zero-after-max": (1, (1, 2**63 - 1, 0)),
    }
    for what, (i, dims) in products.items():
        shape = b"".join(map(u64, dims))
        before = name + u32(len(dims)) + shape[: 8 * i]
        bad_tensor(f"elements-{what}", f"dims[{i}]", before, shape[8 * i :] + u32(0) + u64(0))


def bad_type(name: str, kind: int, dims: tuple[int, ...]) -> None:
    before = string("t") + u32(len(dims)) + b"".join(map(u64, dims))
    bad_tensor(name, "type", before, u32(kind) + u64(0))


def add_types() -> None:
    for kind in (4, 5, 31, 32, 33, 36, 37, 38, 43, 44, 999, -1, -(2**31)):
        bad_type(f"tensor-type-{kind}", kind, (256,))
    bad_type("row-q4_0-33", TENSOR_Q4_0, (33, 2))
    bad_type("row-q4_K-32", TENSOR_Q4_K, (32, 256))
    bad_type("row-q4_0-no-dims", TENSOR_Q4_0, ())
    bad_type("nbytes-f32-2^62", TENSOR_F32, (2**62,))
    bad_type("nbytes-f64-2^61", TENSOR_F64, (2**30, 2**31))


def add_offsets() -> None:
    info = string("t") + u32(1) + u64(8) + u32(0)
    for name, offset in {"1": 1, "32": 32, "2^63": 2**63, "2^64-32": -32, "2^64-1": -1}.items():
        bad_tensor(f"offset-{name}", "offset", info, u64(offset))
    info = head(2, 1) + ARCH + tensor("t", (64,)) + string("u") + u32(1) + u64(8) + u32(0)
    for name, offset in {"same": 0, "overlap": 224, "unpadded": 1, "gap": 288, "wrap": 256 - 2**32}.items():
        bad(f"second-offset-{name}", "tensor[1].offset (u)", info, u64(offset), ROOM)
    odd = head(2, 1) + ARCH + tensor("t", (3,)) + string("u") + u32(1) + u64(8) + u32(0)
    bad("second-offset-not-padded", "tensor[1].offset (u)", odd, u64(12), ROOM)


def add_truncated_infos() -> None:
    record = tensor("t", (8, 2))
    ends = {"name": 0, "n_dims": 9, "dims[0]": 13, "dims[1]": 21, "type": 29, "offset": 33}
    for part, start in ends.items():
        filler = kv("filler", STRING, string("x" * 64))  # keeps the file big enough for one record
        before = head(1, 2) + ARCH + filler + record[:start]
        field = f"tensor[0].{part}" + (" (t)" if start else "")
        bad(f"truncated-in-{part}", field, before, record[start : start + 3])
    before = head(1, 1) + ARCH + u64(9)
    bad("truncated-in-name-text", "tensor[0].name", before[:-8], before[-8:] + b"abcdefgh" + b"")


def bad_data(name: str, infos: list[bytes], have: int, start: int, field: str, *, ggml_reads: bool = False) -> None:
    """The data section has `have` bytes; the one the error names begins at `start` of it, cut to what there is."""
    body = pad(head(len(infos), 1) + ARCH + b"".join(infos))
    bad(name, field, body + b"\0" * min(start, have), b"\0" * (have - min(start, have)), ggml_reads=ggml_reads)


def add_data() -> None:
    one = [tensor("t", (8, 2))]
    for have in (0, 1, 32, 63):
        bad_data(f"data-{have}-of-64-bytes", one, have, 0, "tensor[0].data (t)")
    two = [tensor("t", (3,)), tensor("u", (8,), 0, 32)]
    bad_data("data-second-missing", two, 32, 32, "tensor[1].data (u)")
    bad_data("data-second-truncated", two, 63, 32, "tensor[1].data (u)")
    empty_last = [tensor("t", (3,)), tensor("u", (0,), 0, 32)]
    bad_data("data-empty-tensor-past-the-end", empty_last, 12, 32, "tensor[1].data (u)")
    bad_data("nbytes-i8-2^63-1", [tensor("t", (2**63 - 1,), TENSOR_I8)], 4096, 0, "tensor[0].data (t)")
    bad_data("pad-wraps", [tensor("t", (2**63 - 1,), TENSOR_F16)], 4096, 0, "tensor[0].data (t)")
    halves = [tensor(n, (2**62,), TENSOR_F16, o) for n, o in (("t", 0), ("u", 2**63), ("v", 0))]
    bad_data("sizes-wrap", halves, 4096, 0, "tensor[0].data (t)")
    # ggml computes ne0 * 34 / 32 and lets the product wrap, so a row of 2^59 bytes passes for one of a few
    wraps = [tensor("t", (32 * (2**64 // (32 * 34) + 1),), TENSOR_Q8_0)]
    bad_data("nbytes-block-product-wraps", wraps, 4096, 0, "tensor[0].data (t)", ggml_reads=True)
    unpadded = head(1, 1) + ARCH + tensor("t", (0,))
    assert len(unpadded) % 32
    bad("no-padding-before-data", "data", unpadded, b"")
    bad("data-beyond-the-end", "data", head(1, 1) + ARCH + tensor("t", (8,)), b"")


for add in (add_preambles, add_counts, add_keys, add_values, add_alignments, add_names, add_shapes, add_types):
    add()
for add in (add_offsets, add_truncated_infos, add_data):
    add()


def _aligned(alignment: int) -> bytes:
    kvs = [ARCH, kv("general.alignment", U32, u32(alignment))]
    infos = [tensor("t", (3,)), tensor("u", (5,), 0, -(-12 // alignment) * alignment)]
    return gguf(kvs, infos, [b"t" * 12, b"u" * 20], alignment=alignment)


def _one_tensor(name: str | bytes, dims: tuple[int, ...], nbytes: int, kind: int = 0) -> bytes:
    return gguf([ARCH], [tensor(name, dims, kind)], [b"\1" * nbytes])


SOUND = gguf([ARCH, CONTEXT], [tensor("t", (8,)), tensor("u", (4, 2), 0, 32)], [b"\1" * 32, b"\2" * 32])
ODD: dict[str, bytes] = {
    "sound": SOUND,
    "version-2": gguf([ARCH, CONTEXT], [tensor("t", (8,))], [b"\1" * 32], version=2),
    "nothing-at-all": head(0, 0),
    "no-tensors": gguf([ARCH, CONTEXT]),
    "no-metadata": gguf([], [tensor("t", (8,))], [b"\1" * 32]),
    "architecture-last": gguf([CONTEXT, ARCH]),
    "unknown-keys": gguf([ARCH, kv("what.is.this", U16, b"\1\2"), kv("-", F32, u32(1))]),
    "trailing-garbage": SOUND + b"garbage" * 9,
    "trailing-garbage-no-tensors": gguf([ARCH]) + b"garbage",
    "no-end-pad": gguf([ARCH], [tensor("t", (8,)), tensor("u", (5,), 0, 32)], [b"\1" * 32, b"\2" * 20], end_pad=False),
    "nul-in-key": gguf([ARCH, kv("a\0b", U8, b"\1"), kv("a\0c", U8, b"\2"), kv("a", U8, b"\3")]),
    "key-not-utf-8": gguf([ARCH, kv(b"\xff\xfe\x80", U8, b"\1")]),
    "string-not-utf-8": gguf([ARCH, kv("s", STRING, string(b"\xff\xc3\x28\0\x80"))]),
    "strings-not-utf-8": gguf([ARCH, kv("s", ARRAY, strings(b"\xff", b"", b"\0"))]),
    "string-empty": gguf([ARCH, kv("s", STRING, string(""))]),
    "bool-of-7": gguf([ARCH, kv("b", BOOL, b"\7"), kv("bs", ARRAY, array(BOOL, 3, b"\0\1\xff"))]),
    "name-of-63": _one_tensor("n" * 63, (8,), 32),
    "name-empty": _one_tensor("", (8,), 32),
    "name-not-utf-8": _one_tensor(b"\xff\xfe", (8,), 32),
    "name-with-nul": _one_tensor("t\0rest", (8,), 32),
    "n_dims-0": _one_tensor("t", (), 4),
    "n_dims-4": _one_tensor("t", (2, 3, 4, 5), 480),
    "dims-0": _one_tensor("t", (0,), 0),
    "dims-0-with-huge": _one_tensor("t", (0, 2**62, 2**62), 0),
    "dims-8x0": _one_tensor("t", (8, 0), 0),
    "dims-0-q4_0": _one_tensor("t", (0, 5), 0, TENSOR_Q4_0),
    "dims-0-between": gguf(
        [ARCH],
        [tensor("a", (8,)), tensor("b", (0,), 0, 32), tensor("c", (8,), 0, 32)],
        [b"\1" * 32, b"", b"\2" * 32],
    ),
    "alignment-key-with-nul": gguf(
        [kv("general.alignment\0x", U32, u32(64)), kv("general.alignment", U32, u32(32))],
        [tensor("t", (8,))],
        [b"\1" * 32],
        alignment=64,
    ),
    "alignment-2^31-no-tensors": gguf([kv("general.alignment", U32, u32(2**31))]),
}
ODD |= {f"alignment-{n}": _aligned(n) for n in (1, 2, 8, 16, 32, 64, 4096, 65536)}
ODD |= {f"value-type-{t}": gguf([ARCH, kv("v", t, b"\1" * n)]) for t, n in SIZES.items()}
ODD |= {f"array-type-{t}": gguf([ARCH, kv("v", ARRAY, array(t, 3, b"\1" * 3 * n))]) for t, n in SIZES.items()}
ODD |= {f"array-empty-type-{t}": gguf([ARCH, kv("v", ARRAY, array(t, 0, b""))]) for t in [*SIZES, STRING]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        (folder / f"{name}.gguf").write_bytes(case.data)
    print(f"{len(CASES)} malformed files in {folder}")
