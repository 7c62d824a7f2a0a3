"""The numbers GGUF files are made of: value types of metadata, and ggml's tensor types with their block sizes."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from math import prod
from typing import NamedTuple


class ValueType(IntEnum):
    """Type of a metadata value, as the u32 before it in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct codes (little-endian, standard sizes) of the types of fixed size; a bool is any byte, nonzero is true
STRUCT_CODES: dict[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


class GGMLType(NamedTuple):
    """A tensor type: `block_size` elements of a row are stored in `type_size` bytes."""

    id: int
    name: str
    block_size: int
    type_size: int


# Every type of ggml.h; the missing numbers were removed from ggml and no file may hold them.
GGML_TYPES: dict[int, GGMLType] = {
    number: GGMLType(number, name, block_size, type_size)
    for number, name, block_size, type_size in (
        (0, "f32", 1, 4),
        (1, "f16", 1, 2),
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 36),
        (10, "q2_K", 256, 84),
        (11, "q3_K", 256, 110),
        (12, "q4_K", 256, 144),
        (13, "q5_K", 256, 176),
        (14, "q6_K", 256, 210),
        (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
        (41, "q1_0", 128, 18),
        (42, "q2_0", 64, 18),
    )
}
F32 = 0


def ggml_type(number_or_name: int | str) -> GGMLType:
    """The type with this number or name (any case). Raises ValueError if ggml has none.

    >>> ggml_type("Q4_K")
    GGMLType(id=12, name='q4_K', block_size=256, type_size=144)
    """
    if isinstance(number_or_name, str):
        wanted = number_or_name.lower()
        found = next((t for t in GGML_TYPES.values() if t.name.lower() == wanted), None)
    else:
        found = GGML_TYPES.get(number_or_name)
    if found is None:
        raise ValueError(f"ggml has no tensor type {number_or_name!r}")
    return found


def nbytes(type_number: int, dims: Iterable[int]) -> int:
    """Bytes of a tensor of this type and shape (dims[0] is the row length). ValueError if rows are not whole blocks.

    >>> nbytes(12, (2048, 8))
    9216
    """
    kind = ggml_type(type_number)
    shape = tuple(dims)
    if shape and shape[0] % kind.block_size:
        raise ValueError(f"rows of {shape[0]} elements are no whole number of {kind.name} blocks of {kind.block_size}")
    if not shape and kind.block_size > 1:
        raise ValueError(f"a single element is no whole {kind.name} block of {kind.block_size}")
    return prod(shape) // kind.block_size * kind.type_size


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`.

    >>> padded(33, 32)
    64
    """
    return -(-size // alignment) * alignment
