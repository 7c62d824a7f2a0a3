"""Which architecture with stock RoPE factors computes this model's very function, and the edit that makes it that one.

Some architectures of llama.cpp differ from another only in their name, or in which elements of a head form a rotary
pair; but the other's loader takes `rope_freqs.weight` and theirs does not. Rewritten as the other, such a model runs
extended in any unpatched llama.cpp. Nothing is approximated: keys get another prefix, and where the pairs differ the
rows of attn_q and attn_k move so that elements i and i + n_rot/2 of a head become 2i and 2i + 1. The dot product of two
heads does not depend on the order of their elements, and a row of a quantised matrix is whole blocks that move as they
are. docs/reexpression.md says for every other architecture why it is not here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mrrope_gguf.errors import Refused
from mrrope_gguf.gguf.types import ValueType
from mrrope_gguf.limits import MAX_LAYERS
from mrrope_gguf.text import printable

if TYPE_CHECKING:
    from mrrope_gguf.gguf.edit import Edit
    from mrrope_gguf.gguf.index import GGUFIndex

BLOCK_TENSOR = re.compile(r"blk\.\d+\.(\w+)\.(weight|bias)")
GLOBALS = {"token_embd.weight", "output_norm.weight", "output.weight"}
PLAIN = ("attn_norm", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
QKV = ("attn_q", "attn_k", "attn_v", "attn_qkv")
MOE = ("ffn_gate_inp", *(f"ffn_{part}_{kind}" for kind in ("exps", "shexp") for part in ("gate", "up", "down")))
# what one of two loaders reads and the other does not, or what marks another kind of model: absent or zero
STRANGE_KEYS = (
    "expert_count", "nextn_predict_layers", "attention.sliding_window", "attention.scale", "rope.dimension_sections",
    "embedding_scale", "residual_scale", "logit_scale", "deepstack_mapping",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """How an architecture relates to the one it becomes: its pairs, and tensors beside those all these models have."""

    to: str = "llama"
    neox: bool = False
    weights: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    allowed_keys: tuple[str, ...] = ()


RULES = {
    "qwen2": Rule(neox=True),
    "qwen": Rule(neox=True),
    "pangu-embedded": Rule(neox=True, biases=("attn_output",)),
    "internlm2": Rule(),
    "xverse": Rule(),
    "ernie4_5": Rule(),
    "baichuan": Rule(),
    "bailingmoe": Rule("granitemoe", weights=MOE, allowed_keys=("expert_count",)),
}


@dataclass(frozen=True)
class Heads:
    """What the rows of attn_q and attn_k are made of."""

    n_head: int
    n_head_kv: int
    head_dim: int


@dataclass(frozen=True)
class Reexpression:
    """A rewriting that keeps the function; `why` says in a phrase what arch_from is in terms of arch_to."""

    arch_from: str
    arch_to: str
    why: str
    heads: Heads

    @property
    def moves_rows(self) -> bool:
        """Whether rows of attn_q and attn_k move, so that a LoRA made for the original no longer fits them."""
        return moves_rows(self.arch_from, self.arch_to)

    def apply(self, edit: Edit, index: GGUFIndex) -> None:
        """Rename the keys in `edit` and move the rows, in every shard of a split model. `index`: as given to `target`.

        Raises Refused where a later shard holds a tensor that arch_to would not treat alike.
        """
        source = edit.source
        files = [index, *(source.shard_index(shard) for shard in source.shards[1:])]
        for file in files[1:]:
            for problem in _tensor_problems(file, self.arch_from, self.arch_to, self.heads):
                raise Refused(
                    f"{file.path.name}: this shard cannot be rewritten from {self.arch_from} as {self.arch_to}",
                    why=problem,
                    fix="leave out --portable: the patched engine extends the model as it is",
                )
        self._rename_keys(edit, index)
        if self.moves_rows:
            for file in files:
                self._move_rows(edit, file)

    def _rename_keys(self, edit: Edit, index: GGUFIndex) -> None:
        edit.set("general.architecture", ValueType.STRING, self.arch_to)
        own = [key for key in index.kvs if key.startswith(f"{self.arch_from}.")]
        edit.rename_keys({key: self.arch_to + key[len(self.arch_from) :] for key in own})
        for key, kind, value in _own_keys(index, self.arch_from):
            edit.set(f"{self.arch_to}.{key}", kind, value)
        edit.set(f"{self.arch_to}.rope.scaling.mrrope.reexpressed_from", ValueType.STRING, self.arch_from)

    def _move_rows(self, edit: Edit, file: GGUFIndex) -> None:
        from mrrope_gguf.gguf.rows import RowPermutation

        dim = self.heads.head_dim
        heads = {"attn_q": self.heads.n_head, "attn_k": self.heads.n_head_kv}
        for name in file.tensors:
            n_head = heads.get(_part(name))
            if n_head:
                edit.permute_rows(name, RowPermutation(n_head, n_rot=dim, head_dim=dim))


def moves_rows(arch_from: str, arch_to: str) -> bool:
    """Whether rows of attn_q and attn_k move when arch_from becomes arch_to; False for names not in RULES.

    >>> moves_rows("qwen2", "llama"), moves_rows("qwen", "exaone"), moves_rows("xverse", "llama")
    (True, False, False)
    """
    return arch_from in RULES and RULES[arch_from].neox and arch_to == "llama"


def target(index: GGUFIndex, shards: Sequence[GGUFIndex] = ()) -> Reexpression | None:
    """The stock-factor architecture that computes this model's very function, or None: `why_not` then says why.

    `index` is the file with the metadata, `shards` are the later files of a split model.
    """
    arch = index.arch
    if arch not in RULES or why_not(index, shards):
        return None
    to = _arch_to(index, arch)
    why = "the same graph under another name"
    if moves_rows(arch, to):
        why = "the same graph with other rotary pairs, so the rows of attn_q and attn_k change places"
    return Reexpression(arch, to, why, _heads(index, arch))


def why_not(index: GGUFIndex, shards: Sequence[GGUFIndex] = ()) -> str | None:
    """What keeps this model from a stock-factor architecture, in a phrase, or None where nothing does."""
    arch = index.arch
    if arch not in RULES:
        return f"no architecture with stock factors computes what '{arch}' computes"
    return next(_problems(index, arch, shards), None)


def _arch_to(index: GGUFIndex, arch: str) -> str:
    """The rule's, but exaone (llama's graph with NEOX pairs) where q, k and v share a tensor whose rows do not move."""
    fused = any(_part(name) == "attn_qkv" for name in index.tensors)
    return "exaone" if RULES[arch].neox and fused else RULES[arch].to


def _own_keys(index: GGUFIndex, arch: str) -> list[tuple[str, ValueType, Any]]:
    """Keys (less their prefix, type, value) that the new architecture needs beside the renamed ones, or instead."""

    def get(key: str) -> Any:
        return index.get(f"{arch}.{key}")

    u32 = ValueType.UINT32
    if arch == "qwen":  # counts the gate and up halves of its SwiGLU
        return [("feed_forward_length", u32, get("feed_forward_length") // 2)]
    if arch == "bailingmoe":
        n_ff = get("expert_feed_forward_length")
        return [
            ("logit_scale", ValueType.FLOAT32, 1.0),
            ("feed_forward_length", u32, n_ff),
            ("expert_shared_feed_forward_length", u32, n_ff * get("expert_shared_count")),
        ]
    return []


def _heads(index: GGUFIndex, arch: str) -> Heads:
    n_head = index.get(f"{arch}.attention.head_count")
    n_head_kv = index.get(f"{arch}.attention.head_count_kv", n_head)
    head_dim = index.get(f"{arch}.attention.key_length") or index.get(f"{arch}.embedding_length") // n_head
    return Heads(n_head, n_head_kv, head_dim)


def _problems(index: GGUFIndex, arch: str, shards: Sequence[GGUFIndex]) -> Iterator[str]:
    """What stands against the rewriting, from the header alone; later checks rely on the earlier ones."""
    to = _arch_to(index, arch)
    yield from _key_problems(index, arch, to)
    heads = _heads(index, arch)
    n_rot = index.get(f"{arch}.rope.dimension_count", heads.head_dim)
    n_value = index.get(f"{arch}.attention.value_length", heads.head_dim)
    if not heads.head_dim == n_rot == n_value:
        yield f"{to} wants whole heads rotated, and these have {heads.head_dim} keys, {n_value} values, {n_rot} rotated"
    for file in (index, *shards):
        yield from _tensor_problems(file, arch, to, heads)


def _key_problems(index: GGUFIndex, arch: str, to: str) -> Iterator[str]:
    def get(key: str) -> Any:
        return index.get(f"{arch}.{key}", most=MAX_LAYERS)  # one for each layer

    for key in ("embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        if not isinstance(get(key), int) or get(key) < 1:
            yield f"{arch}.{key} is {'missing' if get(key) is None else 'not one number'}"
    if not isinstance(get("attention.head_count_kv"), int | None):
        yield f"{arch}.attention.head_count_kv is not one number"
    for key in STRANGE_KEYS:
        value = get(key)
        if key not in RULES[arch].allowed_keys and (any(value) if isinstance(value, list) else value):
            yield f"it holds {arch}.{key} = {printable(str(value))}"
    if arch == "baichuan" and get("block_count") != 32:
        yield f"it has {get('block_count')} layers, and llama.cpp gives {arch} plain RoPE only with 32"
    if arch == "bailingmoe":
        yield from _expert_problems(index, arch)
    clash = next((key for key in index.kvs if key.startswith(f"{to}.")), None)
    if clash:
        yield f"it holds {clash} already"


def _expert_problems(index: GGUFIndex, arch: str) -> Iterator[str]:
    """granitemoe always makes the chosen experts' weights sum to 1, and never scales them."""
    for key in ("expert_feed_forward_length", "expert_shared_count"):
        if not isinstance(index.get(f"{arch}.{key}"), int):
            yield f"{arch}.{key} is no number"
    if not index.get(f"{arch}.expert_weights_norm"):
        yield f"{arch}.expert_weights_norm is not set, and {RULES[arch].to} always normalises"
    if index.get(f"{arch}.expert_weights_scale", 1.0) not in (0.0, 1.0):
        yield f"{arch}.expert_weights_scale is {index.get(f'{arch}.expert_weights_scale')}"


