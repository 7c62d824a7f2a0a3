"""A GGUF header read the way llama.cpp's loader reads it: typed keys under the architecture's name.

llama.cpp refuses a key of another type than the one it wants, so a wrong type here is a BadFile too:
reading it more kindly would describe a model that stock cannot load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import BadFile
from .gguf.index import KV, GGUFIndex
from .gguf.types import ValueType

# what llama.cpp's get_arr takes where it wants an array of integers
_INTEGERS = (ValueType.UINT32, ValueType.INT32, ValueType.BOOL)


@dataclass(frozen=True)
class Header:
    """The keys of one architecture in an index: `Header(index, "llama").u32("context_length", 0)`."""

    index: GGUFIndex
    arch: str

    def has(self, name: str) -> bool:
        """Whether the architecture's key `name` is in the file, of whatever type."""
        return self._find(name) is not None

    def u32(self, name: str, default: int) -> int:
        """A u32, or `default` where the file has none. Raises BadFile for another type, as llama.cpp does."""
        return int(self._scalar(name, ValueType.UINT32, default))

    def f32(self, name: str, default: float) -> float:
        """A float32 (as a Python float), or `default`. Raises BadFile for another type."""
        return float(self._scalar(name, ValueType.FLOAT32, default))

    def text(self, name: str, default: str) -> str:
        """A string, or `default`. Raises BadFile for another type."""
        return str(self._scalar(name, ValueType.STRING, default))

    def flag(self, name: str, default: bool) -> bool:
        """A bool, or `default`. Raises BadFile for another type."""
        return bool(self._scalar(name, ValueType.BOOL, default))

    def u32s(self, name: str, n: int, default: int) -> tuple[int, ...]:
        """n integers, one per layer: from an array, or one u32 repeated, or `default` repeated."""
        values = self.array(name, n)
        return (self.u32(name, default),) * n if values is None else values

    def array(self, name: str, n: int) -> tuple[int, ...] | None:
        """The first n integers (or bools) of an array, zeros after its end, or None where there is no such array."""
        kv = self._find(name)
        if kv is None or kv.type != ValueType.ARRAY:
            return None
        if kv.item_type not in _INTEGERS:
            raise self._wrong(kv, "an array of u32, i32 or bool")
        values = [int(value) for value in self.index.get(f"{self.arch}.{name}", most=n)]
        return tuple(values + [0] * (n - len(values)))

    def _find(self, name: str) -> KV | None:
        return self.index.find(f"{self.arch}.{name}")

    def _scalar(self, name: str, wanted: ValueType, default: Any) -> Any:
        kv = self._find(name)
        if kv is None:
            return default
        if kv.type != wanted:
            raise self._wrong(kv, _NAMES[wanted])
        return self.index.get(f"{self.arch}.{name}")

    def _wrong(self, kv: KV, wanted: str) -> BadFile:
        held = _NAMES.get(kv.type, kv.type.name.lower())
        if kv.type == ValueType.ARRAY and kv.item_type is not None:
            held = f"an array of {_NAMES.get(kv.item_type, kv.item_type.name.lower())}"
        return BadFile(
            f"{self.index.path.name}: {kv.key} is {held}, llama.cpp wants {wanted}",
            why="llama.cpp refuses to load a model whose key has another type than it asks for",
            fix="convert or download the model again",
            offset=kv.start,
            field=kv.key,
        )


_NAMES = {
    ValueType.UINT32: "u32",
    ValueType.INT32: "i32",
    ValueType.FLOAT32: "f32",
    ValueType.STRING: "a string",
    ValueType.BOOL: "bool",
}
