"""What a saved state belongs to: model, table, cache and engine. A state is used where all of these are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import engine
from ..engine.store import read_engine
from ..facts import read_facts
from ..gguf.digest import source_digest
from ..gguf.source import Source
from ..gguf.types import GGML_TYPES
from ..text import printable

if TYPE_CHECKING:
    from llama_cpp import Llama

# of llama_context_params: what changes a key, or how a state lays keys out
_ROPE = (
    "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip
_CACHE = ("flash_attn_type", "swa_full", "n_seq_max", "kv_unified", "attention_type")


@dataclass(frozen=True)
class Fingerprint:
    """`parts`: what the keys depend on, {name: value}, all strings. `name` is the model's, for people alone."""

    parts: Mapping[str, str]
    name: str = ""

    @cached_property
    def key(self) -> str:
        """The whole as one hash, 32 hex digits."""
        return hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, before: Mapping[str, object]) -> str:
        """What is not as it was in the parts `before`, as one phrase; empty if nothing."""
        names = [name for name in sorted({*self.parts, *before}) if self.parts.get(name) != before.get(name)]
        return "; ".join(
            f"its {name} was {_shown(before.get(name))} and is {_shown(self.parts.get(name))}" for name in names
        )


def fingerprint(llm: Llama) -> Fingerprint:
    """The fingerprint of a model as it is loaded now; a table that is set later changes it.

    Not in it, as no key depends on them: n_ctx (but for longrope, where it chooses the table), batch sizes, threads.
    The stage of an elastic context is not in it either: a state brings its own, and the engine rotates a state that
    was saved under another policy. Raises as Source.open does if the model's file is gone or was changed for the worse.
    """
    path = Path(llm.model_path)
    model, file, long_from = _file(str(path), *_version(path))
    params, kinds = llm.context_params, GGML_TYPES
    values: dict[str, object] = {
        "model": model,
        "file": file,
        "LoRA": _lora(llm),
        "overrides": sorted((llm.kv_overrides or {}).items()),
        "type_k": kinds[params.type_k].name,
        "type_v": kinds[params.type_v].name,
        "cache": {name: int(getattr(params, name)) for name in _CACHE if hasattr(params, name)},
        "RoPE": [getattr(params, name) for name in _ROPE],
        "table": _table(llm),
        "long factors": bool(long_from) and llm.n_ctx() > long_from,
        "engine": _engine(),
    }
    parts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return Fingerprint(parts, printable(path.name))


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=8)
def _file(path: str, _mtime: int, _size: int) -> tuple[str, str, int]:
    """(digest of the original, digest of what extending put before its data, longrope's original context or 0)."""
    with Source.open(path) as source:
        facts = read_facts(source.current)
        before = hashlib.sha256(source.current.raw(0, source.current_prefix)).hexdigest()
        return source_digest(source), before, facts.n_ctx_orig if facts.scaling_type == "longrope" else 0


def _lora(llm: Llama) -> str:
    if not llm.lora_path:
        return "none"
    with open(llm.lora_path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
    return f"{digest.hexdigest()} * {llm.lora_scale}"


def _table(llm: Llama) -> str:
    """The table in effect; of an elastic context the one it grows to."""
    if not engine.loaded_library().has_rope_table:
        return "the file's"
    if engine.has_elastic() and (state := engine.get_elastic(llm)).on:
        return f"elastic {state.method} to S = {state.full_scale:.9g}"
    table = engine.get_table(llm)
    if table is None:
        return "none"
    values = json.dumps([*table.factors, table.attn_factor])
    return f"static {table.method}, S = {table.scale:.9g}, {hashlib.sha256(values.encode()).hexdigest()}"


def _engine() -> str:
    library = engine.loaded_library()
    build = read_engine(library.path.parent.parent) or read_engine(library.path.parent)
    words = [library.kind, "llama.cpp", library.version, library.commit, build.patch_hash if build else ""]
    return f"{' '.join(filter(None, words))} on {', '.join(library.devices)}"


def _shown(value: Any) -> str:
    """A value in a sentence: long ones by their beginning."""
    return "not set" if value is None else printable(str(value), limit=60)
