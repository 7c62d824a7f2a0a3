"""The tiny retriever in PyTorch: llama.cpp's `llama` graph, and weights that begin as a circuit that finds repetitions.

Pilots of three minutes from random weights alone had not begun to look up what followed the same tokens before. So
layer 0 begins with heads that look one, two and three tokens back, and layer 1 with heads that compare what stood
before a query with what stood before a key (Olsson et al., arXiv 2209.11895, call such a pair an induction head);
values and outputs begin as each other's transpose (as in Trockman and Kolter, arXiv 2305.09828). Everything is
trained from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. With this freq_base 14 of 32 pairs turn less than once within 256 tokens."""

    n_vocab: int
    n_ctx: int = 256
    n_layer: int = 3
    n_embd: int = 128
    n_head: int = 3
    head_dim: int = 64
    n_ff: int = 128
    freq_base: float = 1000.0


class Retriever:
    """The weights by their GGUF names, (n_out, n_in), and the forward pass. Output and embedding are one matrix."""

    def __init__(self, shape: Shape, seed: int) -> None:
        import torch

        self.shape, s = shape, shape
        self.theta = s.freq_base ** (-torch.arange(0, s.head_dim, 2, dtype=torch.float64) / s.head_dim)
        made = torch.Generator().manual_seed(seed)
        width = s.n_head * s.head_dim

        def matrix(rows: int, cols: int, gain: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, cols, generator=made) * gain / cols**0.5

        # what all tokens have in common, which heads that look at positions alone can read
        common = torch.randn(s.n_embd, generator=made)
        common /= common.norm()
        w = {"token_embd.weight": matrix(s.n_vocab, s.n_embd) + 0.5 * common}
        for il in range(s.n_layer):
            block = {name: matrix(width, s.n_embd) for name in ("attn_q", "attn_k", "attn_v")}
            block["attn_output"] = block["attn_v"].T * (0.7 * s.n_embd / width)
            if il:
                block["attn_k"] = block["attn_q"].clone()
            block["ffn_gate"], block["ffn_up"] = matrix(s.n_ff, s.n_embd), matrix(s.n_ff, s.n_embd)
            block["ffn_down"] = matrix(s.n_embd, s.n_ff, (2 * s.n_layer) ** -0.5)
            block["attn_norm"] = block["ffn_norm"] = torch.ones(s.n_embd)
            w |= {f"blk.{il}.{name}.weight": weight for name, weight in block.items()}
        w["output_norm.weight"] = torch.ones(s.n_embd)
        self.weights = {name: weight.clone().contiguous() for name, weight in w.items()}
        self._begin(common, made)
        for weight in self.weights.values():
            weight.requires_grad_()

    def _begin(self, common: torch.Tensor, made: torch.Generator) -> None:
        """Head h of layer 0 looks h + 1 tokens back and writes what it finds into a place of its own; head h of layer 1
        compares what stood h before the query with what stood h + 1 before the key, in the pairs that turn slowly.
        """
        import torch

        s, w, theta = self.shape, self.weights, self.theta
        n = 2 * int((theta * s.n_ctx < 2 * math.pi).sum())  # values of a head that lie in such pairs
        space = torch.cat([common[:, None], torch.randn(s.n_embd, s.n_head * n, generator=made)], 1)
        places = torch.linalg.qr(space)[0][:, 1:].split(n, 1)
        read = torch.randn(s.n_embd, n, generator=made)
        read = torch.linalg.qr(read - common[:, None] * (common @ read))[0]
        strength = torch.where(theta > 0.2, 1.1, 0.2)
        q0, k0, v0, q1, k1 = (
            w[f"blk.{name}.weight"].mul_(0.3).view(s.n_head, s.head_dim, s.n_embd)
            for name in ("0.attn_q", "0.attn_k", "0.attn_v", "1.attn_q", "1.attn_k")
        )
        o0 = w["blk.0.attn_output.weight"].mul_(0.3).view(s.n_embd, s.n_head, s.head_dim)
        for h in range(s.n_head):
            for m, back in ((q0, 0), (k0, h + 1)):
                turned = torch.stack([(theta * back).cos() * strength, (theta * back).sin() * strength], -1)
                m[h] += turned.flatten().float()[:, None] * common
            v0[h, :n] += read.T
            o0[:, h, :n] += 0.3 * places[h]
            q1[h, -n:] += 1.4 * places[h - 1].T if h else 3 * read.T
            k1[h, -n:] += 1.4 * places[h].T

    def logits(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Of tokens (n_rows, n), at the indices `at` (n_at,) of all n_rows * n alone: (n_at, n_vocab)."""
        import torch
        from torch.nn import functional as F

        s, w = self.shape, self.weights
        rows, n = ids.shape
        angles = torch.arange(n, dtype=torch.float64)[:, None] * self.theta
        cos, sin = angles.cos().float(), angles.sin().float()

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(rows, n, s.n_head, s.head_dim).transpose(1, 2)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            a, b = x[..., 0::2], x[..., 1::2]  # NORM: values 2i and 2i + 1 are a pair
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        def times(x: torch.Tensor, name: str) -> torch.Tensor:
            return x @ w[name + ".weight"].T

        def normed(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.rms_norm(x, (s.n_embd,), w[name + ".weight"], EPS)

        x = F.embedding(ids, w["token_embd.weight"])
        for il in range(s.n_layer):
            b = f"blk.{il}."
            h = normed(x, b + "attn_norm")
            q, k, v = (heads(times(h, b + name)) for name in ("attn_q", "attn_k", "attn_v"))
            a = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
            x = x + times(a.transpose(1, 2).reshape(rows, n, -1), b + "attn_output")
            if il == s.n_layer - 1:
                x = x.flatten(0, 1)[at]  # nothing looks at the others any more
            h = normed(x, b + "ffn_norm")
            x = x + times(F.silu(times(h, b + "ffn_gate")) * times(h, b + "ffn_up"), b + "ffn_down")
        return times(normed(x, "output_norm"), "token_embd")

    def arrays(self) -> dict[str, Floats]:
        """The weights as float32 arrays."""
        return {name: weight.detach().numpy() for name, weight in self.weights.items()}

    def restore(self, weights: dict[str, Any]) -> None:
        """Take up the tensors of a checkpoint."""
        import torch

        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])
