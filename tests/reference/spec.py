"""The tiny models that both sides run: configurations, tables, tokens, positions. Neither torch nor llama_cpp in here.

Window 64 tokens, heads of 32 dimensions. `NEAR` is 256 tokens from position 0, four windows. `FAR` is 512 tokens from
position 2048, 32 windows on: eight windows long, and at large angles (llama.cpp wants consecutive positions).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from mrrope_gguf.tables import RopeTable, rope_table

N_VOCAB = 300
N_CTX_ORIG = 64
SCALE = 4.0
HEAD_DIM = 32

COMMON: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX_ORIG,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Model:
    """One architecture: its name in GGUF, its class in transformers, and what its configuration adds to COMMON."""

    gguf: str
    hf: str
    config: dict[str, Any] = field(default_factory=dict)
    freq_base: float = 1e4
    n_rot: int = HEAD_DIM
    n_layer: int = 2
    one_layer: dict[str, Any] = field(default_factory=dict)  # what makes the only layer a global one


MODELS = {
    "llama": Model("llama", "Llama"),
    "mistral": Model("llama", "Mistral", {"sliding_window": None, "head_dim": HEAD_DIM}),
    "qwen2": Model("qwen2", "Qwen2"),
    "qwen3": Model("qwen3", "Qwen3", {"head_dim": HEAD_DIM}, freq_base=1e6),
    # five layers slide over 16 tokens, the sixth is global; both kinds have a base of their own
    "gemma3": Model(
        "gemma3",
        "Gemma3",
        {"head_dim": HEAD_DIM, "sliding_window": 16, "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": True},
        freq_base=1e6,
        n_layer=6,
        one_layer={"layer_types": ["full_attention"], "sliding_window_pattern": 1},
    ),
    # 24 of 32 dimensions turn
    "phi3": Model(
        "phi3",
        "Phi3",
        {"sliding_window": None, "original_max_position_embeddings": N_CTX_ORIG, "partial_rotary_factor": 0.75},
        n_rot=24,
    ),
    "olmo2": Model("olmo2", "Olmo2"),
    "glm4": Model("glm4", "Glm4", {"head_dim": HEAD_DIM, "partial_rotary_factor": 0.5}, n_rot=16),
    # latent attention: 16 dimensions of a head without RoPE, 32 with; layer 0 is dense, layer 1 has experts
    "deepseek2": Model(
        "deepseek2",
        "DeepseekV2",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 48,
            "kv_lora_rank": 40,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": HEAD_DIM,
            "v_head_dim": 24,
            "first_k_dense_replace": 1,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": False,
        },
    ),
}


@dataclass(frozen=True)
class Run:
    """Tokens at positions first, first + 1, ..."""

    first: int
    tokens: tuple[int, ...]


def _tokens(n: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, N_VOCAB) for _ in range(n))


NEAR = Run(0, _tokens(4 * N_CTX_ORIG, 1))
FAR = Run(2048, _tokens(8 * N_CTX_ORIG, 2))
RUNS = {"near": NEAR, "far": FAR}


def extended_table(model: Model, method: str = "mrrope-pro") -> RopeTable:
    """The table that `mrrope extend --scale 4` writes for this model, computed from the configuration alone."""
    return rope_table(method, n_rot=model.n_rot, freq_base=model.freq_base, n_ctx_orig=N_CTX_ORIG, scale=SCALE)


def tables(model: Model) -> dict[str, tuple[list[float], float] | None]:
    """name -> (factors (n_rot/2,), attn_factor), or None for the model as it is.

    `any` follows no method: factors in no order, from half speed up to a tenth, and a strong temperature.
    """
    rng = random.Random(7)
    extended = extended_table(model)
    return {
        "none": None,
        "mrrope-pro": ([float(f) for f in extended.factors], extended.attn_factor),
        "any": ([round(rng.uniform(0.5, 10.0), 3) for _ in range(model.n_rot // 2)], 1.25),
    }
