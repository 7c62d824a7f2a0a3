"""Re-expression keeps the function: the same logits from stock llama.cpp, the same bytes but for the rows that move.

The models are random. What is compared is a whole forward pass past the trained length, with and without a rope table.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from mrrope_gguf.errors import Refused
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.types import ValueType
from mrrope_gguf.gguf.write import write_new
from mrrope_gguf.reexpress import RULES, Reexpression, target, why_not
from mrrope_gguf.revert import revert
from tests import tiny
from tests.forward import forward

N_CTX, N_LAYER = 64, 2
TOKENS = tiny.tokens(4 * N_CTX)
FACTORS = [1.0, 1.0, 1.2, 1.6, 2.3, 3.1, 4.0, 4.0]
ATTN = 1.1386
NORM = dict.fromkeys(("internlm2", "xverse", "ernie4_5"), "llama") | {
    "bailingmoe": "granitemoe",
}
NEOX = ["qwen2", "pangu-embedded"]
# rows of 256 elements suit every type; more heads so that they have the size of the other models' heads
WIDE: dict[str, Any] = {"n_embd": 256, "n_head": 16, "n_head_kv": 8, "n_ff": 256}
TYPES = ["f16", "q8_0", "q4_0", "q5_1", "q4_K", "q6_K", "iq4_nl", "iq4_xs", "iq3_s", "iq2_xxs"]


def rewrite(path: Path, dst: Path, factors: Sequence[float] | None = None, attn: float = ATTN) -> Reexpression:
    """Re-express a model, with a table of its own where `factors` are given."""
    with Source.open(path) as source:
        how = target(source.index)
        assert how is not None
        edit = Edit(source)
        how.apply(edit, source.index)
        if factors is not None:
            edit.set(f"{how.arch_to}.rope.scaling.attn_factor", ValueType.FLOAT32, attn)
            data = struct.pack(f"<{len(factors)}f", *factors)
            edit.insert_tensor("rope_freqs.weight", (len(factors),), 0, data)
        write_new(edit, dst)
    return how


def quantised(dtype: str) -> Any:
    """A parameter of a test that needs libllama for nothing but its quantiser."""
    return pytest.param(dtype, marks=pytest.mark.engine)


def gap(a: object, b: object) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def rms(a: Any, b: Any) -> float:
    return float(np.sqrt(((a - b) ** 2).mean()))


def fused(path: Path, arch: str, dtype: str = "f32", **kw: Any) -> Path:
    """A model whose q, k and v lie in one tensor, as `--fuse-qkv` and Qwen (1) have them."""
    plain = tiny.make(path.with_suffix(".plain"), arch, **kw)
    joined, apart = {}, []
    for il in range(N_LAYER):
        for kind in ("weight", "bias"):
            names = [f"blk.{il}.{part}.{kind}" for part in tiny.QKV]
            joined[f"blk.{il}.attn_qkv.{kind}"] = np.concatenate([tiny.weight(plain, name) for name in names])
            apart += names
    return tiny.make(path, arch, dtype=dtype, tensors=joined, drop=apart, **kw)


def qwen1(path: Path, **kw: Any) -> Path:
    """Qwen (1) counts both halves of its SwiGLU in feed_forward_length and has no grouped queries."""
    n_ff = kw.get("n_ff", 128)
    return fused(path, "qwen", **{"n_head_kv": 4, **kw, "n_ff": n_ff, "extra": {"feed_forward_length": 2 * n_ff}})


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3", "stablelm", "exaone", "smollm3"])
def test_others_have_no_target(tmp_path: Path, arch: str) -> None:
    with open_gguf(tiny.make(tmp_path / "m.gguf", arch)) as index:
        assert target(index) is None
        assert f"'{arch}'" in (why_not(index) or "")


def test_targets_read_factors_and_sources_do_not() -> None:
    from mrrope_gguf.architectures import architecture

    for name in RULES:
        arch = architecture(name)
        assert arch is not None
        assert not arch.portable, name
        assert arch.rope == ("neox" if RULES[name].neox else "norm")
    for name, rope in (("llama", "norm"), ("granitemoe", "norm"), ("exaone", "neox")):
        arch = architecture(name)
        assert arch is not None
        assert arch.portable, name
        assert arch.rope == rope


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_0", "q4_K", "iq4_xs"])
@pytest.mark.parametrize("arch", NORM)
def test_another_name_is_the_same_bit_for_bit(tmp_path: Path, arch: str, dtype: str) -> None:
    path = tiny.make(tmp_path / "m.gguf", arch, dtype=dtype, **WIDE)
    how = rewrite(path, tmp_path / "new.gguf")
    assert (how.arch_to, how.moves_rows) == (NORM[arch], False)
    assert gap(tiny.logits(path, TOKENS), tiny.logits(tmp_path / "new.gguf", TOKENS)) == 0


@pytest.mark.engine
def test_baichuan_with_32_layers(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "baichuan", n_embd=32, n_head=2, n_head_kv=2)
    rewrite(path, tmp_path / "llama.gguf")
    assert gap(tiny.logits(path, TOKENS), tiny.logits(tmp_path / "llama.gguf", TOKENS)) == 0


@pytest.mark.engine
@pytest.mark.parametrize(
    "shape",
    [{}, {"n_head_kv": 4}, {"n_head_kv": 1}, {"n_head": 2, "n_head_kv": 1}, {"n_head": 8}, {"n_layer": 5}],
    ids=str,
)
@pytest.mark.parametrize("arch", NEOX)
def test_neox_pairs_move(tmp_path: Path, arch: str, shape: dict[str, Any]) -> None:
    path = tiny.make(tmp_path / "m.gguf", arch, **shape)
    how = rewrite(path, tmp_path / "llama.gguf")
    assert (how.arch_to, how.moves_rows) == ("llama", True)
    assert gap(tiny.logits(path, TOKENS), tiny.logits(tmp_path / "llama.gguf", TOKENS)) < 1e-4


@pytest.mark.engine
def test_heads_wider_than_their_share_of_the_embedding(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "pangu-embedded", head_dim=32)
    rewrite(path, tmp_path / "llama.gguf")
    assert gap(tiny.logits(path, TOKENS), tiny.logits(tmp_path / "llama.gguf", TOKENS)) < 1e-4


@pytest.mark.engine
def test_rows_left_in_place_give_another_model(tmp_path: Path) -> None:
    """The control: the same tensors under llama's name, rows unmoved, differ widely."""
    path = tiny.make(tmp_path / "m.gguf", "qwen2")
    biases = {f"blk.{i}.{n}.bias": tiny.weight(path, f"blk.{i}.{n}.bias") for i in range(N_LAYER) for n in tiny.QKV}
    renamed = tiny.make(tmp_path / "llama.gguf", "llama", tensors=biases)
    assert gap(tiny.logits(path, TOKENS), tiny.logits(renamed, TOKENS)) > 1


