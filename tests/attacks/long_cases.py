"""Headers whose claims are true, in files as long as they say (one hole on the disk): what keeps a reader busy."""

from __future__ import annotations

from tests.attacks.case import Answer, Attack, Refuses, everywhere
from tests.bad_gguf import ARCH
from tests.gguf_bytes import ARRAY, F64, STRING, U8, U32, head, string, u32, u64

CASES: dict[str, Attack] = {}
GIB = 1 << 30
LONG = "the claim is true, and reading on would take {}; no model comes near our limit"
RECORDS = LONG.format("minutes and tens of gigabytes")
TEXT = LONG.format("a second and a gigabyte for each gigabyte of file")


def long(name: str, data: bytes, size: int, answers: dict[str, Answer], note: str = "") -> None:
    name = f"long-{name}"
    CASES[name] = Attack(name, "long", {"m.gguf": data}, answers, sizes={"m.gguf": size}, note=note)


def at(offset: int, field: str) -> dict[str, Answer]:
    return everywhere(Refuses(offset, field))


def add_records() -> None:
    before = head(0, 1)[:8]
    first = 24 + len(ARCH)
    # all zeros: each 24 bytes are a tensor without a name, dimensions or data
    long("n_tensors-2^30", before + u64(2**30) + u64(1) + ARCH, 33 * GIB, at(8, "n_tensors"), RECORDS)
    long("n_tensors-65537", before + u64(65537) + u64(1) + ARCH, 1 << 22, at(8, "n_tensors"), RECORDS)
    long("n_tensors-65536", before + u64(65536) + u64(1) + ARCH, 1 << 22, at(first + 24, "tensor[1].name ()"))
    long("n_kv-2^30", before + u64(0) + u64(2**30) + ARCH, 33 * GIB, at(16, "n_kv"), RECORDS)
    long("n_kv-65536", before + u64(0) + u64(65536) + ARCH, 1 << 22, at(first, "kv[1].key"))


def add_text() -> None:
    start = head(0, 3) + ARCH
    for power, size in ((30, 9), (23, 1)):
        array = start + string("k") + u32(ARRAY) + u32(STRING) + u64(2**power)
        long(f"array-str-2^{power}", array, size * GIB, at(len(array), "kv[1].value (k)"), TEXT)
    for name, length in {"1GiB": GIB, "64MiB": 2**26}.items():
        long(f"key-{name}", start + u64(length), 3 * GIB, at(len(start), "kv[1].key"), TEXT)
    text = start + string("k") + u32(STRING) + u64(GIB)
    long("string-1GiB", text, 3 * GIB, at(len(text) - 8, "kv[1].value (k)"), TEXT)


def add_arrays() -> None:
    start = head(0, 3) + ARCH
    for name, kind, size in (("u8", U8, 1), ("u32", U32, 4), ("f64", F64, 8)):
        array = start + string("llama.attention.head_count") + u32(ARRAY) + u32(kind) + u64(2**28 // size)
        field = "kv[1].value (llama.attention.head_count)"
        long(f"array-{name}-256MiB", array, len(array) + 4096 + 2**28, at(len(array), field), TEXT)


for _add in (add_records, add_text, add_arrays):
    _add()
