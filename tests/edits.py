"""GGUF files to edit, and what an independent reader says of the result.

`model` is a fixed one, with a vocabulary of more than a few blocks and tensors of several quantised types; `files` is a
Hypothesis strategy of small odd ones. Both come from gguf_bytes, which shares nothing with the code under test.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import strategies as st

from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.rows import RowPermutation
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.types import ValueType
from mrrope_gguf.gguf.write import WriteReport, write_new
from tests import gguf_bytes as g

FACTORS = bytes(range(256)) * 2
HEADS = RowPermutation(n_head=4, n_rot=6, head_dim=8)
HEAD_ORDER = (0, 3, 1, 4, 2, 5, 6, 7)  # HEADS, written out: pairs (0, 3), (1, 4), (2, 5), then what does not rotate
QUANTISED = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K", "IQ4_XS", "IQ2_XXS")


def block(type_name: str) -> tuple[int, int, int]:
    """Number, block size and bytes of a block of a tensor type, as the gguf package has them."""
    kind = GGMLQuantizationType[type_name]
    elements, size = GGML_QUANT_SIZES[kind]
    return int(kind), elements, size


@dataclass
class Raw:
    """A file in the making: its records, tensors as (name, dims, type name), alignment, a padded end or not."""

    kvs: list[bytes]
    tensors: list[tuple[str, tuple[int, ...], str]]
    alignment: int = 32
    end_pad: bool = True
    gap: bytes = b"\0"  # what fills the space before the data
    seed: int = 0

    def nbytes(self, dims: tuple[int, ...], type_name: str) -> int:
        _, elements, size = block(type_name)
        n = 1
        for d in dims:
            n *= d
        return n // elements * size

    def build(self) -> bytes:
        rng, infos, data, offset = random.Random(self.seed), [], [], 0
        for name, dims, type_name in self.tensors:
            infos.append(g.tensor(name, dims, block(type_name)[0], offset))
            data.append(rng.randbytes(self.nbytes(dims, type_name)))
            offset += len(g.pad(data[-1], self.alignment))
        kvs = [*self.kvs, g.kv("general.alignment", g.U32, g.u32(self.alignment))] if self.alignment != 32 else self.kvs
        file = g.gguf(kvs, infos, data, alignment=self.alignment, end_pad=self.end_pad)
        bare = len(g.head(0, 0) + b"".join(kvs) + b"".join(infos))
        filled = len(g.pad(file[:bare], self.alignment)) if infos else bare
        return file[:bare] + (self.gap * (filled - bare))[: filled - bare] + file[filled:]


def text(key: str, value: str | bytes) -> bytes:
    return g.kv(key, g.STRING, g.string(value))


def heads(name: str, type_name: str, n_heads: int = 4, blocks: int = 1) -> tuple[str, tuple[int, ...], str]:
    """A projection of n_heads heads of 8 rows."""
    return name, (block(type_name)[1] * blocks, 8 * n_heads), type_name


def model(n_layer: int = 3, n_vocab: int = 5000, alignment: int = 32, seed: int = 1) -> Raw:
    """A model file with everything an edit meets: vocabulary, odd records, q and k of several types, biases."""
    words = g.array(g.STRING, n_vocab, b"".join(g.string(f"word{i}") for i in range(n_vocab)))
    kvs = [
        text("general.architecture", "llama"),
        text("general.name", b"odd \xff name"),
        g.kv("llama.context_length", g.U32, g.u32(64)),
        g.kv("llama.rope.freq_base", g.F32, g.u32(0x461C4000)),
        g.kv("llama.empty", g.ARRAY, g.array(g.F32, 0, b"")),
        g.kv("tokenizer.ggml.tokens", g.ARRAY, words),
        g.kv("tokenizer.ggml.bos_token_id", g.U32, g.u32(1)),
    ]
    tensors: list[tuple[str, tuple[int, ...], str]] = [("token_embd.weight", (96, 33), "F32")]
    for i in range(n_layer):
        kind = QUANTISED[i % len(QUANTISED)]
        tensors += [heads(f"blk.{i}.attn_q.weight", kind), heads(f"blk.{i}.attn_k.weight", kind)]
        tensors += [(f"blk.{i}.attn_q.bias", (32,), "F32"), (f"blk.{i}.ffn.weight", (256, 77), "Q4_K")]
    return Raw(kvs, tensors, alignment, seed=seed)


def write(path: Path, raw: Raw) -> Path:
    path.write_bytes(raw.build())
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extended(edit: Edit, *, n_ctx: int = 256, tensor: bool = True, permute: bool = False) -> Edit:
    """The edit that an extension makes, more or less."""
    arch = edit.arch
    edit.set(f"{arch}.context_length", ValueType.UINT32, n_ctx)
    edit.set(f"{arch}.rope.scaling.mrrope.method", ValueType.STRING, "mrrope-pro")
    edit.set(f"{arch}.rope.scaling.mrrope.radix", ValueType.ARRAY, [1.0, 1.5], ValueType.FLOAT32)
    edit.set("general.name", ValueType.STRING, "a longer memory")
    if tensor:
        edit.insert_tensor("rope_freqs.weight", (128,), 0, FACTORS)
    if permute:
        for name in edit.index.tensors:
            if "attn_q" in name or "attn_k" in name:
                edit.permute_rows(name, HEADS)
    return edit


def plain_extension(path: Path, **how: Any) -> Edit:
    """An edit of a file just opened, which the caller need not close."""
    return extended(Edit(Source.open(path)), **how)


def write_extension(source: Path, dst: Path, *, permute: bool = False, tensor: bool = True, **how: Any) -> WriteReport:
    with Source.open(source) as opened:
        return write_new(extended(Edit(opened), permute=permute, tensor=tensor), dst, **how)


def records(path: Path) -> dict[str, bytes]:
    """Every metadata record of a file by key, as bytes, read by the gguf package."""
    fields = GGUFReader(path).fields.values()
    return {f.name: b"".join(part.tobytes() for part in f.parts) for f in fields if not f.name.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """Every tensor of a file: type, shape and the sha256 of its data, read by the gguf package."""
    return {
        t.name: (int(t.tensor_type), tuple(map(int, t.shape)), hashlib.sha256(t.data.tobytes()).hexdigest())
        for t in GGUFReader(path).tensors
    }


def left_in(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def split_model(directory: Path, count: int = 3) -> list[Path]:
    """A model in shards: the header and the first layer in shard 1, a layer in each of the others."""
    raw = model(n_layer=count)
    per_shard = [raw.tensors[:5]] + [raw.tensors[1 + 4 * i : 5 + 4 * i] for i in range(1, count)]
    out = []
    for i, infos in enumerate(per_shard):
        numbers = (
            g.kv("split.no", 2, i.to_bytes(2, "little")),
            g.kv("split.count", 2, count.to_bytes(2, "little")),
        )
        total = g.kv("split.tensors.count", 5, len(raw.tensors).to_bytes(4, "little"))
        kvs = [*(raw.kvs if i == 0 else []), *numbers, total]
        out.append(write(directory / f"m-{i + 1:05d}-of-{count:05d}.gguf", Raw(kvs, infos, seed=i)))
    return out


def hashes(paths: list[Path]) -> list[str]:
    return [sha256(path) for path in paths]


# -- Hypothesis ----------------------------------------------------------------------------------------------------

_keys = st.sampled_from(["llama", "general", "tokenizer", "x"]).flatmap(
    lambda family: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8).map(
        lambda rest: f"{family}.{rest}"
    )
)
_scalars = st.sampled_from(sorted(g.SIZES)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.binary(min_size=g.SIZES[kind], max_size=g.SIZES[kind]))
)
_strings = st.binary(max_size=40).map(lambda b: (g.STRING, g.string(b)))
_arrays = st.sampled_from(sorted(g.SIZES)).flatmap(
    lambda kind: st.integers(0, 9).flatmap(
        lambda n: st.binary(min_size=n * g.SIZES[kind], max_size=n * g.SIZES[kind]).map(
            lambda b: (g.ARRAY, g.array(kind, n, b))
        )
    )
)
_texts = st.lists(st.binary(max_size=9), max_size=5).map(lambda items: (g.ARRAY, g.strings(*items)))
_big = st.integers(0, 255).map(lambda c: (g.ARRAY, g.array(g.U8, 70000, bytes([c]) * 70000)))
_values = st.one_of(_scalars, _strings, _arrays, _texts, _big)


def _raw(values: Mapping[str, tuple[int, bytes]], **rest: Any) -> Raw:
    values = {k: v for k, v in values.items() if k not in ("general.architecture", "general.alignment")}
    kvs = [g.kv(key, kind, value) for key, (kind, value) in values.items()]
    where = rest.pop("where") % (len(kvs) + 1)
    kvs.insert(where, text("general.architecture", "llama"))
    return Raw(kvs, **rest)


_shapes = st.lists(st.tuples(st.sampled_from(QUANTISED), st.integers(1, 2), st.booleans()), max_size=6).map(
    lambda kinds: [
        (f"blk.{i}.bias", (32,), "F32") if bias else heads(f"blk.{i}.weight", kind, blocks=blocks)
        for i, (kind, blocks, bias) in enumerate(kinds)
    ]
)
files: st.SearchStrategy[Raw] = st.builds(
    _raw,
    st.dictionaries(_keys, _values, max_size=8),
    where=st.integers(0, 99),
    tensors=_shapes,
    alignment=st.sampled_from([8, 16, 32, 64, 256, 1024, 4096, 8192]),
    end_pad=st.booleans(),
    gap=st.sampled_from([b"\0", b"x"]),
    seed=st.integers(0, 9),
)


@dataclass(frozen=True)
class Wish:
    """An edit of any file of `files`: what to remove, rename and set, whether to insert tensors, which rows to move."""

    removed: int
    renamed: int
    n_ctx: int
    inserted: tuple[bytes, ...]
    permuted: int
    replaced: bool
    late: bool
    arch: str

    def apply(self, edit: Edit) -> Edit:
        keys = [k for k in edit.index.kvs if k not in ("general.architecture", "general.alignment")]
        for i, key in enumerate(keys):
            if self.removed >> i & 1:
                edit.remove(key)
            elif self.renamed >> i & 1 and f"new.{key}" not in keys:
                edit.rename_key(key, f"new.{key}")
        edit.set("general.architecture", ValueType.STRING, self.arch)
        edit.set(f"{self.arch}.context_length", ValueType.UINT32, self.n_ctx)
        if self.late:
            edit.set("zzz.last", ValueType.ARRAY, ["a", "", "c\udcff"], ValueType.STRING)
        for i, data in enumerate(self.inserted):
            edit.insert_tensor(f"rope_factors_{i}.weight", (len(data) // 4,), 0, data)
        names = list(edit.index.tensors)
        for i, name in enumerate(names):
            if self.permuted >> i & 1:
                edit.permute_rows(name, HEADS)
        if self.replaced and names and not self.permuted & 1:
            edit.replace_tensor(names[0], bytes(edit.index.tensors[names[0]].nbytes))
        return edit


wishes: st.SearchStrategy[Wish] = st.builds(
    Wish,
    removed=st.integers(0, 255),
    renamed=st.integers(0, 255),
    n_ctx=st.integers(0, 2**32 - 1),
    inserted=st.lists(st.sampled_from([4, 64, 300]).map(bytes), max_size=2).map(tuple),
    permuted=st.integers(0, 63),
    replaced=st.booleans(),
    late=st.booleans(),
    arch=st.sampled_from(["llama", "qwen2"]),
)
