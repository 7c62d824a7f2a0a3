"""What will become of a file: in stock llama.cpp, in the patched engine, and under `mrrope extend`. In sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .facts import RopeFacts
from .stored_table import StoredTable

if TYPE_CHECKING:
    from .gguf.index import GGUFIndex


@dataclass(frozen=True)
class Verdicts:
    """One sentence each; `extend` is "" for a file that cannot be extended."""

    stock: str
    patched: str
    extend: str


def verdicts(index: GGUFIndex, facts: RopeFacts, stored: StoredTable | None, extendable: bool) -> Verdicts:
    """What stock and patched engines do with the file as it is, and what `mrrope extend` would make of it."""
    extend = _extend(index, facts, stored) if extendable else ""
    if stored is None:
        plain = f"runs it as its makers meant it, {facts.n_ctx_train} tokens{_with_scaling(facts)}"
        return Verdicts(plain, "the same", extend)
    return Verdicts(_stock(facts, stored), _patched(facts, stored), extend)


def _with_scaling(facts: RopeFacts) -> str:
    existing = facts.existing_scaling
    return f", with the {existing.kind} scaling it came with (factor {existing.factor:g})" if existing else ""


def _stock(facts: RopeFacts, stored: StoredTable) -> str:
    n_ctx, original = facts.n_ctx_train, facts.n_ctx_orig
    if stored.rendering == "engine":
        if facts.scaling_type in ("yarn", "linear") and facts.scaling_factor != 1.0:
            return (
                f"does not know this table: it falls back to its own {facts.scaling_type} scaling of factor "
                f"{facts.scaling_factor:g}, up to {n_ctx} tokens"
            )
        if facts.scaling_type == "longrope":
            return f"does not know this table: it runs with the longrope factors it came with, up to {n_ctx} tokens"
        return f"does not know this table: it runs with plain angles, which are good for {original} tokens"
    leak = {"factors": "; sliding-window layers are stretched too", "attn_factor": ""}.get(facts.arch.leak, "")
    if facts.arch.leak == "attn_factor" and stored.table.attn_factor != 1.0:
        leak = "; the temperature reaches sliding-window layers too"
    if stored.rendering == "long":
        return (
            f"runs it extended, up to {n_ctx} tokens, when loaded with more than {original}; "
            f"with plain angles, but the temperature of the table, at or below{leak}"
        )
    return f"runs it extended, up to {n_ctx} tokens{leak}"


def _patched(facts: RopeFacts, stored: StoredTable) -> str:
    if stored.elastic and not facts.arch.static_only:
        return f"elastic: the original up to {facts.n_ctx_orig} tokens, then a table that grows with the conversation"
    return f"this table at every length, up to {facts.n_ctx_train} tokens"


def _extend(index: GGUFIndex, facts: RopeFacts, stored: StoredTable | None) -> str:
    existing = facts.existing_scaling
    if existing and not existing.mergeable:
        return f"refuses without --force: {existing.why}"
    merged = f", merging its {existing.kind} factor {existing.factor:g}" if existing else ""
    replaces = "replaces the table" if stored else "makes"
    return f"{replaces}{' with' if stored else ''} {_kind(index, facts)}{merged}"


def _kind(index: GGUFIndex, facts: RopeFacts) -> str:
    if facts.arch.leak:
        what = {"factors": "factors reach", "attn_factor": "the temperature reaches"}[facts.arch.leak]
        return f"a file for the patched engine; with --portable one for any llama.cpp, where {what} sliding layers too"
    if facts.arch.portable:
        return "a portable file (rope_freqs.weight), which any llama.cpp runs extended"
    if facts.arch.longrope:
        return "a portable file (rope_factors_long.weight), which any llama.cpp runs extended"
    from .reexpress import target

    other = target(index)
    if other is not None:
        return f"a portable file with --portable (lossless, as '{other.arch_to}'), or one for the patched engine"
    return f"a file for the patched engine: stock cannot read factors for '{facts.arch.name}'"
