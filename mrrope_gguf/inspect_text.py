"""An Inspection as terminal text: a label, a sentence, at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .text import printable

if TYPE_CHECKING:
    from .facts import RopeFacts
    from .inspect import FileFacts, Inspection, Reach
    from .stored_table import StoredTable
    from .tables import RopeTable

WIDTH = 100
_LABEL = 12
_PAIRS = {
    "norm": "NORM pairs (2i, 2i+1)",
    "neox": "NEOX pairs (i, i + n_rot/2)",
    "mrope": "M-RoPE sections",
    "imrope": "interleaved M-RoPE sections",
}
_SAMPLES = 6


def render(found: Inspection) -> str:
    """The whole report, without a trailing newline."""
    return "\n".join([printable(found.file.name), *(_line(label, text) for label, text in _rows(found))])


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield from _file_rows(found.file)
    if found.facts is not None:
        yield "context", _context(found.facts, found.stored)
        yield from _rope_rows(found.facts)
    if found.stored is not None:
        yield from _table_rows(found.stored)
    elif found.facts is not None and found.obstacle is None:
        yield "table", "none of ours: " + _own_angles(found.facts)
    if found.reach is not None:
        yield "bound", _bound(found.reach)
    if found.verdicts is not None:
        yield "stock", found.verdicts.stock
        yield "patched", found.verdicts.patched
        if found.verdicts.extend:
            yield "extend", found.verdicts.extend
    if found.obstacle is not None:
        yield "obstacle", found.obstacle.what.removeprefix(f"{printable(found.file.name)}: ")
        yield "why", found.obstacle.why
        yield "fix", found.obstacle.fix
    for warning in found.warnings:
        yield "warning", warning


def _line(label: str, text: str) -> str:
    indent = " " * (_LABEL + 2)
    first = f"  {label:<{_LABEL}}"
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _file_rows(file: FileFacts) -> Iterator[tuple[str, str]]:
    name = f"{printable(file.model_name)}, " if file.model_name else ""
    kind = printable(file.architecture) if file.architecture else "not named"
    yield "model", f"{name}architecture {kind}"
    bits = f" ({8 * sum(file.types.values()) / file.n_parameters:.2f} bits per weight)" if file.n_parameters else ""
    yield (
        "size",
        f"{_bytes(file.nbytes)}, {_count(file.n_parameters)} parameters in {file.n_tensors} tensors, "
        f"{file.quantisation}{bits}",
    )
    if file.shards:
        yield "split", f"{len(file.shards)} files, from {printable(file.shards[0])}"


def _context(facts: RopeFacts, stored: StoredTable | None) -> str:
    if stored is not None:
        return f"{facts.n_ctx_train} tokens, extended from {facts.n_ctx_orig} (S = {stored.table.scale:g})"
    if facts.n_ctx_orig != facts.n_ctx_train:
        return f"{facts.n_ctx_train} tokens, scaled by its makers from {facts.n_ctx_orig}"
    return f"{facts.n_ctx_train} tokens"


def _rope_rows(facts: RopeFacts) -> Iterator[tuple[str, str]]:
    if facts.arch.rope == "none" or not any(facts.layers.rope):
        yield "rope", "none"
        return
    part = f"{facts.n_rot} of {facts.head_dim}" if facts.partial else f"all {facts.n_rot}"
    n_rope = sum(facts.layers.rope)
    where = f"in {n_rope} of {facts.n_layer} layers" if n_rope < facts.n_layer else f"in all {n_rope} layers"
    yield "rope", f"{part} dimensions of a head, {_PAIRS[facts.arch.rope]}, base {_plain(facts.freq_base)}, {where}"
    n_sliding = sum(facts.layers.sliding)
    if n_sliding:
        base = f", base {_plain(facts.freq_base_swa)}" if facts.freq_base_swa != facts.freq_base else ""
        yield "", f"{n_sliding} layers see only {facts.n_swa} tokens{base}; they are never extended"
    if facts.base_factors is not None:
        low, high = min(facts.base_factors), max(facts.base_factors)
        yield "", f"with factors of the model's own (rope_freqs or linear), {low:g} to {high:g}"


def _own_angles(facts: RopeFacts) -> str:
    existing = facts.existing_scaling
    if existing is None:
        return "the angles are the model's own"
    return f"its makers scaled it by {existing.kind}, factor {existing.factor:g}"


def _table_rows(stored: StoredTable) -> Iterator[tuple[str, str]]:
    t = stored.table
    carrier = {"rope_freqs": "portable, in rope_freqs.weight", "long": "portable, in rope_factors_long.weight"}
    rendering = carrier.get(stored.rendering, "metadata for the patched engine alone")
    yield "table", f"{printable(t.method)}, S = {t.scale:g}, attn_factor {t.attn_factor:.4f}; {rendering}"
    yield (
        "band",
        f"pairs {t.d_l} to {t.d_h} of {t.n_rot // 2}, which turn {t.beta_fast:g} to {t.beta_slow:g} times "
        f"within {t.n_ctx_orig} tokens",
    )
    yield "factors", factor_view(t)
    undo = "the original can be restored with `mrrope revert`" if stored.revertible else "no undo record"
    yield "elastic", f"{'yes' if stored.elastic else 'no, the table is static'}; {undo}"


def factor_view(table: RopeTable) -> str:
    """The factors in one line: runs of equal ones, and a few of those between.

    >>> from mrrope_gguf.tables import rope_table
    >>> factor_view(rope_table("mrrope-pro", n_rot=16, freq_base=1e4, n_ctx_orig=4096, scale=4))
    '0-2: 1 | 3: 1.15 | 4: 1.52 | 5: 2.3 | 6: 4 | 7: 4'
    """
    parts: list[str] = []
    between: list[tuple[int, float]] = []
    at = 0
    for value, run in groupby(table.factor_values, key=lambda f: float(f"{f:.3g}")):
        n = len(list(run))
        if n < 3:
            between += [(at + k, value) for k in range(n)]
        else:
            parts += [*_sampled(between), f"{at}-{at + n - 1}: {value:g}"]
            between = []
        at += n
    return " | ".join(parts + _sampled(between))


def _sampled(between: Sequence[tuple[int, float]]) -> list[str]:
    if len(between) > _SAMPLES:
        steps = [round(k * (len(between) - 1) / (_SAMPLES - 1)) for k in range(_SAMPLES)]
        between = [between[step] for step in steps]
    return [f"{pair}: {value:g}" for pair, value in between]


def _bound(reach: Reach) -> str:
    apart = f"up to {reach.bound - 1} tokens" if reach.bound else f"beyond {reach.limit} tokens"
    seen = f"alike tokens outscore random ones {apart} apart"
    enough = reach.bound is None or reach.bound >= reach.n_ctx
    verdict = "" if enough else f", short of the context of {reach.n_ctx}"
    if reach.min_base is None:
        return f"{seen}{verdict}; no RoPE base alone would reach {reach.n_ctx}"
    return f"{seen}{verdict}; plain RoPE would need a base of {_plain(reach.min_base)} for {reach.n_ctx}"


def _plain(number: float) -> str:
    """A base without an exponent where it is a whole number of moderate size."""
    return f"{number:.0f}" if number == int(number) and number < 1e12 else f"{number:g}"


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def _count(n: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
