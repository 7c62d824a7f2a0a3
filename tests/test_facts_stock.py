"""Facts against stock llama.cpp itself, for every architecture: what its loader logs of the same header."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.architectures import architectures
from mrrope_gguf.facts import read_facts
from mrrope_gguf.gguf.index import open_gguf
from tests.stock_hparams import BASE, read_all, write

pytestmark = pytest.mark.engine

ROPE_TYPES = {-1: "none", 0: "norm", 2: "neox", 8: "mrope", 40: "imrope"}
NO_ROPE_CALLS = ("bert", "starcoder")
MLA = {"attention.key_length": 32, "attention.value_length": 16, "rope.dimension_count": 8}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
# what a loader asserts on, or names without a key
NEEDED: dict[str, dict[str, Any]] = {
    "apertus": {f"xielu.{word}": [1.0] * 8 for word in ("alpha_n", "alpha_p", "beta", "eps")},
    "bailingmoe3": {**MLA, "kda.gate_lower_bound": -1.0, "attention.head_count_kv": [2, 0] * 4},
    "cohere2moe": {"attention.layer_norm_epsilon": 1.0, "leading_dense_block_count": 2},
    "deepseek2": MLA,
    "deepseek4": {"expert_gating_func": 4, **EXPERTS},
    "dflash": {"target_layers": [1, 2]},
    "eagle3": {"target_layers": [1, 2, 3]},
    "glm4moe": EXPERTS,
    "granitehybrid": {"ssm.inner_size": 128, "attention.head_count_kv": [2, 0] * 4},
    "hrm_text": {"hrm.layers_per_stack": 2, "hrm.h_cycles": 2, "hrm.l_cycles": 1},
    "hy_v4": {**MLA, "attention.key_length_mla": 16, "attention.value_length_mla": 16},
    "lfm2": {"attention.head_count_kv": [2, 0] * 4},
    "mistral4": MLA,
    "nanbeige": {"num_loops": 2},
}
# these cannot be brought to log anything from a header alone, or are no models of their own
SKIPPED = ("clip", "gptj", "jamba", "glm5-next", "graniteswitch")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("exaone4", {"block_count": 64}),
    ("exaone4", {"block_count": 64, "attention.sliding_window": 1024, "attention.sliding_window_pattern": 2}),
    ("gemma3", {"attention.sliding_window": 16}),
    ("gemma3", {"attention.sliding_window": 16, "attention.sliding_window_pattern": 3, "rope.freq_base_swa": 5e3}),
    ("gemma3", {"attention.sliding_window": 16, "attention.sliding_window_pattern": [True, False] * 4}),
    ("gemma2", {"attention.sliding_window": 32, "rope.freq_base": 5e5}),
    ("smallthinker", {"attention.sliding_window": 16}),
    ("smallthinker", {"attention.sliding_window": 0}),
    ("llama4", {"attention.sliding_window": 0, **EXPERTS}),
    ("afmoe", {"attention.sliding_window": 16}),
    ("olmo2", {"attention.sliding_window": 16, "rope.freq_base": 5e5}),
    ("mellum", {"attention.sliding_window": 16, **EXPERTS}),
    ("laguna", {"attention.sliding_window": 16, "rope.freq_base": 5e5}),
    ("lfm2", {"attention.sliding_window": 16, "attention.head_count_kv": [2, 0] * 4}),
    ("modern-bert", {"attention.sliding_window": 16}),
    ("plamo3", {"attention.sliding_window": 16}),
    ("step35", {"attention.sliding_window_pattern": [False, True] * 4, "rope.dimension_count_swa": 16}),
    ("gemma4", {"attention.sliding_window_pattern": [True, False] * 4, "attention.key_length": 32}),
    ("glm4", {"rope.dimension_sections": [4, 2, 2, 0]}),
    ("glm4moe", {"rope.dimension_sections": [4, 2, 2, 0], **EXPERTS}),
    ("hunyuan_vl", {"rope.dimension_sections": [4, 2, 2, 0]}),
    ("hunyuan-dense", {"rope.scaling.alpha": 1000.0}),
    ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}),
    ("llama", {"rope.scale_linear": 2.0}),
    ("llama", {"rope.scaling.factor": 0.0}),
    ("qwen2", {"attention.head_count": [4, 8] * 4, "attention.head_count_kv": [2, 4] * 4, "attention.key_length": 32}),
    ("stablelm", {"rope.dimension_count": 8, "nextn_predict_layers": 0}),
    ("dflash", {"target_layers": [1], "rope.dimension_sections": [4, 0, 0, 0]}),
]
CASES = [(name, {**BASE, **NEEDED.get(name, {})}) for name in architectures() if name not in SKIPPED]
CASES += [(name, {**BASE, **keys}) for name, keys in VARIANTS]


@pytest.fixture(scope="module")
def stock() -> list[dict[str, Any]]:
    if find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python")
    return read_all(CASES)


def _per_layer(text: str, n_layer: int) -> tuple[int, ...]:
    """llama.cpp logs one number where all layers agree, [a, b, ...] where they do not."""
    numbers = [int(word) for word in text.strip("[]").split(",")]
    return tuple(numbers[:n_layer]) if len(numbers) > 1 else tuple(numbers) * n_layer


def _ours(path: Path, arch: str, keys: dict[str, Any]) -> dict[str, Any]:
    with open_gguf(write(path, arch, keys)) as index:
        facts = read_facts(index)
    ours = {
        "n_ctx_train": facts.n_ctx_train,
        "n_ctx_orig_yarn": facts.n_ctx_orig,
        "n_layer": facts.n_layer,
        "n_head": facts.heads,
        "n_head_kv": facts.heads_kv,
        "rope type": facts.arch.rope,
        "freq_base_train": round(facts.freq_base, 1),
        "freq_scale_train": 1 / facts.scaling_factor,
        "sliding": facts.layers.sliding,
    }
    if facts.arch.rope != "none":
        ours.update(n_embd_head_k=facts.head_dim, n_embd_head_v=facts.head_dim_v, n_rot=facts.n_rot)
    if any(facts.layers.sliding):
        ours["n_swa"] = facts.n_swa
        if arch not in ("granite_swa", "lfm2"):  # a default nobody reads: their graphs use the main base
            ours["freq_base_swa"] = round(facts.freq_base_swa, 1)
    return ours


def _theirs(arch: str, log: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    n_layer = int(log["n_layer"])
    rope = ROPE_TYPES[int(log["rope type"])]
    theirs: dict[str, Any] = {
        "n_head": _per_layer(log["n_head"], n_layer),
        "n_head_kv": _per_layer(log["n_head_kv"], n_layer),
        "rope type": "none" if arch in NO_ROPE_CALLS else rope,
        "sliding": tuple(log["sliding"][:n_layer]),
    }
    return {key: theirs[key] if key in theirs else float(log[key]) for key in wanted}


def _differences(path: Path, arch: str, log: dict[str, Any]) -> dict[str, Any]:
    if "error" in log:
        return {"not loaded": log["error"][-300:]}
    ours = _ours(path, arch, log["keys"])
    theirs = _theirs(arch, log, ours)
    return {
        key: (mine, theirs[key])
        for key, mine in ours.items()
        if mine != (pytest.approx(theirs[key], rel=1e-5) if isinstance(mine, float) else theirs[key])
    }


def test_facts_equal_what_the_loader_of_llama_cpp_reads(stock: list[dict[str, Any]], tmp_path: Path) -> None:
    found = {
        f"{name} {keys}": differences
        for (name, keys), log in zip(CASES, stock, strict=True)
        if (differences := _differences(tmp_path / "header.gguf", name, log))
    }
    assert not found