@pytest.mark.engine
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("arch", NEOX)
def test_quantised_q_and_k(tmp_path: Path, arch: str, dtype: str) -> None:
    """Every type's rows move whole. One layer, and floats behind q, k and v, so that nothing magnifies a rounding."""
    parts = (*tiny.QKV, "token_embd")
    path = tiny.make(tmp_path / "m.gguf", arch, n_layer=1, dtype=dtype, quantised=parts, **WIDE)
    rewrite(path, tmp_path / "llama.gguf")
    assert gap(tiny.logits(path, TOKENS), tiny.logits(tmp_path / "llama.gguf", TOKENS)) < 1e-4


@pytest.mark.engine
@pytest.mark.parametrize("dtype", TYPES)
def test_all_quantised_differs_less_than_stock_from_itself(tmp_path: Path, dtype: str) -> None:
    """ggml rounds activations to 8 bits before a quantised product, which turns a last bit into a hundredth.

    The yardstick is the original file run by stock llama.cpp with and without flash attention.
    """
    path = tiny.make(tmp_path / "m.gguf", "qwen2", dtype=dtype, **WIDE)
    rewrite(path, tmp_path / "llama.gguf")
    before = tiny.logits(path, TOKENS)
    flash = tiny.logits(path, TOKENS, flash_attn_type=1)
    assert rms(before, tiny.logits(tmp_path / "llama.gguf", TOKENS)) < rms(before, flash)


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_K", "iq4_xs"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen"])
def test_fused_qkv_becomes_exaone_bit_for_bit(tmp_path: Path, arch: str, dtype: str) -> None:
    kw = {**WIDE, "dtype": dtype}
    if arch == "qwen":
        path = qwen1(tmp_path / "m.gguf", **{**kw, "n_head_kv": 16})
    else:
        path = fused(tmp_path / "m.gguf", arch, **kw)
    how = rewrite(path, tmp_path / "exaone.gguf")
    assert (how.arch_to, how.moves_rows) == ("exaone", False)
    assert gap(tiny.logits(path, TOKENS), tiny.logits(tmp_path / "exaone.gguf", TOKENS)) == 0