def _tensor_problems(file: GGUFIndex, arch: str, to: str, heads: Heads) -> Iterator[str]:
    rule = RULES[arch]
    known = {f"{name}.weight" for name in PLAIN + QKV + rule.weights} | {f"{name}.bias" for name in QKV}
    if to == rule.to:
        known |= {f"{name}.bias" for name in rule.biases}
    if moves_rows(arch, to):
        known -= {"attn_qkv.weight", "attn_qkv.bias"}
    rows = {"attn_q": heads.n_head, "attn_k": heads.n_head_kv}
    for name, tensor in file.tensors.items():
        block = BLOCK_TENSOR.fullmatch(name)
        if name not in GLOBALS and (block is None or f"{block[1]}.{block[2]}" not in known):
            yield f"{arch} and {to} do not both use its tensor {name} in the same way"
        n_head = rows.get(_part(name))
        if n_head and tensor.dims[-1:] != (n_head * heads.head_dim,):
            yield f"{name} has the shape {tensor.dims}, expected rows for {n_head} heads of {heads.head_dim}"


def _part(name: str) -> str:
    """What a layer's tensor is, or nothing.

    >>> _part("blk.7.attn_q.bias"), _part("output.weight")
    ('attn_q', '')
    """
    block = BLOCK_TENSOR.fullmatch(name)
    return block[1] if block else ""
