"""What an extended file says about itself: the rope keys llama.cpp and the patched engine read, and provenance.

The list of keys is DESIGN.md's ("What an extended file holds"); docs/format.md is its public form.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .gguf.edit import Edit
from .gguf.index import GGUFIndex
from .gguf.types import ValueType
from .naming import context_label, with_context
from .stored_table import VERSION
from .tables import RopeTable

_TAGS = ("long-context", "mrrope")


def pack_f32(values: Sequence[float]) -> bytes:
    """Little-endian float32 bytes of `values`, as tensors hold them."""
    return struct.pack(f"<{len(values)}f", *values)


def write_table(edit: Edit, arch: str, table: RopeTable, n_ctx: int, *, elastic: bool) -> None:
    """The keys every extended file holds, whichever its rendering."""
    scaling = f"{arch}.rope.scaling"
    edit.set(f"{arch}.context_length", ValueType.UINT32, n_ctx)
    edit.set(f"{scaling}.original_context_length", ValueType.UINT32, table.n_ctx_orig)
    edit.set(f"{scaling}.mrrope.version", ValueType.UINT32, VERSION)
    edit.set(f"{scaling}.mrrope.method", ValueType.STRING, table.method)
    edit.set(f"{scaling}.mrrope.scale", ValueType.FLOAT32, table.scale)
    edit.set(f"{scaling}.mrrope.beta_fast", ValueType.FLOAT32, table.beta_fast)
    edit.set(f"{scaling}.mrrope.beta_slow", ValueType.FLOAT32, table.beta_slow)
    edit.set(f"{scaling}.mrrope.attn_factor", ValueType.FLOAT32, table.attn_factor)
    edit.set(f"{scaling}.mrrope.radix", ValueType.ARRAY, list(table.radix_values), ValueType.FLOAT32)
    edit.set(f"{scaling}.mrrope.elastic", ValueType.BOOL, elastic)
    if table.lead != 1.0:
        edit.set(f"{scaling}.mrrope.lead", ValueType.FLOAT32, table.lead)
    if table.base_factors is not None:
        base = list(table.base_factors)
        edit.set(f"{scaling}.mrrope.base_factors", ValueType.ARRAY, base, ValueType.FLOAT32)


def write_base_attn_factor(edit: Edit, arch: str, attn_factor: float) -> None:
    """The temperature of the model's own, so that the patched engine can go back to the original at S = 1."""
    edit.set(f"{arch}.rope.scaling.mrrope.base_attn_factor", ValueType.FLOAT32, attn_factor)


def write_portable(edit: Edit, arch: str, table: RopeTable, *, keep_type: bool) -> None:
    """The scalar keys a stock loader needs beside its factor tensor: the temperature, and no position scaling."""
    scaling = f"{arch}.rope.scaling"
    edit.remove(f"{scaling}.factor")
    edit.remove(f"{arch}.rope.scale_linear")
    if not keep_type:
        edit.remove(f"{scaling}.type")
    edit.set(f"{scaling}.attn_factor", ValueType.FLOAT32, table.attn_factor)


def write_fallback(edit: Edit, arch: str, kind: str, factor: float) -> None:
    """What a stock library does with an engine-only file: its own yarn (or linear) at the same scale."""
    scaling = f"{arch}.rope.scaling"
    edit.remove(f"{arch}.rope.scale_linear")
    edit.remove(f"{scaling}.attn_factor")
    edit.set(f"{scaling}.type", ValueType.STRING, kind)
    edit.set(f"{scaling}.factor", ValueType.FLOAT32, factor)


def write_provenance(edit: Edit, index: GGUFIndex, table: RopeTable, n_ctx: int) -> None:
    """general.*: the source becomes the base model, and name, finetune, description and tags say what was done."""
    name = str(index.get("general.name") or index.path.stem)
    label = context_label(n_ctx)
    _write_base_model(edit, index, name)
    edit.set("general.name", ValueType.STRING, with_context(name, n_ctx))
    finetune = index.get("general.finetune")
    edit.set("general.finetune", ValueType.STRING, f"{finetune}-MrRoPE" if finetune else "MrRoPE")
    edit.set(
        "general.description",
        ValueType.STRING,
        f"{name} with its context extended from {context_label(table.n_ctx_orig)} to {label} tokens by "
        f"{table.method} (S = {table.scale:g}), without training. Weights unchanged.",
    )
    held = index.get("general.tags")
    tags = [str(tag) for tag in held] if isinstance(held, list) else []
    tags += [tag for tag in _TAGS if tag not in tags]
    edit.set("general.tags", ValueType.ARRAY, tags, ValueType.STRING)
    edit.remove("general.uuid")


def _write_base_model(edit: Edit, index: GGUFIndex, name: str) -> None:
    edit.remove_family("general.base_model.")
    edit.set("general.base_model.count", ValueType.UINT32, 1)
    edit.set("general.base_model.0.name", ValueType.STRING, name)
    for key in ("version", "organization", "url", "repo_url", "doi", "uuid"):
        if value := index.get(f"general.{key}"):
            edit.set(f"general.base_model.0.{key}", ValueType.STRING, str(value))
