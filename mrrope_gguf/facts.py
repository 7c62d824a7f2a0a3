"""What a model's header says about its RoPE, read the way llama.cpp reads it: same keys, same defaults.

`rope_facts` refuses what cannot be extended; `read_facts` also describes such models, for `inspect`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from . import limits
from .architectures import Arch
from .errors import BadFile, Refused
from .gguf.index import GGUFIndex
from .gguf.types import ValueType
from .header import Header
from .kinds import known_architecture
from .layers import Layers, count_layers, layers, window
from .text import printable

ROPE_FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
SCALING_TYPES = ("none", "linear", "yarn", "longrope")  # any other aborts the process that loads the file
_F32 = 0
# their graphs ask for the n_rot of each layer; the others use the first layer's for all
_N_ROT_PER_LAYER = frozenset(("gemma4", "gemma4-assistant", "maple", "spark2_5", "step35"))
# rope_freqs of half a head, whatever n_rot is
_FREQS_OF_HEAD = frozenset(("gemma4", "gemma4-assistant", "dflash", "phimoe"))
_WHOLE_HEAD = frozenset(("plamo", "deepseek2-ocr", "cogvlm"))
_MUST_ROTATE_WHOLE_HEAD = frozenset(("llama", "deci", "falcon", "llama-embed"))
_SECTIONS_DECIDE = frozenset(("glm4", "glm4moe", "hunyuan_vl", "bailingmoe3"))
_GLM_DSA_LIMIT = 1 << 20
_MRROPE_WORDS = (
    "version", "method", "scale", "beta_fast", "beta_slow", "attn_factor", "radix", "elastic", "lead", "base_factors",
    "base_attn_factor", "reexpressed_from",
)  # fmt: skip


@dataclass(frozen=True)
class Scaling:
    """A RoPE scaling that the file already has: linear, yarn or longrope. `why` says what that means for extending."""

    kind: str
    factor: float
    mergeable: bool
    why: str

    def merged(self, facts: RopeFacts) -> RopeFacts:
        """The facts of the same function with the scaling moved into base_factors. ValueError if not mergeable."""
        if not self.mergeable:
            raise ValueError(f"{self.kind} scaling cannot be merged into a table")
        own = facts.base_factors or (1.0,) * (facts.n_rot // 2)
        return replace(
            facts,
            base_factors=tuple(self.factor * factor for factor in own),
            n_ctx_orig=facts.n_ctx_train,
            scaling_factor=1.0,
            existing_scaling=None,
        )


@dataclass(frozen=True)
class RopeFacts:
    """A model's RoPE and the shape of its attention.

    `arch` is the architecture as this file's metadata decides it: its rope type, whether layers slide, whether the
    keys can be re-rotated. `n_rot`, `freq_base` and `head_dim` are those of the global layers. `n_head` and
    `n_head_kv` are the largest of any layer, `heads` and `heads_kv` have one entry per executed layer. `n_freqs` is the
    length of the rope_freqs.weight that stock wants (n_rot/2 but for a few). `base_factors` are the model's own
    rope_freqs, n_rot/2 of them. `max_ctx` is a length that must not be written, or None.
    """

    arch: Arch
    n_ctx_train: int
    n_ctx_orig: int
    n_rot: int
    n_freqs: int
    freq_base: float
    freq_base_swa: float
    head_dim: int
    head_dim_v: int
    head_dim_swa: int
    head_dim_v_swa: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    heads: tuple[int, ...]
    heads_kv: tuple[int, ...]
    kv_lora_rank: int
    n_swa: int
    layers: Layers
    scaling_type: str
    scaling_factor: float
    attn_factor: float
    base_factors: tuple[float, ...] | None
    existing_scaling: Scaling | None
    mrrope: dict[str, Any] | None
    max_ctx: int | None

    @property
    def partial(self) -> bool:
        """Whether only part of each head is rotated."""
        return self.n_rot < self.head_dim


def rope_facts(index: GGUFIndex) -> RopeFacts:
    """The facts of a model that can be extended.

    Raises Refused, with the reason, for a file that is no model, an architecture llama.cpp does not know, a model
    without RoPE or with RoPE only in sliding-window layers; BadFile where llama.cpp would not load the header.
    """
    facts = read_facts(index)
    if refusal := obstacle(facts, printable(index.path.name)):
        raise refusal
    return facts


def read_facts(index: GGUFIndex) -> RopeFacts:
    """The facts of any model llama.cpp knows, extendable or not. Raises Refused or BadFile as rope_facts does."""
    arch = known_architecture(index)
    header = Header(index, arch.name)
    n_layer = _layer_count(header)
    laid_out = layers(header, arch)
    heads = header.u32s("attention.head_count", n_layer, 0)
    heads_kv = header.u32s("attention.head_count_kv", n_layer, 0) if header.has("attention.head_count_kv") else heads
    n_embd = header.u32("embedding_length", 0)
    head_dim, head_dim_v, head_dim_swa, head_dim_v_swa = _head_dims(header, n_embd, heads)
    n_rot, n_rot_max = _n_rot(header, laid_out, head_dim)
    n_ctx_train = _context_length(header)
    mrrope = read_mrrope(header)
    facts = RopeFacts(
        arch=_resolved(header, arch, laid_out),
        n_ctx_train=n_ctx_train,
        n_ctx_orig=header.u32("rope.scaling.original_context_length", n_ctx_train),
        n_rot=n_rot,
        n_freqs=(head_dim if arch.name in _FREQS_OF_HEAD else n_rot_max) // 2,
        freq_base=_freq_base(header, head_dim),
        freq_base_swa=_freq_base_swa(header, arch),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        head_dim_swa=head_dim_swa,
        head_dim_v_swa=head_dim_v_swa,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=max(heads),
        n_head_kv=max(heads_kv),
        heads=heads,
        heads_kv=heads_kv,
        kv_lora_rank=header.u32("attention.kv_lora_rank", 0),
        n_swa=window(header),
        layers=laid_out,
        scaling_type=_scaling_type(header),
        scaling_factor=_scaling_factor(header),
        attn_factor=header.f32("rope.scaling.attn_factor", 1.0),
        base_factors=_base_factors(header, arch, n_rot, mrrope),
        existing_scaling=None,
        mrrope=mrrope,
        max_ctx=_max_ctx(header, n_ctx_train),
    )
    _check(header, facts)
    return replace(facts, existing_scaling=_existing(index, facts))


def obstacle(facts: RopeFacts, name: str) -> Refused | None:
    """Why this model cannot be extended at all, or None. `name` is the file's, for the message."""
    arch, n_rope = facts.arch, sum(facts.layers.rope)
    if not n_rope or facts.n_rot == 0:
        return Refused(
            f"{name}: this model has no RoPE ('{arch.name}')",
            why=f"none of its {facts.n_layer} layers rotates queries and keys" + f" ({arch.note})" * bool(arch.note),
            fix="there is nothing to stretch: its context cannot be extended this way",
        )
    if not facts.layers.extended:
        return Refused(
            f"{name}: only the sliding-window layers of this model have RoPE ('{arch.name}')",
            why=f"{n_rope} of {facts.n_layer} layers rotate, and each of them sees {facts.n_swa} tokens at most; "
            "the layers that see everything have no positions to run out of",
            fix="none needed: ask for a longer context with -c and measure whether the model keeps up",
        )
    if not arch.hook and not arch.portable:
        return Refused(
            f"{name}: llama.cpp's '{arch.name}' cannot take a rope table",
            why=arch.note,
            fix="use a model of another architecture",
        )
    return None


