"""Tiny random models for tests: GGUF files that stock llama.cpp loads, and the logits it computes from them.

`make` writes one (seeded, weights scaled so that attention matters, under 2 MB); `logits`, from tests.stock, runs it.
Weights depend on the seed and the tensor's name alone, so two architectures that share names share weights.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES

from tests.stock import context as context
from tests.stock import decode as decode
from tests.stock import logits as logits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

N_VOCAB = 300
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Traits:
    """What an architecture's tensors look like beside llama's: which biases, norms and extra keys it has."""

    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: tuple[str, ...] = ()
    output: bool = True
    n_layer: int = 2
    moe: bool = False
    keys: tuple[tuple[str, Any], ...] = ()


QKV = ("attn_q", "attn_k", "attn_v")
ARCHS: dict[str, Traits] = {
    "llama": Traits(),
    "mistral3": Traits(),
    "minicpm": Traits(),
    "granite": Traits(keys=(("logit_scale", 1.0),)),
    "internlm2": Traits(),
    "xverse": Traits(),
    "ernie4_5": Traits(output=False),
    "qwen2": Traits(biases=QKV),
    "qwen": Traits(biases=QKV),
    "pangu-embedded": Traits(biases=(*QKV, "attn_output")),
    "baichuan": Traits(n_layer=32),
    "bailingmoe": Traits(moe=True),
    "smollm3": Traits(n_layer=4),
    "exaone": Traits(biases=QKV),
    "qwen3": Traits(qk_norm=True),
    # one global layer in six; the others slide
    "gemma3": Traits(
        qk_norm=True,
        post_norms=("post_attention_norm", "post_ffw_norm"),
        output=False,
        n_layer=6,
        keys=(("attention.sliding_window", 16), ("rope.freq_base_swa", 10000.0)),
    ),
    # every other layer slides, by the same base and scaling as the others
    "gemma2": Traits(
        post_norms=("post_attention_norm", "post_ffw_norm"), output=False, keys=(("attention.sliding_window", 16),)
    ),
    # partial rotary: half of each head turns
    "stablelm": Traits(biases=("attn_norm", "ffn_norm", "output_norm"), keys=(("attention.layer_norm_epsilon", 1e-5),)),
    # RoPE on sliding-window layers alone, three in four
    "cohere2": Traits(
        output=False,
        n_layer=4,
        keys=(("attention.sliding_window", 16), ("logit_scale", 1.0), ("attention.layer_norm_epsilon", 1e-5)),
    ),
    # q and k are normalized after RoPE
    "maincoder": Traits(qk_norm=True),
    "hunyuan-dense": Traits(qk_norm=True),
    "qwen2vl": Traits(biases=QKV, keys=(("rope.dimension_sections", [2, 3, 3, 0]),)),
    # an encoder: every token sees all others, and nothing is cached
    "eurobert": Traits(output=False, keys=(("attention.causal", False), ("pooling_type", 1))),
    "gpt2": Traits(keys=(("attention.layer_norm_epsilon", 1e-5),)),
}

# feed-forward matrices: name, shape
DENSE = [("ffn_up", "n_ff", "n_embd"), ("ffn_gate", "n_ff", "n_embd"), ("ffn_down", "n_embd", "n_ff")]
EXPERTS: list[tuple[str | int, ...]] = [
    ("ffn_gate_inp", 6, "n_embd"),
    *((name + "_exps", 6, rows, cols) for name, rows, cols in DENSE),
    ("ffn_up_shexp", "n_ff_shared", "n_embd"),
    ("ffn_gate_shexp", "n_ff_shared", "n_embd"),
    ("ffn_down_shexp", "n_embd", "n_ff_shared"),
]
MOE_KEYS = {"expert_count": 6, "expert_used_count": 2, "expert_shared_count": 2, "expert_weights_norm": True}


@dataclass(frozen=True)
class Dims:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int

    @property
    def n_ff_shared(self) -> int:
        return 2 * self.n_ff


def make(
    path: str | Path,
    arch: str = "llama",
    *,
    n_layer: int | None = None,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int | None = None,
    n_ctx: int = 64,
    freq_base: float = 1e4,
    n_rot: int | None = None,
    dtype: str = "f32",
    quantised: Iterable[str] | None = None,
    seed: int = 0,
    rope_freqs: Sequence[float] | None = None,
    split: int | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    drop: Iterable[str] = (),
    alignment: int | None = None,
) -> Path:
    """Write a random model and return its path (the first shard's where `split` asks for that many shards).

    `dtype` is a ggml type name for the matrices (f32, f16, q8_0, q4_K, iq4_nl, ...), or for those alone whose part of
    the name is in `quantised` (attn_q, ...); norms, biases and tables stay f32.
    `extra` adds or overrides keys (None drops one): names get the architecture as prefix, but for general.* and
    tokenizer.*. `tensors` adds or replaces tensors, `drop` leaves some out, `rope_freqs` is the model's own table.
    """
    traits = ARCHS[arch]
    n_layer = n_layer or traits.n_layer
    dims = Dims(n_layer, n_embd, n_head, n_head_kv, head_dim or n_embd // n_head, n_ff or 2 * n_embd)
    weights = dict(_weights(traits, dims, seed))
    if rope_freqs is not None:
        weights["rope_freqs.weight"] = np.asarray(rope_freqs, np.float32)
    weights.update(tensors or {})
    kept = {name: w for name, w in weights.items() if name not in set(drop)}
    writer = GGUFWriter(path, arch, split_max_tensors=-(-len(kept) // split) if split else 0)
    if alignment:
        writer.add_custom_alignment(alignment)
    _keys(writer, arch, traits, dims, n_ctx, freq_base, n_rot or dims.head_dim, extra or {})
    parts = None if quantised is None else set(quantised)
    for name, weight in kept.items():
        _add(writer, name, weight, dtype if parts is None or name.split(".")[-2] in parts else "f32")
    return finish(writer, Path(path))


def finish(writer: GGUFWriter, path: Path) -> Path:
    """Write what was added and return the (first) file."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    first: Path = writer.format_shard_names(path)[0]
    writer.close()
    return first


def _weights(traits: Traits, d: Dims, seed: int) -> Iterator[tuple[str, Floats]]:
    """Every tensor as (name, numpy array), rows first: numpy shape (n_out, n_in) is ggml's ne = [n_in, n_out]."""

    def matrix(name: str, *shape: int, gain: float = 1.0) -> tuple[str, Floats]:
        scale = gain / shape[-1] ** 0.5
        return name + ".weight", (_rng(name, seed).standard_normal(shape) * scale).astype(np.float32)

    def norm(name: str, n: int) -> tuple[str, Floats]:
        return name + ".weight", (1 + 0.2 * _rng(name, seed).standard_normal(n)).astype(np.float32)

    def bias(name: str, n: int) -> tuple[str, Floats]:
        return name + ".bias", (0.5 * _rng(name + ".bias", seed).standard_normal(n)).astype(np.float32)

    # tied to the output, an embedding of unit rows gives logits of the same size as an output matrix does
    yield matrix("token_embd", N_VOCAB, d.n_embd, gain=d.n_embd**0.5 if traits.output else 2.0)
    widths = {"attn_q": d.n_head * d.head_dim, "attn_k": d.n_head_kv * d.head_dim, "attn_v": d.n_head_kv * d.head_dim}
    for il in range(d.n_layer):
        blk = f"blk.{il}."
        yield norm(blk + "attn_norm", d.n_embd)
        for name, width in widths.items():
            # sharp attention: scores have a deviation near 3, so that a changed angle changes the logits
            yield matrix(blk + name, width, d.n_embd, gain=1.0 if name == "attn_v" else 1.7)
        yield matrix(blk + "attn_output", d.n_embd, widths["attn_q"], gain=2.0)
        yield norm(blk + "ffn_norm", d.n_embd)
        if traits.qk_norm:
            yield norm(blk + "attn_q_norm", d.head_dim)
            yield norm(blk + "attn_k_norm", d.head_dim)
        for name in traits.post_norms:
            yield norm(blk + name, d.n_embd)
        for part, *shape in EXPERTS if traits.moe else DENSE:
            yield matrix(f"{blk}{part}", *(n if isinstance(n, int) else getattr(d, n) for n in shape))
        for name in traits.biases:
            if not name.startswith("output"):
                yield bias(blk + name, widths.get(name, d.n_embd))
    yield norm("output_norm", d.n_embd)
    if "output_norm" in traits.biases:
        yield bias("output_norm", d.n_embd)
    if traits.output:
        yield matrix("output", N_VOCAB, d.n_embd, gain=2.0)


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _add(writer: GGUFWriter, name: str, weight: NDArray[Any], dtype: str) -> None:
    if weight.ndim == 1 or dtype == "f32" or weight.dtype != np.float32:
        writer.add_tensor(name, weight)
    elif dtype == "f16":
        writer.add_tensor(name, weight.astype(np.float16))
    else:
        kind = _ggml_type(dtype)
        writer.add_tensor(name, quantize(weight, dtype), raw_dtype=kind)


def _ggml_type(dtype: str) -> GGMLQuantizationType:
    return next(t for t in GGMLQuantizationType if t.name.lower() == dtype.lower())


def quantize(weight: Floats, dtype: str) -> NDArray[np.uint8]:
    """Rows of float32 (n, n_in) as rows of quantised bytes (n, row_bytes), by ggml's own quantiser."""
    kind = _ggml_type(dtype)
    block, size = GGML_QUANT_SIZES[kind]
    n, n_in = weight.reshape(-1, weight.shape[-1]).shape
    if n_in % block:
        raise ValueError(f"a row of {n_in} is not whole blocks of {block} for {dtype}")
    source = np.ascontiguousarray(weight, np.float32)
    out = np.zeros((*weight.shape[:-1], n_in // block * size), np.uint8)
    importance = np.ones(n_in, np.float32)
    written = _ggml().ggml_quantize_chunk(
        int(kind), _pointer(source), out.ctypes.data_as(ctypes.c_void_p), 0, n, n_in, _pointer(importance)
    )
    assert written == out.nbytes
    return out


def _pointer(array: Floats) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@cache
def _ggml() -> ctypes.CDLL:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
    lib = ctypes.CDLL(str(next(folder / name for name in names if (folder / name).exists())))
    floats = ctypes.POINTER(ctypes.c_float)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    return lib


def _keys(
    writer: GGUFWriter,
    arch: str,
    traits: Traits,
    d: Dims,
    n_ctx: int,
    freq_base: float,
    n_rot: int,
    extra: Mapping[str, Any],
) -> None:
    keys: dict[str, Any] = {
        "general.name": f"tiny {arch}",
        "context_length": n_ctx,
        "embedding_length": d.n_embd,
        "block_count": d.n_layer,
        "feed_forward_length": d.n_ff,
        "attention.head_count": d.n_head,
        "attention.head_count_kv": d.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": n_rot,
        "rope.freq_base": float(freq_base),
    }
    if d.head_dim * d.n_head != d.n_embd:
        keys.update({"attention.key_length": d.head_dim, "attention.value_length": d.head_dim})
    if traits.moe:
        keys.update(MOE_KEYS, expert_feed_forward_length=d.n_ff, feed_forward_length=3 * d.n_ff)
    keys.update(dict(traits.keys))
    keys.update(_tokenizer())
    keys.update(extra)
    for key, value in keys.items():
        if value is not None:
            full = key if key.split(".")[0] in ("general", "tokenizer", arch) else f"{arch}.{key}"
            add_key(writer, full, value)


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """Write `value` as what it is: bool, u32, f32, string or array; (value, GGUFValueType) chooses another type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], GGUFValueType):
        writer.add_key_value(key, value[0], value[1])
    else:
        writer.add_array(key, list(value))


def _tokenizer() -> dict[str, Any]:
    """A SentencePiece-like vocabulary: three control tokens, 256 bytes, then letters and a few words."""
    words = ["▁", "▁t", "he", "▁the", "in", "▁a", "an", "er", "on", "▁o", "▁of", "▁in"]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + words
    pieces += [chr(ord("a") + i) for i in range(26)] + [".", ",", "\u2581w"]
    assert len(pieces) == N_VOCAB, len(pieces)
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * (N_VOCAB - len(types))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(-i) for i in range(N_VOCAB)],
        "tokenizer.ggml.token_type": [int(t) for t in types],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def weight(path: str | Path, name: str) -> NDArray[Any]:
    """A tensor's stored values: float32 as (n_out, n_in), quantised ones as rows of bytes."""
    return next(np.array(t.data) for t in GGUFReader(path).tensors if t.name == name)


def tokens(n: int, seed: int = 0) -> list[int]:
    """n random ordinary tokens."""
    return [int(t) for t in np.random.default_rng(seed).integers(3, N_VOCAB, n)]
