"""What rope_facts reads from headers, what it refuses, and the scalings it finds. The stock twin: test_facts_stock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from mrrope_gguf.architectures import architectures
from mrrope_gguf.errors import BadFile, Refused
from mrrope_gguf.facts import RopeFacts, obstacle, read_facts, rope_facts
from mrrope_gguf.gguf.index import open_gguf
from tests.stock_hparams import BASE, write
from tests.tiny import add_key, finish

Facts = Callable[..., RopeFacts]


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """facts("llama", {"rope.freq_base": 5e5}) -> RopeFacts of a header with those keys and the basic ones."""

    def read(arch: str, keys: dict[str, Any] | None = None, read: Any = rope_facts) -> RopeFacts:
        given = {key: value for key, value in {**BASE, **(keys or {})}.items() if value is not None}
        with open_gguf(write(tmp_path / "model.gguf", arch, given)) as index:
            found: RopeFacts = read(index)
            return found

    return read


def with_tensors(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> RopeFacts:
    writer = GGUFWriter(path, arch)
    for name, value in {**BASE, **keys}.items():
        add_key(writer, f"{arch}.{name}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    with open_gguf(finish(writer, path)) as index:
        return rope_facts(index)


def test_defaults_are_those_of_llama_cpp(facts: Facts) -> None:
    found = facts("llama")
    assert (found.n_rot, found.head_dim, found.freq_base) == (16, 16, 10000.0)
    assert (found.n_ctx_train, found.n_ctx_orig) == (4096, 4096)
    assert (found.scaling_type, found.scaling_factor, found.attn_factor) == ("none", 1.0, 1.0)
    assert [found.base_factors, found.existing_scaling, found.mrrope, found.max_ctx] == [None] * 4
    assert not found.partial


def test_head_count_kv_defaults_to_head_count(facts: Facts) -> None:
    found = facts("llama", {"attention.head_count_kv": None})
    assert (found.n_head, found.n_head_kv) == (4, 4)


def test_heads_may_differ_by_layer(facts: Facts) -> None:
    found = facts("openelm", {"attention.head_count": [2, 4] * 4, "attention.key_length": 8})
    assert found.heads == (2, 4) * 4
    assert (found.n_head, found.n_rot) == (4, 8)


def test_partial_rotary(facts: Facts) -> None:
    found = facts("stablelm", {"rope.dimension_count": 4})
    assert found.partial
    assert (found.n_rot, found.n_freqs, found.head_dim) == (4, 2, 16)


def test_mla_rotates_a_slice(facts: Facts) -> None:
    keys = {"attention.key_length": 576, "attention.value_length": 512, "rope.dimension_count": 64}
    found = facts("deepseek2", {**keys, "attention.kv_lora_rank": 512, "attention.head_count_kv": 1})
    assert (found.n_rot, found.head_dim, found.kv_lora_rank) == (64, 576, 512)


def test_gemma3_extends_its_global_layers_only(facts: Facts) -> None:
    keys = {"attention.sliding_window": 512, "rope.freq_base": 1e6, "block_count": 12}
    found = facts("gemma3", keys)
    assert found.layers.extended == (5, 11)
    assert (found.n_swa, found.freq_base, found.freq_base_swa) == (512, 1e6, 10000.0)
    assert found.arch.swa == "own-base"
    without = facts("gemma3", {"block_count": 12})
    assert without.layers.extended == tuple(range(12))
    assert without.arch.swa == ""


@pytest.mark.parametrize(("name", "base"), [("gemma2", 5e5), ("gpt-oss", 5e5), ("mimo2", 10000.0), ("olmo2", 5e5)])
def test_base_of_sliding_layers(facts: Facts, name: str, base: float) -> None:
    keys = {
        "rope.freq_base": 5e5,
        "attention.sliding_window": 64,
        "attention.sliding_window_pattern": [True, False] * 4,
    }
    assert facts(name, keys).freq_base_swa == base


def test_exaone4_is_extended_only_without_sliding_layers(facts: Facts) -> None:
    assert facts("exaone4", {"block_count": 30}).layers.extended == tuple(range(30))
    with pytest.raises(Refused, match="only the sliding-window layers") as caught:
        facts("exaone4", {"block_count": 64})
    assert "48 of 64 layers rotate" in caught.value.why


@pytest.mark.parametrize("name", ["cohere2", "exaone-moe", "llama4", "maple", "muse-glimmer", "afmoe", "smallthinker"])
def test_rope_on_sliding_layers_alone_is_refused(facts: Facts, name: str) -> None:
    pattern = {"attention.sliding_window_pattern": [True, True, True, False] * 2} if name == "maple" else {}
    with pytest.raises(Refused, match="only the sliding-window layers of this model have RoPE"):
        facts(name, {"attention.sliding_window": 128, **pattern})


@pytest.mark.parametrize(
    ("name", "keys", "extended"),
    [
        ("smollm3", {}, (0, 1, 2, 4, 5, 6)),
        ("afmoe", {}, (0, 1, 2, 4, 5, 6)),
        ("smallthinker", {}, tuple(range(8))),
        ("llama4", {"attention.sliding_window": 0}, tuple(range(7))),
        ("cohere2moe", {"attention.sliding_window": 64, "leading_dense_block_count": 1}, (0,)),
        ("granite_swa", {"attention.rope_pattern": [1, 0] * 4}, (0, 2, 4, 6)),
        ("qwen3next", {}, (3, 7)),
        ("qwen3next", {"attention.recurrent_layers": [True, False] * 4}, (1, 3, 5, 7)),
        ("lfm2", {"attention.head_count_kv": [0, 2] * 4}, (1, 3, 5, 7)),
        ("nanbeige", {"num_loops": 2}, tuple(range(16))),
        ("qwen2", {"nextn_predict_layers": 1}, tuple(range(7))),
    ],
)
def test_layers_that_a_table_is_for(facts: Facts, name: str, keys: dict[str, Any], extended: tuple[int, ...]) -> None:
    assert facts(name, keys).layers.extended == extended


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt2", {}),
        ("mamba", {"attention.head_count": 0}),
        ("bert", {}),
        ("granite", {"rope.scaling.finetuned": False}),
        ("baichuan", {"block_count": 40}),
    ],
)
def test_models_without_rope_are_refused(facts: Facts, name: str, keys: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="has no RoPE") as caught:
        facts(name, keys)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["cogvlm", "deepseek4"])
def test_graphs_that_take_no_table_are_refused(facts: Facts, name: str) -> None:
    with pytest.raises(Refused):
        facts(name)


@pytest.mark.parametrize(
    ("name", "keys", "rope", "static"),
    [
        ("glm4", {}, "norm", False),
        ("glm4", {"rope.dimension_sections": [4, 2, 2, 0]}, "mrope", True),
        ("glm4moe", {}, "neox", False),
        ("hunyuan_vl", {"rope.dimension_sections": [4, 2, 2, 0]}, "mrope", True),
        ("ernie4_5", {"rope.dimension_sections": [4, 2, 2, 0]}, "norm", False),
        ("dflash", {}, "neox", False),
        ("dflash", {"rope.dimension_sections": [8, 0, 0, 0]}, "mrope", True),
        ("dflash", {"hyper_connection.count": 4}, "norm", False),
    ],
)
def test_metadata_decides_the_pairs(facts: Facts, name: str, keys: dict[str, Any], rope: str, static: bool) -> None:
    found = facts(name, keys)
    assert (found.arch.rope, found.arch.static_only) == (rope, static)


def test_hunyuan_raises_its_base(facts: Facts) -> None:
    found = facts("hunyuan-dense", {"rope.scaling.alpha": 1000.0, "attention.key_length": 128})
    assert found.freq_base == pytest.approx(10000.0 * 1000.0 ** (128 / 126))


def test_glm_dsa_has_a_length_that_must_not_be_written(facts: Facts) -> None:
    assert facts("glm-dsa", {"rope.dimension_count": 8}).max_ctx == (1 << 20) - 1
    assert facts("glm-dsa", {"attention.indexer.types": [1] * 8}).max_ctx is None


def test_linear_scaling_merges_into_base_factors(facts: Facts) -> None:
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}
    found = facts("llama", keys)
    assert found.existing_scaling is not None
    assert (found.existing_scaling.kind, found.existing_scaling.mergeable) == ("linear", True)
    merged = found.existing_scaling.merged(found)
    assert merged.base_factors == (4.0,) * 8
    assert (merged.n_ctx_orig, merged.scaling_factor, merged.existing_scaling) == (4096, 1.0, None)


def test_the_older_name_of_the_factor_is_read(facts: Facts) -> None:
    found = facts("llama", {"rope.scale_linear": 2.0})
    assert (found.scaling_type, found.scaling_factor) == ("linear", 2.0)
    assert facts("llama", {"rope.scale_linear": 2.0, "rope.scaling.factor": 3.0}).scaling_factor == 3.0
    assert facts("llama", {"rope.scaling.factor": 0.0}).existing_scaling is None


def test_yarn_is_not_mergeable(facts: Facts) -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}
    found = facts("qwen2", keys)
    assert (found.n_ctx_train, found.n_ctx_orig) == (4096, 1024)
    assert found.existing_scaling is not None
    assert not found.existing_scaling.mergeable
    assert "1024" in found.existing_scaling.why
    with pytest.raises(ValueError, match="cannot be merged"):
        found.existing_scaling.merged(found)
    assert facts("qwen2", {"rope.scaling.type": "yarn"}).existing_scaling is None
    assert facts("qwen2", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}).existing_scaling is None


def test_longrope_is_found_by_its_tensors(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    keys = {"rope.scaling.original_context_length": 1024}
    tensors = {"rope_factors_long.weight": factors, "rope_factors_short.weight": factors}
    found = with_tensors(tmp_path / "phi.gguf", "phi3", keys, tensors)
    assert found.existing_scaling is not None
    scaling = found.existing_scaling
    assert (scaling.kind, scaling.factor, scaling.mergeable) == ("longrope", 4.0, False)


def test_own_rope_freqs_are_base_factors(tmp_path: Path) -> None:
    factors = np.geomspace(1, 8, 8).astype(np.float32)
    found = with_tensors(tmp_path / "m.gguf", "llama", {}, {"rope_freqs.weight": factors})
    assert found.base_factors == tuple(map(float, factors))
    assert found.existing_scaling is None
    keys = {"rope.scaling.factor": 2.0}
    linear = with_tensors(tmp_path / "l.gguf", "llama", keys, {"rope_freqs.weight": factors})
    assert linear.existing_scaling is not None
    assert linear.existing_scaling.merged(linear).base_factors == tuple(2.0 * float(f) for f in factors)


def test_rope_freqs_that_change_nothing_are_no_factors(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert with_tensors(tmp_path / "m.gguf", "llama", {}, ones).base_factors is None


def test_rope_freqs_that_the_graph_ignores_are_no_factors(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.full(8, 2, np.float32)}
    assert with_tensors(tmp_path / "m.gguf", "falcon-h1", {}, factors).base_factors is None


@pytest.mark.parametrize("values", [np.ones(4, np.float32), np.ones(8, np.float16), np.ones((2, 8), np.float32)])
def test_rope_freqs_of_another_shape_are_a_bad_file(tmp_path: Path, values: np.ndarray[Any, Any]) -> None:
    with pytest.raises(BadFile, match=r"rope_freqs\.weight") as caught:
        with_tensors(tmp_path / "m.gguf", "llama", {}, {"rope_freqs.weight": values})
    assert caught.value.field == "rope_freqs.weight"


def test_an_extended_file_keeps_its_own_factors_apart(tmp_path: Path) -> None:
    prefix = "rope.scaling.mrrope."
    keys = {
        "context_length": 16384,
        "rope.scaling.original_context_length": 4096,
        f"{prefix}version": 1,
        f"{prefix}method": "mrrope-pro",
        f"{prefix}scale": 4.0,
        f"{prefix}radix": [1.5] * 8,
        f"{prefix}base_factors": [2.0] * 8,
        f"{prefix}undo": "AAAA",
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
    }
    factors = {"rope_freqs.weight": np.full(8, 8, np.float32)}
    found = with_tensors(tmp_path / "m.gguf", "llama", keys, factors)
    assert found.mrrope == {
        "version": 1, "method": "mrrope-pro", "scale": 4.0, "radix": [1.5] * 8, "base_factors": [2.0] * 8, "undo": True
    }  # fmt: skip
    assert found.base_factors == (2.0,) * 8
    assert (found.n_ctx_train, found.n_ctx_orig, found.existing_scaling) == (16384, 4096, None)


@pytest.mark.parametrize(
    ("arch", "keys", "field"),
    [
        ("llama", {"context_length": None}, "llama.context_length"),
        ("llama", {"context_length": 0}, "llama.context_length"),
        ("llama", {"context_length": 4096.0}, "llama.context_length"),
        ("llama", {"rope.freq_base": 10000}, "llama.rope.freq_base"),
        ("llama", {"rope.freq_base": 1.0}, "llama.rope.freq_base"),
        ("llama", {"rope.freq_base": float("nan")}, "llama.rope.freq_base"),
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ("qwen2", {"rope.dimension_count": 7}, "qwen2.rope.dimension_count"),
        ("qwen2", {"rope.dimension_count": 32}, "qwen2.rope.dimension_count"),
        ("llama", {"rope.scaling.type": "llama3"}, "llama.rope.scaling.type"),
        ("llama", {"rope.scaling.factor": -2.0}, "llama.rope.scaling.factor"),
        ("llama", {"rope.scaling.attn_factor": float("inf")}, "llama.rope.scaling.attn_factor"),
        ("llama", {"rope.scaling.original_context_length": 0}, "llama.rope.scaling.original_context_length"),
        ("llama", {"block_count": 0}, "llama.block_count"),
        ("llama", {"block_count": 2**32 - 1}, "llama.block_count"),
        ("llama", {"nextn_predict_layers": 9}, "llama.block_count"),
        ("nanbeige", {"num_loops": 2**20}, "nanbeige.block_count"),
        ("llama", {"attention.head_count": [1.0] * 8}, "llama.attention.head_count"),
    ],
)
def test_headers_that_llama_cpp_would_not_load(facts: Facts, arch: str, keys: dict[str, Any], field: str) -> None:
    with pytest.raises(BadFile) as caught:
        facts(arch, keys)
    assert caught.value.field == field
    assert "model.gguf" in caught.value.what


@pytest.mark.parametrize("name", sorted(set(architectures()) - {"clip"}))
def test_every_architecture_gets_facts_or_a_reason(facts: Facts, name: str) -> None:
    found = facts(name, read=read_facts)
    refusal = obstacle(found, "model.gguf")
    assert (refusal is None) == bool(found.layers.extended and (found.arch.hook or found.arch.portable))


@pytest.mark.real
def test_smollm2(smollm2: Path) -> None:
    with open_gguf(smollm2) as index:
        found = rope_facts(index)
    assert (found.arch.name, found.n_rot, found.freq_base, found.n_ctx_orig) == ("llama", 64, 100000.0, 8192)
    assert (found.n_layer, found.n_head, found.n_head_kv, found.arch.portable) == (30, 9, 3, True)


@pytest.mark.real
def test_gemma(gemma: Path) -> None:
    with open_gguf(gemma) as index:
        found = rope_facts(index)
    assert (found.n_rot, found.freq_base, found.n_ctx_orig, found.n_swa) == (256, 1e6, 32768, 512)
    assert found.layers.extended == (5, 11, 17)