def read_mrrope(header: Header) -> dict[str, Any] | None:
    """The mrrope keys of an extended file by their last word, or None. `undo` is True where an undo record is kept."""
    prefix = f"{header.arch}.rope.scaling.mrrope."
    found = {word: kv for word in (*_MRROPE_WORDS, "undo") if (kv := header.index.find(prefix + word)) is not None}
    if "version" not in found:
        return None
    kept = {
        # a longer array is wrong by its length, and none is of strings
        word: header.index.get(prefix + word, most=0 if kv.item_type is ValueType.STRING else limits.MAX_ROT)
        for word, kv in found.items()
        if word != "undo"
    }
    return {**kept, "undo": "undo" in found}


def _layer_count(header: Header) -> int:
    most = limits.MAX_LAYERS
    if not 0 < header.u32("block_count", 0) <= most or not 0 < count_layers(header) <= most:
        raise _bad(header, "block_count", f"between 1 and {most} layers")
    if name := limits.broken(header, header.u32("block_count", 0)):
        raise _bad(header, *name)
    return count_layers(header)


def _context_length(header: Header) -> int:
    n_ctx = header.u32("context_length", 0)
    if not 0 < n_ctx <= limits.MAX_CTX:
        raise _bad(header, "context_length", f"the number of tokens the model was trained on, at most {limits.MAX_CTX}")
    return n_ctx