@pytest.mark.engine
@pytest.mark.parametrize("arch", [a for a in (*NORM, *NEOX) if RULES[a].to == "llama"])
def test_the_table_is_used(tmp_path: Path, arch: str) -> None:
    """Past the window: stock with the rewritten file and its table equals the numpy llama with that table."""
    path = tiny.make(tmp_path / "m.gguf", arch)
    rewrite(path, tmp_path / "plain.gguf")
    rewrite(path, tmp_path / "table.gguf", FACTORS)
    stock = tiny.logits(tmp_path / "table.gguf", TOKENS)
    assert gap(stock, forward(tmp_path / "plain.gguf", TOKENS, FACTORS, ATTN)) < 1e-3
    assert gap(stock[N_CTX:], tiny.logits(path, TOKENS)[N_CTX:]) > 0.1


@pytest.mark.engine
@pytest.mark.parametrize("arch", [*NORM, *NEOX])
def test_the_table_reaches_the_layers_that_rotate(tmp_path: Path, arch: str) -> None:
    """Factors of 4 are linear interpolation, which stock knows for the original: the same layers, the same angles."""
    path = tiny.make(tmp_path / "m.gguf", arch)
    rewrite(path, tmp_path / "table.gguf", [4.0] * 8, attn=1.0)
    linear = tiny.logits(path, TOKENS, rope_freq_scale=0.25)
    assert gap(tiny.logits(tmp_path / "table.gguf", TOKENS), linear) < 1e-4
    assert gap(tiny.logits(path, TOKENS)[N_CTX:], linear[N_CTX:]) > 0.1


def shifted(path: Path, delta: int) -> Any:
    """Logits of tokens after `delta` was added to the positions of all tokens in the cache."""
    import llama_cpp

    with tiny.context(path, 256) as (_model, ctx):
        tiny.decode(ctx, TOKENS[:N_CTX])
        llama_cpp.llama_memory_seq_add(llama_cpp.llama_get_memory(ctx), 0, 0, -1, delta)
        return tiny.decode(ctx, TOKENS[N_CTX : 2 * N_CTX], first=N_CTX + delta)


@pytest.mark.engine
@pytest.mark.parametrize("arch", [*NORM, *NEOX, "qwen"])
def test_context_shift(tmp_path: Path, arch: str) -> None:
    """Cached keys turn on as the original's do."""
    path = qwen1(tmp_path / "m.gguf") if arch == "qwen" else tiny.make(tmp_path / "m.gguf", arch)
    rewrite(path, tmp_path / "new.gguf")
    assert gap(shifted(path, 37), shifted(tmp_path / "new.gguf", 37)) < 1e-4
    assert gap(shifted(tmp_path / "new.gguf", 0), shifted(tmp_path / "new.gguf", 37)) < 1e-3


@pytest.mark.engine
def test_the_table_is_used_by_exaone(tmp_path: Path) -> None:
    """Fused Qwen2 as exaone with a table equals the unfused one as llama with it."""
    rewrite(fused(tmp_path / "fused.gguf", "qwen2"), tmp_path / "exaone.gguf", FACTORS)
    rewrite(tiny.make(tmp_path / "m.gguf", "qwen2"), tmp_path / "llama.gguf", FACTORS)
    table = tiny.logits(tmp_path / "exaone.gguf", TOKENS)
    assert gap(table, tiny.logits(tmp_path / "llama.gguf", TOKENS)) < 1e-4


