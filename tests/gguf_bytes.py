"""GGUF files as bytes, sound or not, for tests: nothing here is shared with the code under test.

>>> gguf([kv("a", U8, b"\\x07")])[:4]
b'GGUF'
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SIZES = {U8: 1, I8: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}


def u32(value: int) -> bytes:
    return struct.pack("<I", value % 2**32)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value % 2**64)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def kv(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata record; `value` is what follows the type."""
    return string(key) + u32(kind) + value


def array(item: int, count: int, items: bytes) -> bytes:
    """What follows the type in an array's record."""
    return u32(item) + u64(count) + items


def strings(*items: str | bytes) -> bytes:
    return array(STRING, len(items), b"".join(map(string, items)))


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    """A tensor info record; type 0 is f32."""
    shape = b"".join(map(u64, dims))
    return string(name) + u32(len(dims) if n_dims is None else n_dims) + shape + u32(kind) + u64(offset)


def head(n_tensors: int, n_kv: int, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(n_tensors) + u64(n_kv)


def pad(raw: bytes, alignment: int = 32) -> bytes:
    return raw + b"\0" * (-len(raw) % alignment)


def gguf(
    kvs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: Sequence[bytes] = (),
    *,
    alignment: int = 32,
    version: int = 3,
    end_pad: bool = True,
) -> bytes:
    """A whole file; `data` holds one piece for each tensor. The offsets are the caller's."""
    body = head(len(tensors), len(kvs), version) + b"".join(kvs) + b"".join(tensors)
    if not tensors:
        return body
    section = b"".join(pad(piece, alignment) for piece in data)
    if data and not end_pad:
        section = section[: len(section) - (-len(data[-1]) % alignment)]
    return pad(body, alignment) + section