def _head_dims(header: Header, n_embd: int, heads: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Key and value length of a head in global layers, then in sliding ones."""
    default = n_embd // heads[0] if heads[0] else 0
    key = header.u32("attention.key_length", default)
    value = header.u32("attention.value_length", default)
    if not heads[0]:
        key = value = 0
    return (
        key,
        value,
        header.u32("attention.key_length_swa", key),
        header.u32("attention.value_length_swa", value),
    )


def _n_rot(header: Header, laid_out: Layers, head_dim: int) -> tuple[int, int]:
    """Rotated dimensions of a head in global layers, and the most of any layer."""
    full = header.u32("rope.dimension_count", head_dim) if head_dim else 0
    sliding = header.u32("rope.dimension_count_swa", full)
    if header.arch in _WHOLE_HEAD:
        return head_dim, head_dim
    if header.arch == "step35":
        full //= 2
    if header.arch in _N_ROT_PER_LAYER:
        return full, max(full, sliding if any(laid_out.sliding) else 0)
    n_rot = sliding if laid_out.sliding[0] else full
    return n_rot, n_rot


def _freq_base(header: Header, head_dim: int) -> float:
    base = header.f32("rope.freq_base", 10000.0)
    alpha = header.f32("rope.scaling.alpha", 0.0)
    if header.arch in ("hunyuan-dense", "hunyuan_vl") and alpha > 0.0 and head_dim > 2:
        base *= alpha ** (head_dim / (head_dim - 2))
    return base


def _freq_base_swa(header: Header, arch: Arch) -> float:
    base = header.f32("rope.freq_base", 10000.0)
    if arch.name in ("granite_swa", "olmo2", "mellum", "dflash", "lfm2"):  # their graphs use one base for all layers
        return base
    return header.f32("rope.freq_base_swa", 10000.0 if arch.swa == "own-base" else base)


def _scaling_type(header: Header) -> str:
    kind = header.text("rope.scaling.type", "linear" if _scaling_factor(header) != 1.0 else "none")
    if kind not in SCALING_TYPES:
        raise _bad(header, "rope.scaling.type", f"one of {', '.join(SCALING_TYPES)}; any other aborts llama.cpp")
    return kind


def _scaling_factor(header: Header) -> float:
    """rope.scaling.factor or the older rope.scale_linear; 1 where there is none, or where it is 0."""
    key = "rope.scaling.factor" if header.has("rope.scaling.factor") else "rope.scale_linear"
    return header.f32(key, 0.0) or 1.0


def _max_ctx(header: Header, n_ctx_train: int) -> int | None:
    """glm-dsa takes its indexer layout from the context length, unless the file spells it out."""
    spelled_out = header.has("attention.indexer.types")
    limited = header.arch == "glm-dsa" and n_ctx_train < _GLM_DSA_LIMIT and not spelled_out
    return _GLM_DSA_LIMIT - 1 if limited else None


def _base_factors(header: Header, arch: Arch, n_rot: int, mrrope: dict[str, Any] | None) -> tuple[float, ...] | None:
    """The model's own factors: its rope_freqs, or what an extended file kept of them."""
    if mrrope is not None:
        return _kept_factors(header, n_rot, mrrope.get("base_factors"))
    tensor = header.index.tensors.get(ROPE_FREQS)
    if tensor is None or not arch.portable:
        return None
    if tensor.type != _F32 or len(tensor.dims) != 1 or tensor.dims[0] < n_rot // 2:
        raise BadFile(
            f"{header.index.path.name}: {ROPE_FREQS} has the wrong shape or type",
            why=f"it holds {tensor.dims} values of type {tensor.type}; llama.cpp wants f32, one per rotary pair",
            fix="convert or download the model again",
            offset=tensor.start,
            field=ROPE_FREQS,
        )
    values = struct.unpack_from(f"<{n_rot // 2}f", header.index.tensor_bytes(ROPE_FREQS))
    wrong = next((i for i, value in enumerate(values) if not (isfinite(value) and value > 0.0)), None)
    if wrong is not None:
        raise BadFile(
            f"{header.index.path.name}: {ROPE_FREQS} holds a number that no angle can be divided by",
            why=f"the factor of pair {wrong} is {values[wrong]!r}",
            fix="convert or download the model again",
            offset=header.index.data_start + tensor.offset + 4 * wrong,
            field=ROPE_FREQS,
        )
    return values if any(value != 1.0 for value in values) else None


def _kept_factors(header: Header, n_rot: int, kept: Any) -> tuple[float, ...] | None:
    """The mrrope.base_factors of an extended file. Raises BadFile for anything but n_rot/2 numbers above 0."""
    if kept is None:
        return None
    sound = isinstance(kept, list) and all(isinstance(v, float) and isfinite(v) and v > 0 for v in kept)
    if sound and len(kept) == n_rot // 2:
        return tuple(kept)
    raise _bad(header, "rope.scaling.mrrope.base_factors", f"{n_rot // 2} numbers above 0")


def _resolved(header: Header, arch: Arch, laid_out: Layers) -> Arch:
    """The architecture with what this file's metadata decides filled in."""
    sections = header.array("rope.dimension_sections", 4) or (0, 0, 0, 0)
    if arch.name in _SECTIONS_DECIDE and sections[0] > 0 and sections[1] > 0:
        arch = replace(arch, rope="mrope", static_only=True)
    elif arch.name == "dflash":
        plain = "norm" if header.u32("hyper_connection.count", 0) else "neox"
        arch = replace(arch, rope="mrope" if any(sections) else plain, static_only=any(sections))
    elif arch.name == "hy_v4" and header.u32("attention.indexer.top_k", 0):
        arch = replace(arch, static_only=True)
    if not any(laid_out.sliding):
        arch = replace(arch, swa="", leak="")
    elif arch.swa == "only" and laid_out.extended:
        arch = replace(arch, swa="same-base")
    return arch


def _existing(index: GGUFIndex, facts: RopeFacts) -> Scaling | None:
    """The scaling the model came with, unless it is one of ours."""
    if facts.mrrope is not None:
        return None
    if facts.arch.longrope and (LONG in index.tensors or SHORT in index.tensors):
        why = "its long and short factors were found together with its weights"
        return Scaling("longrope", facts.n_ctx_train / facts.n_ctx_orig, False, why)
    if facts.scaling_type == "none" or facts.scaling_factor == 1.0:
        return None
    if facts.scaling_type == "yarn":
        why = f"it was trained with YaRN from {facts.n_ctx_orig} to {facts.n_ctx_train} tokens; another table differs"
        return Scaling("yarn", facts.scaling_factor, False, why)
    if facts.scaling_type == "longrope":
        return Scaling("longrope", facts.scaling_factor, False, "it divides positions under type longrope")
    why = f"positions divided by {facts.scaling_factor:g} are the same as every factor times {facts.scaling_factor:g}"
    return Scaling("linear", facts.scaling_factor, True, why)


def _check(header: Header, facts: RopeFacts) -> None:
    """Raises BadFile for numbers no RoPE can have."""
    if facts.arch.rope == "none":
        return
    if facts.n_rot % 2 or facts.n_rot > min(facts.head_dim, limits.MAX_ROT):
        most = min(facts.head_dim, limits.MAX_ROT)
        raise _bad(header, "rope.dimension_count", f"an even number up to the head's {facts.head_dim}, at most {most}")
    if header.arch in _MUST_ROTATE_WHOLE_HEAD and facts.n_rot != facts.head_dim:
        raise _bad(header, "rope.dimension_count", f"{facts.head_dim}, the whole head, for this architecture")
    if not (isfinite(facts.freq_base) and facts.freq_base > 1.0):
        raise _bad(header, "rope.freq_base", "a number above 1")
    if facts.n_ctx_orig == 0:
        raise _bad(header, "rope.scaling.original_context_length", "a number of tokens")
    for key, value in (("factor", facts.scaling_factor), ("attn_factor", facts.attn_factor)):
        if not (isfinite(value) and value > 0.0):
            raise _bad(header, f"rope.scaling.{key}", "a positive number")


def _bad(header: Header, name: str, wanted: str) -> BadFile:
    """A BadFile about one key of the architecture: what it holds, what it should."""
    key = f"{header.arch}.{name}"
    kv = header.index.find(key)
    held = "is missing" if kv is None else f"is {_shown(header.index.get(key, most=limits.MAX_LAYERS))}"
    return BadFile(
        f"{printable(header.index.path.name)}: {key} {held}",
        why=f"llama.cpp needs {wanted}",
        fix="convert or download the model again",
        offset=header.index.infos_start if kv is None else kv.start,
        field=key,
    )


def _shown(value: Any) -> str:
    return repr(printable(value)) if isinstance(value, str) else printable(str(value), limit=60)
