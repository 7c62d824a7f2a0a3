"""The table an extended file holds, read back from its mrrope keys and checked against what engines will read."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from math import isclose, isfinite
from typing import Any

from .architectures import Arch
from .errors import BadFile
from .facts import LONG, ROPE_FREQS, RopeFacts
from .gguf.index import GGUFIndex
from .gguf.types import F32
from .tables import METHODS, RopeTable, rope_table, stored_factors
from .text import printable

VERSION = 1


@dataclass(frozen=True)
class StoredTable:
    """`rendering` is what carries the factors: "rope_freqs", "long" or, for the patched engine alone, "engine".

    `warnings` are contradictions within the file: what one engine reads is not what another reads.
    """

    table: RopeTable
    rendering: str
    elastic: bool
    revertible: bool
    reexpressed_from: str | None
    warnings: tuple[str, ...]


def stored_table(index: GGUFIndex, facts: RopeFacts) -> StoredTable | None:
    """The table of an extended file, or None for any other. Raises BadFile where its keys are unusable."""
    if facts.mrrope is None:
        return None
    kept = _Kept(index, facts.arch.name, facts.mrrope)
    method = kept.text("method")
    table = _table(kept, facts, method)
    rendering = carrier(index, facts.arch)
    warnings = [
        *_version_warnings(kept, method),
        *_table_warnings(facts, table),
        *_factor_warnings(index, table, rendering),
        *_scalar_warnings(facts, table, rendering),
        *_both_warnings(index, facts, table, rendering),
    ]
    origin = facts.mrrope.get("reexpressed_from")
    return StoredTable(
        table=table,
        rendering=rendering,
        elastic=bool(facts.mrrope.get("elastic", False)),
        revertible=bool(facts.mrrope["undo"]),
        reexpressed_from=origin if isinstance(origin, str) else None,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class _Kept:
    """The mrrope keys, with errors that name the one at fault."""

    index: GGUFIndex
    arch: str
    values: dict[str, Any]

    def text(self, word: str) -> str:
        value = self.values.get(word)
        if not isinstance(value, str):
            raise self.bad(word, "a string")
        return value

    def number(self, word: str, default: float | None = None) -> float:
        value = self.values.get(word, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value <= 0:
            raise self.bad(word, "a number above 0")
        return float(value)

    def numbers(self, word: str, n: int) -> list[float]:
        value = self.values.get(word)
        if not isinstance(value, list) or len(value) != n:
            raise self.bad(word, f"an array of {n} numbers")
        if not all(isinstance(v, (int, float)) and isfinite(v) and v > 0 for v in value):
            raise self.bad(word, f"an array of {n} numbers above 0")
        return value

    def bad(self, word: str, wanted: str) -> BadFile:
        key = f"{self.arch}.rope.scaling.mrrope.{word}"
        kv = self.index.find(key)
        return BadFile(
            f"{printable(self.index.path.name)}: the table of this extended file cannot be read",
            why=f"{key} is {'missing' if kv is None else 'damaged'}; it should be {wanted}",
            fix="extend the original again, or `mrrope revert` this file",
            offset=self.index.infos_start if kv is None else kv.start,
            field=key,
        )


def _table(kept: _Kept, facts: RopeFacts, method: str) -> RopeTable:
    """The table with the factors the file holds, whatever its method would give today."""
    radix = kept.numbers("radix", facts.n_rot // 2)
    settings = {word: kept.number(word, default) for word, default in _SETTINGS.items()}
    attn_factor = kept.number("attn_factor")
    try:
        made = _made(facts, method, settings)
        lead = kept.number("lead", made.lead if made else 1.0)
        table = rope_table(
            "custom", n_rot=facts.n_rot, freq_base=facts.freq_base, n_ctx_orig=facts.n_ctx_orig,
            scale=settings["scale"], beta_fast=settings["beta_fast"], beta_slow=settings["beta_slow"],
            base_factors=facts.base_factors, radix=radix, lead=lead, attn_factor=attn_factor,
        )  # fmt: skip
    except ValueError as error:
        raise kept.bad("radix", f"a table within the limits ({error})") from None
    return replace(table, method=method)


_SETTINGS = {"scale": None, "beta_fast": 32.0, "beta_slow": 1.0}


def _made(facts: RopeFacts, method: str, settings: dict[str, float]) -> RopeTable | None:
    """What the method itself gives for the file's settings; it also knows its lead. None for a custom table."""
    if method not in METHODS or method == "custom":
        return None
    return rope_table(
        method, n_rot=facts.n_rot, freq_base=facts.freq_base, n_ctx_orig=facts.n_ctx_orig, scale=settings["scale"],
        beta_fast=settings["beta_fast"], beta_slow=settings["beta_slow"], base_factors=facts.base_factors,
    )  # fmt: skip


