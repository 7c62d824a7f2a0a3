"""The numpy forward pass and stock llama.cpp agree, so a table in a file is really used, and used as we think.

N_CTX is the tiny models' trained length; every comparison runs past it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.forward import forward

pytestmark = pytest.mark.engine

N_CTX, N_ROT = 64, 16
TOKENS = tiny.tokens(4 * N_CTX)
FACTORS = [1.0, 1.0, 1.2, 1.6, 2.3, 3.1, 4.0, 4.0]
ATTN = 1.1386
LONGROPE = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": N_CTX, "context_length": 4 * N_CTX}


def gap(a: object, b: object) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def longrope_file(path: Path, **extra: object) -> Path:
    long = {"rope_factors_long.weight": np.asarray(FACTORS, np.float32)}
    return tiny.make(path, extra={**LONGROPE, **extra}, tensors=long)


@pytest.mark.parametrize("arch", ["llama", "internlm2", "xverse", "ernie4_5"])
def test_plain_model(tmp_path: Path, arch: str) -> None:
    path = tiny.make(tmp_path / "m.gguf", arch)
    assert gap(tiny.logits(path, TOKENS), forward(path, TOKENS)) < 1e-3


def test_biases_and_full_attention(tmp_path: Path) -> None:
    bias = {f"blk.{i}.attn_q.bias": np.linspace(-1, 1, 64, dtype=np.float32) for i in range(2)}
    path = tiny.make(tmp_path / "m.gguf", n_head_kv=4, tensors=bias)
    assert gap(tiny.logits(path, TOKENS), forward(path, TOKENS)) < 1e-3


def test_rope_freqs_and_attn_factor(tmp_path: Path) -> None:
    plain = tiny.make(tmp_path / "plain.gguf")
    path = tiny.make(tmp_path / "m.gguf", rope_freqs=FACTORS, extra={"rope.scaling.attn_factor": ATTN})
    stock = tiny.logits(path, TOKENS)
    assert gap(stock, forward(plain, TOKENS, FACTORS, ATTN)) < 1e-3
    past = stock[N_CTX:]
    for wrong in (forward(plain, TOKENS), forward(plain, TOKENS, FACTORS), forward(plain, TOKENS, None, ATTN)):
        assert gap(past, wrong[N_CTX:]) > 0.1
    assert gap(past, tiny.logits(plain, TOKENS)[N_CTX:]) > 0.1


def test_attn_factor_counts_twice_in_the_scores(tmp_path: Path) -> None:
    """cos and sin of both q and k carry it, so it equals a query matrix times its square."""
    hot = tiny.make(tmp_path / "hot.gguf", extra={"rope.scaling.attn_factor": ATTN})
    plain = tiny.make(tmp_path / "plain.gguf")
    q = {f"blk.{i}.attn_q.weight": tiny.weight(plain, f"blk.{i}.attn_q.weight") * np.float32(ATTN**2) for i in range(2)}
    scaled = tiny.make(tmp_path / "scaled.gguf", tensors=q)
    assert gap(tiny.logits(hot, TOKENS), tiny.logits(scaled, TOKENS)) < 1e-3


def test_longrope_uses_long_factors_past_the_original_length(tmp_path: Path) -> None:
    plain = tiny.make(tmp_path / "plain.gguf")
    path = longrope_file(tmp_path / "m.gguf", **{"rope.scaling.attn_factor": ATTN})
    assert gap(tiny.logits(path, TOKENS), forward(plain, TOKENS, FACTORS, ATTN)) < 1e-3


def test_longrope_keeps_plain_angles_within_the_original_length_but_not_the_temperature(tmp_path: Path) -> None:
    """The choice goes by the context's size, not by position: the same tokens in a longer context get the factors."""
    plain = tiny.make(tmp_path / "plain.gguf")
    path = longrope_file(tmp_path / "m.gguf", **{"rope.scaling.attn_factor": ATTN})
    tokens = TOKENS[:N_CTX]
    # llama.cpp pads n_ctx to 256, so the original length must be at least that for the small context to count as one
    wide = longrope_file(
        tmp_path / "wide.gguf",
        **{"rope.scaling.attn_factor": ATTN, "rope.scaling.original_context_length": 256, "context_length": 1024},
    )
    assert gap(tiny.logits(wide, tokens, n_ctx=256), forward(plain, tokens, None, ATTN)) < 1e-3
    assert gap(tiny.logits(wide, tokens, n_ctx=512), forward(plain, tokens, FACTORS, ATTN)) < 1e-3
    assert gap(tiny.logits(path, tokens, n_ctx=256), forward(plain, tokens, FACTORS, ATTN)) < 1e-3


def test_longrope_with_a_scaling_factor_interpolates_on_top(tmp_path: Path) -> None:
    """Why a portable file must never hold rope.scaling.factor beside longrope."""
    plain = tiny.make(tmp_path / "plain.gguf")
    path = longrope_file(tmp_path / "m.gguf", **{"rope.scaling.factor": 4.0})
    assert gap(tiny.logits(path, TOKENS), forward(plain, TOKENS, FACTORS)) > 0.1
    assert gap(tiny.logits(path, TOKENS), forward(plain, TOKENS, [4 * f for f in FACTORS])) < 1e-3


def test_an_architecture_without_stock_factors_rejects_the_tensor(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "qwen2", rope_freqs=FACTORS)
    with pytest.raises(RuntimeError, match="wrong number of tensors"):
        tiny.logits(path, TOKENS)
