"""`mrrope inspect`: what a GGUF file is, how it rotates, what table it holds and what each engine will do with it.

Everything comes from the header; a file that cannot be extended, or is no model at all, is described as well.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

from .architectures import architecture
from .bound import LIMIT, bound, min_base
from .errors import MrropeError
from .facts import ROPE_FREQS, RopeFacts, obstacle, read_facts
from .gguf.index import GGUFIndex, open_gguf, open_split
from .gguf.source import require_no_journal
from .gguf.types import GGML_TYPES
from .stored_table import StoredTable, stored_table
from .tables import RopeTable, rope_table
from .text import printable
from .verdicts import Verdicts, verdicts

SCHEMA = 1
# what the searches for a bound and a base may take: under a second or two, whatever a header claims
_COSINES = LIMIT * 128
_MOST_SEARCHED = 1 << 22
# llama_ftype: the quantisation a file was made with, by the number in general.file_type
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip


@dataclass(frozen=True)
class FileFacts:
    """What the file is made of; `types` counts the bytes of each tensor type, `shards` are file names."""

    name: str
    path: str
    nbytes: int
    shards: tuple[str, ...]
    version: int
    alignment: int
    n_tensors: int
    n_parameters: int
    types: dict[str, int]
    quantisation: str
    model_name: str | None
    architecture: str | None


@dataclass(frozen=True)
class Reach:
    """How far the table in force sees: `bound` is the first position where it fails, None if beyond `limit`.

    `min_base` is the smallest RoPE base that would reach `n_ctx` by plain angles, None where none does.
    """

    bound: int | None
    limit: int
    n_ctx: int
    min_base: float | None


@dataclass(frozen=True)
class Inspection:
    """All that `inspect` found. `facts` is None for a file whose RoPE cannot be told, and `obstacle` says why."""

    file: FileFacts
    facts: RopeFacts | None
    table: RopeTable | None
    stored: StoredTable | None
    reach: Reach | None
    verdicts: Verdicts | None
    obstacle: MrropeError | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The same as plain data. The keys are stable (docs/inspect.md); `schema` grows when one changes."""
        return {
            "schema": SCHEMA,
            "file": {**asdict(self.file), "shards": list(self.file.shards)},
            "context": self._context(),
            "rope": self._rope(),
            "table": self._table(),
            "bound": asdict(self.reach) if self.reach else None,
            "engines": asdict(self.verdicts) if self.verdicts else None,
            "obstacle": _as_json(self.obstacle),
            "warnings": list(self.warnings),
        }

    def render(self) -> str:
        """The same for people: aligned, at most 100 columns wide, safe to print whatever the file holds."""
        from .inspect_text import render

        return render(self)

    def _context(self) -> dict[str, int | None] | None:
        if self.facts is None:
            return None
        extended = self.facts.n_ctx_train if self.stored else None
        return {"original": self.facts.n_ctx_orig, "trained": self.facts.n_ctx_train, "extended": extended}

    def _rope(self) -> dict[str, Any] | None:
        f = self.facts
        if f is None or f.arch.rope == "none":
            return None
        return {
            "pairs": f.arch.rope,
            "n_rot": f.n_rot,
            "head_dim": f.head_dim,
            "freq_base": f.freq_base,
            "n_layer": f.n_layer,
            "extended_layers": list(f.layers.extended),
            "sliding_layers": [i for i, slides in enumerate(f.layers.sliding) if slides],
            "window": f.n_swa,
            "freq_base_sliding": f.freq_base_swa if any(f.layers.sliding) else None,
            "base_factors": list(f.base_factors) if f.base_factors else None,
            "scaling": {"type": f.scaling_type, "factor": f.scaling_factor, "attn_factor": f.attn_factor},
        }

    def _table(self) -> dict[str, Any] | None:
        if self.stored is None:
            return None
        t = self.stored.table
        return {
            "method": t.method,
            "scale": t.scale,
            "beta_fast": t.beta_fast,
            "beta_slow": t.beta_slow,
            "d_l": t.d_l,
            "d_h": t.d_h,
            "attn_factor": t.attn_factor,
            "radix": list(t.radix_values),
            "factors": list(t.factor_values),
            "rendering": self.stored.rendering,
            "elastic": self.stored.elastic,
            "reexpressed_from": self.stored.reexpressed_from,
            "revertible": self.stored.revertible,
        }


def inspect(path: str | os.PathLike[str], *, plot: str | os.PathLike[str] | None = None) -> Inspection:
    """Describe a GGUF file, or a split model by any of its files.

    plot: a PNG to draw the table's factors to; needs matplotlib.
    Returns an Inspection, also for files that cannot be extended or are no models (its `obstacle` says why). Raises
    BadFile for what is no GGUF, FileTrouble for what cannot be read or written.
    """
    require_no_journal(Path(path))
    shards = open_split(path)
    with open_gguf(shards[0]) as index:
        found = _inspect(index, shards)
    if plot is not None:
        _plot(found, Path(plot))
    return found


