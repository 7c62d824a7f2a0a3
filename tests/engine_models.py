"""Tiny models for tests of the patched engine: one for each way an architecture treats its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
OWN_FREQS = [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]

# a head of 16: eight pairs; those of a quantised cache are at least a block of 32
MODELS: dict[str, dict[str, Any]] = {
    # pairs (2i, 2i+1), pairs (i, i+n_rot/2), and half a head
    "llama": {"arch": "llama", "n_layer": 1},
    "qwen2": {"arch": "qwen2", "n_layer": 1},
    "stablelm": {"arch": "stablelm", "n_layer": 1, "head_dim": 16, "n_rot": 8},
    # scalings of the model's own
    "yarn": {"arch": "llama", "n_layer": 1, "extra": YARN},
    "linear": {"arch": "llama", "n_layer": 1, "extra": LINEAR},
    "rope_freqs": {"arch": "llama", "n_layer": 1, "rope_freqs": OWN_FREQS},
    # every fourth layer has no RoPE; five of six, or one of two have a sliding window; RoPE on sliding windows alone
    "smollm3": {"arch": "smollm3"},
    "gemma3": {"arch": "gemma3"},
    "gemma2": {"arch": "gemma2"},
    "cohere2": {"arch": "cohere2"},
    # keys normalized after RoPE, several positions a token, no RoPE
    "maincoder": {"arch": "maincoder"},
    "hunyuan-dense": {"arch": "hunyuan-dense"},
    "qwen2vl": {"arch": "qwen2vl"},
    "gpt2": {"arch": "gpt2", "n_head_kv": 4},
}

RADIX = [1.0, 1.0, 1.25, 1.5, 1.5, 1.25, 1.0, 1.0]
TABLE: dict[str, Any] = {
    "version": 1,
    "method": "mrrope-pro",
    "scale": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attn_factor": 1.125,
    "radix": RADIX,
    "elastic": False,
}


def table_keys(changes: dict[str, Any], original: int = 64) -> dict[str, Any]:
    """The keys of an extended file, for a head of 16, with changes to those of the table; None leaves one out."""
    words = {f"rope.scaling.mrrope.{word}": value for word, value in {**TABLE, **changes}.items()}
    return {**words, "context_length": 4 * original, "rope.scaling.original_context_length": original}


def model(folder: Path, name: str, **changes: Any) -> Path:
    """Write MODELS[name], with `changes` to what tiny.make is asked for, and return its path."""
    wanted = {**MODELS[name], **changes}
    arch = wanted.pop("arch")
    if arch == "gpt2":
        wanted |= _gpt2()
    if arch == "cohere2":
        wanted["drop"] = [f"blk.{il}.ffn_norm.weight" for il in range(tiny.ARCHS[arch].n_layer)]
    return tiny.make(folder / f"{name}.gguf", arch, **wanted)


def _gpt2(n_layer: int = 2, n_embd: int = 64, n_ff: int = 128, n_ctx: int = 64) -> dict[str, Any]:
    """What gpt2 has in place of llama's tensors: learned positions and one matrix for q, k and v."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    tensors = {"position_embd.weight": array(n_ctx, n_embd), "output_norm.bias": array(n_embd)}
    drop = []
    for il in range(n_layer):
        blk = f"blk.{il}."
        tensors |= {blk + "attn_qkv.weight": array(3 * n_embd, n_embd), blk + "attn_qkv.bias": array(3 * n_embd)}
        tensors |= {blk + name + ".bias": array(n_embd) for name in ("attn_norm", "attn_output", "ffn_norm")}
        tensors |= {blk + "ffn_up.bias": array(n_ff), blk + "ffn_down.bias": array(n_embd)}
        drop += [f"{blk}{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate")]
    return {"tensors": tensors, "drop": drop, "n_layer": n_layer}
