"""`mrrope extend`: a GGUF in, the same GGUF with a longer memory out.

Nothing is computed on weights. The new file is a new header, sometimes one small tensor of factors, and the old
bytes; what the header must say depends on who will read it (see `Rendering`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import metadata
from .errors import Refused
from .facts import LONG, ROPE_FREQS, SHORT, RopeFacts, rope_facts
from .gguf.edit import Edit
from .gguf.source import Source
from .gguf.types import F32
from .naming import default_path, in_hub_cache
from .progress import Progress
from .tables import DEFAULT_METHOD, RopeTable, default_attn_factor, rescale, rope_table, stored_factors, to_float32

if TYPE_CHECKING:
    from .gguf.write import WriteReport
    from .radix_file import RadixFile
    from .reexpress import Reexpression

Wish = Literal["auto", "portable", "engine"]

_MAX_CTX = 2**31 - 1  # llama.cpp counts positions in int32
ELSEWHERE = "in the current folder: nothing is written into the Hub's cache"


@dataclass(frozen=True)
class Rendering:
    """How the table reaches an engine.

    portable: any llama.cpp reads the factors from `tensor`. engine: metadata alone, for the patched engine.
    `reexpress` is the lossless change of architecture that makes a file portable, where one is needed.
    """

    kind: Literal["portable", "engine"]
    why: str
    tensor: str = ""
    reexpress: Reexpression | None = None


@dataclass(frozen=True)
class Extended:
    """What `extend` did, or with dry_run would do."""

    source: Path
    path: Path
    arch: str
    n_ctx: int
    table: RopeTable
    rendering: Rendering
    elastic: bool
    replaced: bool  # the source was an extended file: its table was replaced, not stacked on
    keys: tuple[str, ...]  # metadata keys set or changed
    written: WriteReport | None
    elsewhere: str = ""  # why `path` is not beside the source, where nobody said so


def extend(
    path: str | Path,
    dst: str | Path | None = None,
    *,
    scale: float | None = None,
    n_ctx: int | None = None,
    method: str = DEFAULT_METHOD,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attn_factor: float | None = None,
    radix: str | Path | None = None,
    rendering: Wish = "auto",
    elastic: bool = True,
    in_place: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Extended:
    """Write a GGUF that remembers `scale` times as many tokens (or `n_ctx` of them).

    path: a GGUF file, or any shard of a split one. Already extended: its table is replaced, never stacked.
    dst: the new file; by default beside `path` (of the Hub's cache: in the current folder), named by GGUF's convention
    with ContextLengthNk.
    radix: a JSON file holding a table of one's own (see radix_file); its method is `custom`.
    rendering: "auto" is portable where the stock loader reads factors, else engine; "portable" also re-expresses.
    elastic: lets the patched engine grow the scale with the conversation; a stock library ignores it.
    in_place: change the file itself; a change of it that was cut short is undone first.
    force: overwrite `dst`, and replace a RoPE scaling the model was trained with.
    progress: called with (bytes done, bytes in all) when bytes must really be copied.

    Returns an Extended. Raises BadFile, Refused or FileTrouble; the source is then as it was and no `dst` is left.
    """
    if in_place and dst is not None:
        raise _contradiction(Path(path), dst)
    if in_place and not dry_run:
        from .gguf.inplace import recover

        recover(path)  # what a run that was killed had begun
    with Source.open(path) as source:
        shard = source.path
        found = rope_facts(source.index)
        facts = _startable(found, shard, force)
        table = _table(facts, shard, scale, n_ctx, method, beta_fast, beta_slow, attn_factor, radix)
        target = _target(facts, shard, n_ctx if n_ctx is not None else int(facts.n_ctx_orig * table.scale + 0.5))
        how = choose_rendering(found, source, rendering)
        keep_elastic = elastic and not facts.arch.static_only
        edit = _edit(source, found, table, target, how, keep_elastic)
        out = shard if in_place else Path(dst) if dst is not None else default_path(shard, target)
        written = None if dry_run else _write(edit, out, in_place, force, progress)
        return Extended(
            shard, written.path if written else out, found.arch.name, target, table, how, keep_elastic,
            source.was_extended, tuple(edit.keys_set), written,
            ELSEWHERE if in_hub_cache(shard) and not in_place and dst is None else "",
        )  # fmt: skip


def method_table(facts: RopeFacts, name: str, method: str, scale: float, *, force: bool = False) -> RopeTable:
    """The table that `extend` would write for a model with these facts, without a file. `name` is for the message.

    Raises Refused for a scale that is not above 1, and, without `force`, for a model trained with a RoPE scaling.
    """
    path = Path(name)
    return _table(_startable(facts, path, force), path, scale, None, method, 32.0, 1.0, None, None)


def choose_rendering(facts: RopeFacts, source: Source, wish: Wish) -> Rendering:
    """Portable or engine, through which tensor, and why, for this file."""
    arch, tensors = facts.arch, source.index.tensors
    if wish == "engine":
        return Rendering("engine", "asked for with --engine")
    if wish == "auto" and source.current.arch != source.index.arch:
        wish = "portable"  # it was re-expressed once; another table must not quietly make it an engine file
    if arch.longrope and (LONG in tensors or not arch.portable):
        why = f"stock llama.cpp reads {LONG} for architecture '{arch.name}' where n_ctx > {facts.n_ctx_orig}"
        return Rendering("portable", why, LONG)
    if arch.portable and arch.leak and wish == "auto":
        why = f"in a portable file of architecture '{arch.name}' the {arch.leak} would reach sliding-window layers too"
        return Rendering("engine", why)
    if arch.portable:
        return Rendering("portable", f"stock llama.cpp reads {ROPE_FREQS} for architecture '{arch.name}'", ROPE_FREQS)
    from .reexpress import target, why_not

    n = len(tensors)
    reason = f"its loader rejects {ROPE_FREQS} (the file would have {n + 1} tensors, the loader expects {n})"
    if wish == "auto":
        hint = "; --portable makes a lossless one that runs everywhere" if why_not(source.index) is None else ""
        return Rendering("engine", f"stock llama.cpp cannot use factors for architecture '{arch.name}': {reason}{hint}")
    shards = [source.shard_index(shard) for shard in source.shards[1:]]
    other = target(source.index, shards)
    if other is None:
        raise Refused(
            f"{source.path.name}: stock llama.cpp cannot use factors for architecture '{arch.name}'",
            why=f"{reason}, and it cannot be re-expressed: {why_not(source.index, shards)}",
            fix="leave --portable out: the metadata is then written for the patched engine",
        )
    why = f"re-expressed from '{arch.name}' as '{other.arch_to}', the same function: it is {other.why}"
    return Rendering("portable", why, ROPE_FREQS, other)


def _startable(facts: RopeFacts, path: Path, force: bool) -> RopeFacts:
    """The facts to extend from: a linear scaling merged, a trained one dropped under --force, else refused."""
    existing = facts.existing_scaling
    if existing is None:
        return facts
    if existing.mergeable:
        return existing.merged(facts)
    if not force:
        raise Refused(
            f"{path.name}: the model already scales its RoPE ({existing.kind}, factor {existing.factor:g})",
            why=existing.why,
            fix=f"--force drops that scaling and extends from {facts.n_ctx_orig} tokens; measure before you trust it",
        )
    return replace(facts, existing_scaling=None, attn_factor=1.0)


def _table(
    facts: RopeFacts,
    path: Path,
    scale: float | None,
    n_ctx: int | None,
    method: str,
    beta_fast: float,
    beta_slow: float,
    attn_factor: float | None,
    radix: str | Path | None,
) -> RopeTable:
    own = _own_table(radix, facts) if radix is not None else None
    wanted = _scale(facts, path, scale, n_ctx, own)
    if own is not None:
        method = "custom"
    elif attn_factor is None and facts.attn_factor != 1.0:
        attn_factor = facts.attn_factor * default_attn_factor(method, wanted)
    try:
        table = rope_table(
            method, n_rot=facts.n_rot, freq_base=facts.freq_base, n_ctx_orig=facts.n_ctx_orig,
            scale=(own.scale if own else None) or wanted, beta_fast=beta_fast, beta_slow=beta_slow,
            base_factors=facts.base_factors, attn_factor=own.attn_factor if own else attn_factor,
            radix=own.radix if own else None, lead=own.lead if own else 1.0,
        )  # fmt: skip
        table = rescale(table, wanted)
        table = table if attn_factor is None else replace(table, attn_factor=attn_factor)
        _check_stored(table)
        return table
    except ValueError as error:
        raise Refused(f"{path.name}: no table can be made", why=str(error), fix="change that number") from None


def _check_stored(table: RopeTable) -> None:
    """Raise ValueError for a number that a file, which holds float32, could only keep as 0 or infinity."""
    file_factors(table)
    for name in ("beta_fast", "beta_slow", "attn_factor", "lead"):
        if not to_float32(getattr(table, name)) > 0.0:
            raise ValueError(f"{name} is {getattr(table, name)!r}, and the smallest float32 is 1.4e-45")


def _own_table(radix: str | Path, facts: RopeFacts) -> RadixFile:
    from .radix_file import read_radix

    return read_radix(Path(radix), facts.n_rot // 2)


def _scale(facts: RopeFacts, path: Path, scale: float | None, n_ctx: int | None, own: RadixFile | None) -> float:
    if n_ctx is not None:
        scale = n_ctx / facts.n_ctx_orig
    elif scale is None and own is not None:
        scale = own.scale
    if scale is None:
        raise Refused(
            f"{path.name}: how far should it be extended?",
            why=f"it remembers {facts.n_ctx_orig} tokens, and neither a scale nor a context was given",
            fix=f"--scale 4 (to {4 * facts.n_ctx_orig} tokens) or --ctx {4 * facts.n_ctx_orig}",
        )
    if not 1.0 < scale <= _MAX_CTX / facts.n_ctx_orig:
        wish = f"{scale:g} times" if n_ctx is None else f"to {n_ctx} tokens"
        raise Refused(
            f"{path.name}: cannot be extended {wish}",
            why=f"it remembers {facts.n_ctx_orig} tokens; the new context must be longer, up to {_MAX_CTX} tokens",
            fix=f"--scale above 1, or --ctx above {facts.n_ctx_orig}",
        )
    return scale


def _target(facts: RopeFacts, path: Path, n_ctx: int) -> int:
    if facts.n_ctx_orig < n_ctx <= (facts.max_ctx or _MAX_CTX):
        return n_ctx
    if n_ctx <= facts.n_ctx_orig:
        raise Refused(
            f"{path.name}: that scale adds not one token",
            why=f"{facts.n_ctx_orig} tokens would become {n_ctx}",
            fix="choose a larger --scale",
        )
    raise Refused(
        f"{path.name}: llama.cpp reads more than a length out of a context of {n_ctx} tokens",
        why=f"architecture '{facts.arch.name}' changes its layers' kinds above {facts.max_ctx}",
        fix=f"--ctx {facts.max_ctx} or less",
    )


def _edit(source: Source, found: RopeFacts, table: RopeTable, n_ctx: int, how: Rendering, elastic: bool) -> Edit:
    """The changes to the header of a file with the facts `found` that carry `table` in the rendering chosen."""
    edit = Edit(source)
    arch = found.arch.name
    if how.reexpress is not None:
        how.reexpress.apply(edit, source.index)
        arch = how.reexpress.arch_to
    metadata.write_table(edit, arch, table, n_ctx, elastic=elastic)
    scaling = found.existing_scaling
    if found.attn_factor != 1.0 and (scaling is None or scaling.mergeable):
        metadata.write_base_attn_factor(edit, arch, found.attn_factor)
    metadata.write_provenance(edit, source.index, table, n_ctx)
    if how.kind == "portable":
        keep_type = how.tensor == LONG and found.scaling_type == "longrope"
        metadata.write_portable(edit, arch, table, keep_type=keep_type)
        _put_factors(edit, source, how.tensor, found.n_freqs, file_factors(table))
        if how.tensor == LONG and table.base_factors is not None:
            _put_factors(edit, source, SHORT, found.n_freqs, list(table.base_factors))
        return edit
    metadata.write_fallback(edit, arch, *_fallback(found, source, table))
    return edit


def _fallback(found: RopeFacts, source: Source, table: RopeTable) -> tuple[str, float]:
    """The scaling (type, factor) that stock applies to a file for the patched engine."""
    existing = found.existing_scaling
    if found.arch.longrope and LONG in source.index.tensors:
        return "longrope", 1.0  # its loader reads the tensors the file came with under this type alone
    if existing and existing.mergeable:
        return "linear", table.scale * existing.factor
    return "yarn", table.scale


def file_factors(table: RopeTable) -> list[float]:
    """The factors a file of this table carries, float32 values (n_rot/2,), the model's own rope_freqs included."""
    return stored_factors(table.radix_values, table.base_factors, table.lead)


def _put_factors(edit: Edit, source: Source, tensor: str, n_freqs: int, factors: list[float]) -> None:
    """The tensor of `n_freqs` factors; those past the rotated pairs are never read and stay what they were, or 1."""
    held = source.index.tensors.get(tensor)
    if held is None:
        data = metadata.pack_f32([*factors, *[1.0] * (n_freqs - len(factors))])
        edit.insert_tensor(tensor, (n_freqs,), F32, data)
        return
    data = metadata.pack_f32(factors)
    edit.replace_tensor(tensor, data + bytes(source.index.tensor_bytes(tensor)[len(data) :]))


def _contradiction(path: Path, dst: str | Path) -> Refused:
    return Refused(
        f"{path.name}: --in-place and DST {dst} contradict each other",
        why="in place means that the model file itself is changed",
        fix="leave one of them out",
    )


def _write(edit: Edit, out: Path, in_place: bool, force: bool, progress: Progress | None) -> WriteReport:
    from .gguf.write import write_in_place, write_new

    if in_place:
        return write_in_place(edit, progress=progress)
    return write_new(edit, out, force=force, progress=progress)