@pytest.mark.engine
def test_split_model_moves_rows_in_every_shard(tmp_path: Path) -> None:
    whole = tiny.make(tmp_path / "m.gguf", "qwen2", n_layer=4)
    shard = tiny.make(tmp_path / "s.gguf", "qwen2", n_layer=4, split=3)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("s-*.gguf")}
    dst = tmp_path / "out" / shard.name
    dst.parent.mkdir()
    rewrite(shard, dst)
    assert gap(tiny.logits(whole, TOKENS), tiny.logits(dst, TOKENS)) < 1e-4
    assert {p.name: p.read_bytes() for p in tmp_path.glob("s-*.gguf")} == before


@pytest.mark.parametrize("dtype", ["f32", "f16", *map(quantised, ["q4_0", "q4_K", "iq3_s"])])
def test_only_rows_of_q_and_k_move(tmp_path: Path, dtype: str) -> None:
    """With the gguf package as oracle: q and k are their old rows in the new order, every other tensor is untouched."""
    path = tiny.make(tmp_path / "m.gguf", "qwen2", dtype=dtype, **WIDE)
    rewrite(path, tmp_path / "llama.gguf")
    old, new = (GGUFReader(p) for p in (path, tmp_path / "llama.gguf"))
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    order = np.arange(16).reshape(2, 8).T.ravel()  # 0 8 1 9 ...
    for a, b in zip(old.tensors, new.tensors, strict=True):
        data = a.data
        if ".attn_q." in a.name or ".attn_k." in a.name:
            data = data.reshape(-1, 16, *data.shape[1:])[:, order].reshape(data.shape)
        assert data.tobytes() == b.data.tobytes(), a.name
        assert a.tensor_type == b.tensor_type


def test_metadata(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "qwen2")
    rewrite(path, tmp_path / "llama.gguf")
    old, new = (GGUFReader(p).fields for p in (path, tmp_path / "llama.gguf"))
    assert new["general.architecture"].contents() == "llama"
    assert new["llama.rope.scaling.mrrope.reexpressed_from"].contents() == "qwen2"
    assert not [key for key in new if key.startswith("qwen2.")]
    for key, value in old.items():
        if key not in ("general.architecture", "GGUF.kv_count"):
            assert new[key.replace("qwen2.", "llama.")].contents() == value.contents(), key


def test_qwen1_feed_forward_length_is_halved(tmp_path: Path) -> None:
    rewrite(qwen1(tmp_path / "m.gguf"), tmp_path / "exaone.gguf")
    with open_gguf(tmp_path / "exaone.gguf") as index:
        assert index.get("exaone.feed_forward_length") == 128