_TENSORS = {"rope_freqs": ROPE_FREQS, "long": LONG}


def carrier(index: GGUFIndex, arch: Arch) -> str:
    """What carries an extended file's factors: "rope_freqs", "long", or "engine" for the metadata alone.

    A file for the patched engine may hold the tensor its model came with; it is known by the scaling it falls back to.
    """
    if index.find(f"{arch.name}.rope.scaling.factor") is not None:
        return "engine"
    return _tensor(index, arch) or "engine"


def _tensor(index: GGUFIndex, arch: Arch) -> str | None:
    """Which of the tensors with factors that stock reads for this architecture the file has."""
    possible = {"rope_freqs": arch.portable, "long": arch.longrope}
    return next((kind for kind, name in _TENSORS.items() if possible[kind] and name in index.tensors), None)


def _version_warnings(kept: _Kept, method: str) -> list[str]:
    version, warnings = kept.values["version"], []
    if version != VERSION:
        warnings.append(f"its table is of format version {version}; this program writes and knows version {VERSION}")
    if method not in METHODS:
        warnings.append(f"method '{printable(method)}' is unknown here; its factors are shown as they are stored")
    return warnings


def _table_warnings(facts: RopeFacts, table: RopeTable) -> list[str]:
    """Whether the stored numbers are those of the method they name."""
    warnings = []
    made = _made(facts, table.method, {word: getattr(table, word) for word in _SETTINGS})
    if made is not None and not all(map(_close, made.factor_values, table.factor_values)):
        warnings.append(f"the stored factors are not what {table.method} gives for these settings")
    if facts.n_ctx_train != int(facts.n_ctx_orig * table.scale + 0.5):
        expected = f"{facts.n_ctx_orig} tokens x {table.scale:g}"
        warnings.append(f"context_length is {facts.n_ctx_train}, but the table is made for {expected}")
    return warnings


def _factor_warnings(index: GGUFIndex, table: RopeTable, rendering: str) -> list[str]:
    """Whether the tensor that stock reads holds the factors of the metadata."""
    name = _TENSORS.get(rendering)
    if name is None:
        return []
    tensor = index.tensors[name]
    half = table.n_rot // 2
    if tensor.type != F32 or tensor.nbytes < 4 * half:
        return [f"{name} has the wrong type or length: stock llama.cpp cannot load this file"]
    held = struct.unpack_from(f"<{half}f", index.tensor_bytes(name))
    wanted = stored_factors(table.radix_values, table.base_factors, table.lead)
    return [] if all(map(_close, held, wanted)) else [f"{name} does not hold the factors of the metadata"]


def _scalar_warnings(facts: RopeFacts, table: RopeTable, rendering: str) -> list[str]:
    """Keys that stock reads beside the factors."""
    if rendering == "engine":
        twice = facts.attn_factor != 1.0
        return ["rope.scaling.attn_factor is set: stock llama.cpp applies the temperature twice"] if twice else []
    warnings = []
    if facts.scaling_factor != 1.0 and facts.scaling_type != "none":
        warnings.append(f"rope.scaling.factor is {facts.scaling_factor:g}: stock llama.cpp scales on top of the table")
    if not _close(facts.attn_factor, table.attn_factor):
        held = f"{facts.attn_factor:.4f} for stock, {table.attn_factor:.4f} for the patched engine"
        warnings.append(f"two temperatures: attn_factor is {held}")
    return warnings


def _both_warnings(index: GGUFIndex, facts: RopeFacts, table: RopeTable, rendering: str) -> list[str]:
    """Whether a file for the patched engine also holds its table as a tensor, which stock then scales once more."""
    tensor = _tensor(index, facts.arch)
    if rendering != "engine" or tensor is None or table.method == "none" or _factor_warnings(index, table, tensor):
        return []
    factor = f"rope.scaling.factor is {facts.scaling_factor:g}"
    return [f"{_TENSORS[tensor]} holds the table and {factor}: stock llama.cpp scales on top of the table"]


def _close(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=1e-5)
