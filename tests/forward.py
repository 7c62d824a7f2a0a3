"""The tiny llama once more, in plain numpy and float64: an oracle that shares no code with ggml or with this package.

Reads the file by the gguf package. Every matrix W has shape (n_out, n_in), so y = x @ W.T.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]


class Model:
    """Weights and sizes of a llama file with float matrices. Raises KeyError where the file is not one."""

    def __init__(self, path: str | Path) -> None:
        reader = GGUFReader(path)
        self.arch = str(reader.fields["general.architecture"].contents())
        self.weights = {t.name: np.asarray(t.data, np.float64) for t in reader.tensors}
        self._fields = reader.fields
        self.n_layer = int(self.value("block_count"))
        self.n_embd = int(self.value("embedding_length"))
        self.n_head = int(self.value("attention.head_count"))
        self.n_head_kv = int(self.value("attention.head_count_kv"))
        self.eps = float(self.value("attention.layer_norm_rms_epsilon"))
        self.head_dim = int(self.value("rope.dimension_count"))
        self.freq_base = float(self.value("rope.freq_base"))

    def value(self, key: str) -> Any:
        return self._fields[f"{self.arch}.{key}"].contents()

    def linear(self, x: Doubles, name: str) -> Doubles:
        """x (n, n_in) -> (n, n_out), with the bias where there is one."""
        y: Doubles = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def norm(self, x: Doubles, name: str) -> Doubles:
        y: Doubles = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weights[name + ".weight"]
        return y


def forward(
    path: str | Path, tokens: Sequence[int], factors: Sequence[float] | None = None, attn_factor: float = 1.0
) -> Doubles:
    """Logits (n_tokens, n_vocab) with pair i turning by theta_i / factors[i] and cos, sin multiplied by attn_factor."""
    model = Model(path)
    x = model.weights["token_embd.weight"][list(tokens)]
    angles = _angles(model, len(tokens), factors)
    cos, sin = np.cos(angles) * attn_factor, np.sin(angles) * attn_factor
    for il in range(model.n_layer):
        x = x + _attention(model, model.norm(x, f"blk.{il}.attn_norm"), f"blk.{il}.", cos, sin)
        h = model.norm(x, f"blk.{il}.ffn_norm")
        gate = model.linear(h, f"blk.{il}.ffn_gate")
        x = x + model.linear(gate / (1 + np.exp(-gate)) * model.linear(h, f"blk.{il}.ffn_up"), f"blk.{il}.ffn_down")
    x = model.norm(x, "output_norm")
    return model.linear(x, "output" if "output.weight" in model.weights else "token_embd")


def _angles(model: Model, n_tokens: int, factors: Sequence[float] | None) -> Doubles:
    """Angles (n_tokens, head_dim/2)."""
    pairs = np.arange(model.head_dim // 2)
    theta = model.freq_base ** (-2.0 * pairs / model.head_dim)
    if factors is not None:
        theta = theta / np.asarray(factors, np.float64)
    angles: Doubles = np.outer(np.arange(n_tokens), theta)
    return angles


def rotate(x: Doubles, cos: Doubles, sin: Doubles) -> Doubles:
    """NORM pairs: x (n, heads, head_dim) has pair i at 2i and 2i+1; cos, sin (n, head_dim/2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _attention(model: Model, x: Doubles, blk: str, cos: Doubles, sin: Doubles) -> Doubles:
    """Causal attention of x (n, n_embd), n_head query heads sharing n_head_kv key and value heads."""
    n = len(x)
    q, k, v = (model.linear(x, blk + name).reshape(n, -1, model.head_dim) for name in ("attn_q", "attn_k", "attn_v"))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    group = model.n_head // model.n_head_kv
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(model.head_dim)
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return model.linear(np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1), blk + "attn_output")