@pytest.mark.parametrize("dtype", ["f32", quantised("q4_K")])
@pytest.mark.parametrize("arch", [*NEOX, *NORM])
def test_revert_gives_the_original_back(tmp_path: Path, arch: str, dtype: str) -> None:
    path = tiny.make(tmp_path / "m.gguf", arch, dtype=dtype, **WIDE)
    rewrite(path, tmp_path / "llama.gguf", FACTORS)
    revert(tmp_path / "llama.gguf", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == path.read_bytes()


def test_rewriting_a_rewritten_file_starts_from_the_original(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "qwen2")
    rewrite(path, tmp_path / "once.gguf", FACTORS)
    rewrite(tmp_path / "once.gguf", tmp_path / "twice.gguf", FACTORS)
    assert (tmp_path / "twice.gguf").read_bytes() == (tmp_path / "once.gguf").read_bytes()


BIAS = np.zeros(64, np.float32)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("qwen2", {"extra": {"expert_count": 4}}, "expert_count"),
    "draft layers": ("qwen2", {"extra": {"nextn_predict_layers": 1}}, "nextn_predict_layers"),
    "sliding window": ("qwen2", {"extra": {"attention.sliding_window": 32}}, "sliding_window"),
    "mrope sections": ("ernie4_5", {"extra": {"rope.dimension_sections": [2, 3, 3, 0]}}, "dimension_sections"),
    "partial rotary": ("qwen2", {"n_rot": 8}, "8 rotated"),
    "other values": ("qwen2", {"extra": {"attention.value_length": 8}}, "8 values"),
    "heads by layer": ("qwen2", {"extra": {"attention.head_count": [4, 4]}}, "head_count"),
    "a bias the source ignores": ("ernie4_5", {"tensors": {"blk.0.attn_output.bias": BIAS}}, "attn_output.bias"),
    "output bias": ("qwen2", {"tensors": {"output.bias": np.zeros(tiny.N_VOCAB, np.float32)}}, "output.bias"),
    "weight scale": ("qwen2", {"tensors": {"blk.1.ffn_up.scale": BIAS[:1]}}, "ffn_up.scale"),
    "factors it ignores": ("pangu-embedded", {"rope_freqs": FACTORS}, "rope_freqs"),
    "keys of the target": ("qwen2", {"extra": {"general.x": 1, "tokenizer.y": 1}, "clash": True}, "llama.vocab_size"),
    "experts' weights not normalised": ("bailingmoe", {"extra": {"expert_weights_norm": False}}, "always normalises"),
    "experts' weights scaled": ("bailingmoe", {"extra": {"expert_weights_scale": 2.5}}, "is 2.5"),
    "a scale granite reads": ("bailingmoe", {"extra": {"attention.scale": 0.5}}, "attention.scale"),
    "13B, with ALiBi": ("baichuan", {"n_layer": 40, "n_embd": 32, "n_head": 2, "n_head_kv": 2}, "40 layers"),
    "rows that are no heads": ("qwen2", {"tensors": {"blk.0.attn_k.bias": BIAS[:48]}}, "blk.0.attn_k.bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    arch, kw, reason = REFUSED[case]
    kw = dict(kw)
    if kw.pop("clash", False):
        path = _with_key(tiny.make(tmp_path / "m.gguf", arch), "llama.vocab_size")
    else:
        path = tiny.make(tmp_path / "m.gguf", arch, **kw)
    with open_gguf(path) as index:
        assert target(index) is None
        assert reason in (why_not(index) or "")


def _with_key(path: Path, key: str) -> Path:
    with Source.open(path) as source:
        edit = Edit(source)
        edit.set(key, ValueType.UINT32, 1)
        write_new(edit, path.with_suffix(".key"))
    return path.with_suffix(".key")


def test_a_strange_tensor_in_a_later_shard_is_refused(tmp_path: Path) -> None:
    odd = {"zz.weight": np.zeros(8, np.float32)}
    shard = tiny.make(tmp_path / "s.gguf", "qwen2", split=2, tensors=odd)
    with pytest.raises(Refused, match=r"shard.*\n.*zz\.weight"):
        rewrite(shard, tmp_path / "out-00001-of-00002.gguf")


def lora(path: Path, arch: str) -> Path:
    """An adapter of rank 1 for the first attn_q."""
    writer = GGUFWriter(path, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((1, 64), np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((64, 1), np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.engine
def test_stock_refuses_a_lora_of_the_original(tmp_path: Path) -> None:
    """It goes by the architecture's name: nothing can be applied to rows that have moved."""
    import llama_cpp

    path = tiny.make(tmp_path / "m.gguf", "qwen2")
    rewrite(path, tmp_path / "llama.gguf")
    adapter = str(lora(tmp_path / "lora.gguf", "qwen2")).encode()
    for model_path, fits in ((path, True), (tmp_path / "llama.gguf", False)):
        with tiny.context(model_path, 64) as (model, _ctx):
            assert bool(llama_cpp.llama_adapter_lora_init(model, adapter)) is fits


@pytest.mark.engine
def test_tokens_and_chat_template_stay(tmp_path: Path) -> None:
    import llama_cpp

    path = tiny.make(tmp_path / "m.gguf", "qwen2")
    rewrite(path, tmp_path / "llama.gguf")
    seen = []
    for p in (path, tmp_path / "llama.gguf"):
        llm = llama_cpp.Llama(str(p), n_ctx=64, verbose=False)
        seen.append((llm.tokenize(b"the inn on the water"), llm.metadata["tokenizer.chat_template"], llm.token_bos()))
        llm.close()
    assert seen[0] == seen[1]
