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

if TYPE_CHECKING:
    from mrrope_gguf.gguf.edit import Edit
    from mrrope_gguf.gguf.index import GGUFIndex

BLOCK_TENSOR = re.compile(r"blk\.\d+\.(\w+)\.(weight|bias)")
GLOBALS = {"token_embd.weight", "output_norm.weight", "output.weight"}
PLAIN = ("attn_norm", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
QKV = ("attn_q", "attn_k", "attn_v", "attn_qkv")


@dataclass(frozen=True)
class Rule:
    """How an architecture relates to llama: its pairs, biases beside those of q, k and v, and what else is its own."""

    neox: bool = False
    biases: tuple[str, ...] = ()
    ffn_counted_twice: bool = False
    n_layer: int | None = None


RULES = {
    "qwen2": Rule(neox=True),
    "qwen": Rule(neox=True, ffn_counted_twice=True),
    "pangu-embedded": Rule(neox=True, biases=("attn_output",)),
    "internlm2": Rule(),
    "xverse": Rule(),
    "ernie4_5": Rule(),
    # with any other number of layers its graph has ALiBi, or no positions at all
    "baichuan": Rule(n_layer=32),
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
        return RULES[self.arch_from].neox and self.arch_to == "llama"

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
        for key in index.kvs:
            if key.startswith(f"{self.arch_from}."):
                edit.rename_key(key, self.arch_to + key[len(self.arch_from) :])
        if RULES[self.arch_from].ffn_counted_twice:
            twice = index.get(f"{self.arch_from}.feed_forward_length")
            edit.set(f"{self.arch_to}.feed_forward_length", ValueType.UINT32, twice // 2)
        edit.set(f"{self.arch_to}.rope.scaling.mrrope.reexpressed_from", ValueType.STRING, self.arch_from)

    def _move_rows(self, edit: Edit, file: GGUFIndex) -> None:
        from mrrope_gguf.gguf.undo import RowPermutation

        dim = self.heads.head_dim
        heads = {"attn_q": self.heads.n_head, "attn_k": self.heads.n_head_kv}
        for name in file.tensors:
            n_head = heads.get(_part(name))
            if n_head:
                edit.permute_rows(name, RowPermutation(n_head, n_rot=dim, head_dim=dim))


def target(index: GGUFIndex, shards: Sequence[GGUFIndex] = ()) -> Reexpression | None:
    """The stock-factor architecture that computes this model's very function, or None: `why_not` then says why.

    `index` is the file with the metadata, `shards` are the later files of a split model.
    """
    arch = index.arch
    if arch not in RULES or why_not(index, shards):
        return None
    neox, to = RULES[arch].neox, _arch_to(index, arch)
    if not neox:
        why = "another name for the same graph"
    elif to == "llama":
        why = "the same graph with other rotary pairs, so the rows of attn_q and attn_k change places"
    else:
        why = "another name for the same graph (its fused attn_qkv keeps it from llama's pairs)"
    return Reexpression(arch, to, why, _heads(index, arch))


def why_not(index: GGUFIndex, shards: Sequence[GGUFIndex] = ()) -> str | None:
    """What keeps this model from a stock-factor architecture, in a phrase, or None where nothing does."""
    arch = index.arch
    if arch not in RULES:
        return f"no architecture with stock factors computes what '{arch}' computes"
    return next(_problems(index, arch, shards), None)


def _arch_to(index: GGUFIndex, arch: str) -> str:
    """llama, which every loader knows; exaone (NEOX) where q, k and v share a tensor whose rows we do not move."""
    fused = any(_part(name) == "attn_qkv" for name in index.tensors)
    return "exaone" if RULES[arch].neox and fused else "llama"


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
        return index.get(f"{arch}.{key}")

    for key in ("embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        if not isinstance(get(key), int) or get(key) < 1:
            yield f"{arch}.{key} is {'missing' if get(key) is None else 'not one number'}"
    if not isinstance(get("attention.head_count_kv"), int | None):
        yield f"{arch}.attention.head_count_kv is not one number"
    # what one of the two loaders reads and the other does not, or what marks another kind of model
    for key in ("expert_count", "nextn_predict_layers", "attention.sliding_window", "rope.dimension_sections"):
        value = get(key)
        if any(value) if isinstance(value, list) else value:
            yield f"it holds {arch}.{key} = {value}"
    n_layer = RULES[arch].n_layer
    if n_layer is not None and get("block_count") != n_layer:
        yield f"it has {get('block_count')} layers, and llama.cpp gives {arch} plain RoPE only with {n_layer}"
    clash = next((key for key in index.kvs if key.startswith(f"{to}.")), None)
    if clash:
        yield f"it holds {clash} already"


def _tensor_problems(file: GGUFIndex, arch: str, to: str, heads: Heads) -> Iterator[str]:
    known = {f"{name}.weight" for name in PLAIN + QKV} | {f"{name}.bias" for name in QKV}
    if to == "llama":
        known |= {f"{name}.bias" for name in RULES[arch].biases}
        if RULES[arch].neox:
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