def _inspect(index: GGUFIndex, shards: list[Path]) -> Inspection:
    file = _file_facts(index, shards)
    try:
        facts = read_facts(index)
        stored = stored_table(index, facts)
    except MrropeError as error:
        return Inspection(file, None, None, None, None, None, error, ())
    hindrance = obstacle(facts, printable(file.name))
    table = stored.table if stored else None
    if table is None and hindrance is None:
        table = _plain_table(facts)
    warnings = (*(stored.warnings if stored else ()), *_warnings(index, facts, stored), *_undo_warnings(shards, stored))
    return Inspection(
        file=file,
        facts=facts,
        table=table,
        stored=stored,
        reach=_reach(facts, table) if table else None,
        verdicts=verdicts(index, facts, stored, extendable=hindrance is None),
        obstacle=hindrance,
        warnings=warnings,
    )


def _file_facts(index: GGUFIndex, shards: list[Path]) -> FileFacts:
    tensors = list(index.tensors.values())
    nbytes = index.size
    for shard in shards[1:]:
        with open_gguf(shard) as other:
            tensors += other.tensors.values()
            nbytes += other.size
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[GGML_TYPES[tensor.type].name] += tensor.nbytes
    file_type = index.get("general.file_type", most=0)
    guessed = max(types, key=lambda name: types[name], default="none").upper()
    return FileFacts(
        name=index.path.name,
        path=str(index.path),
        nbytes=nbytes,
        shards=tuple(shard.name for shard in shards) if len(shards) > 1 else (),
        version=index.version,
        alignment=index.alignment,
        n_tensors=len(tensors),
        n_parameters=sum(prod(tensor.dims) for tensor in tensors),
        types=dict(types.most_common()),
        quantisation=_FILE_TYPES.get(file_type, guessed) if isinstance(file_type, int) else guessed,
        model_name=_text(index, "general.name"),
        architecture=_text(index, "general.architecture"),
    )


def _text(index: GGUFIndex, key: str) -> str | None:
    value = index.get(key, most=0)
    return value if isinstance(value, str) else None


def _plain_table(facts: RopeFacts) -> RopeTable | None:
    """The table of a model that has none of ours: its own angles. None where a trained scaling bends them."""
    existing = facts.existing_scaling
    if existing is not None:
        if not existing.mergeable:
            return None
        facts = existing.merged(facts)
    return rope_table(
        "none", n_rot=facts.n_rot, freq_base=facts.freq_base, n_ctx_orig=facts.n_ctx_orig, scale=1.0,
        base_factors=facts.base_factors,
    )  # fmt: skip


def _reach(facts: RopeFacts, table: RopeTable) -> Reach | None:
    pairs = facts.n_rot // 2
    limit = min(LIMIT, _COSINES // pairs)
    try:
        found = bound(table, limit)
    except ValueError:  # a base near 1 or a hand-made table can turn faster than the search allows
        return None
    affordable = facts.n_ctx_train <= _MOST_SEARCHED and facts.n_ctx_train * pairs <= _COSINES
    base = min_base(facts.n_ctx_train, facts.n_rot) if affordable else inf
    return Reach(found, limit, facts.n_ctx_train, base if isfinite(base) else None)


def _warnings(index: GGUFIndex, facts: RopeFacts, stored: StoredTable | None) -> list[str]:
    warnings = []
    if facts.arch.norm_after_rope and stored and stored.table.attn_factor != 1.0:
        warnings.append("queries and keys are normalised after RoPE, so the temperature (attn_factor) has no effect")
    if stored and stored.reexpressed_from:
        origin = printable(stored.reexpressed_from)
        warnings.append(f"re-expressed from '{origin}': a LoRA made for the original does not fit this file")
    if not facts.arch.cached:
        warnings.append("this model keeps no cache: each text is read in one batch, so -ub must be as long as the text")
    if facts.arch.draft:
        warnings.append("a draft model: extend it by the same table as the model it drafts for")
    known = architecture(facts.arch.name)
    if ROPE_FREQS in index.tensors and known and not known.portable:
        does = "ignores its factors" if facts.arch.group == "C" else "does not expect it and will not load the file"
        warnings.append(f"the file holds {ROPE_FREQS}, but stock llama.cpp {does} for '{facts.arch.name}'")
    return warnings


def _undo_warnings(shards: list[Path], stored: StoredTable | None) -> list[str]:
    """Whether `mrrope revert` could restore the original, by doing all of it but the writing."""
    if stored is None or not stored.revertible:
        return ["the file holds no undo record: `mrrope revert` cannot restore the original"] if stored else []
    from .gguf.source import Source

    try:
        Source.open(shards[0]).close()
    except MrropeError as error:
        return [f"`mrrope revert` cannot restore the original: {error.what}"]
    return []


def _plot(found: Inspection, path: Path) -> None:
    from .errors import Refused
    from .plots import plot_factors

    if found.table is None:
        raise Refused(
            f"{printable(found.file.name)}: there is no table to plot",
            why=found.obstacle.what if found.obstacle else "the factors of its trained scaling are not known here",
            fix="leave out --plot",
        )
    plot_factors([found.table], path)


def _as_json(error: MrropeError | None) -> dict[str, str] | None:
    return {"what": error.what, "why": error.why, "fix": error.fix} if error else None
