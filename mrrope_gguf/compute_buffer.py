"""How much scratch memory llama.cpp's graph takes, estimated from a header.

llama.cpp reserves one buffer for the largest graph it will run: a full micro-batch of T tokens against a full cache of
C cells. The allocator reuses memory as tensors die, so the buffer is as large as the worst of three moments:
  attention     masks (T, C), and without flash attention the scores kq (n_head, T, C)
  feed-forward  masks, and gate, up and their product (3, T, n_ff), for every expert a token is sent to
  logits        (T, n_vocab)
each with a handful of (T, n_embd) tensors. The counts come from the "compute buffer size" lines of llama.cpp's log on
its CPU backend: exact to 0.1 MiB for llama, qwen2 and gemma3 from 4096 to 131072 tokens, within 5 % with another cache
than f16, rough for hybrid and sparse-attention models.
"""

from __future__ import annotations

from dataclasses import dataclass

from mrrope_gguf.gguf.index import GGUFIndex
from mrrope_gguf.header import Header
from mrrope_gguf.kvcache import Cache, Setting

F16, F32 = 2, 4
# sparse attention scores every cell first: so many float32 (T, C) tensors live at once
_SPARSE = {"deepseek32": 5, "glm-dsa": 5, "glm5-next": 5, "hy_v4": 5, "dots3note": 5, "minimax-m3": 4, "qwen4exp": 34}


@dataclass(frozen=True)
class Dims:
    """The sizes of a model's graph, by llama.cpp's names. n_ff: all experts a token is sent to together."""

    arch: str
    n_embd: int
    n_ff: int
    n_used: int
    n_head: int
    n_embd_q: int
    n_embd_kv: int
    n_vocab: int
    n_inner: int = 0
    n_latent: int = 0

    def graph(self, setting: Setting, caches: list[Cache]) -> int:
        """Bytes of the compute buffer."""
        t = setting.ubatch
        masks, kq = self._attention(t, setting, caches)
        block = (
            t
            * F32
            * max(
                2 * self.n_embd + 3 * self.n_embd_q + 2 * self.n_embd_kv,
                4 * self.n_embd + 8 * self.n_inner,
            )
        )
        ff = t * F32 * ((2 + self.n_used if self.n_used else 4) * self.n_embd + 3 * self.n_ff)
        logits = t * F32 * (self.n_vocab + 2 * self.n_embd)
        return max(masks + kq + block, masks + ff, logits)

    def work(self, setting: Setting, caches: list[Cache]) -> int:
        """Bytes the CPU backend takes besides: one operand of a product, converted to the type of the other."""
        _, kq = self._attention(setting.ubatch, setting, caches)
        return kq // 2 + setting.ubatch * F32 * max(self.n_ff, self.n_embd)

    def _attention(self, t: int, setting: Setting, caches: list[Cache]) -> tuple[int, int]:
        cells = [
            cache.cells for cache in caches if cache.name in ("kv", "global", "sliding", "csa", "hca") and cache.n_layer
        ]
        flash = setting.flash_attn and self.arch != "grok"
        masks = sum(cells) * t * (F16 if flash else F32)
        longest = max(cells, default=t)
        scores = _SPARSE.get(self.arch, 0) * longest * t * F32
        if flash:
            return masks, scores
        # an MLA cache holds keys only; without flash attention the values are copied out of it
        return masks, scores + longest * (t * self.n_head * F32 + self.n_latent * F16)


def dims(index: GGUFIndex) -> Dims:
    """Read the sizes from a header; n_vocab from the output or embedding matrix, so no vocabulary is read."""
    header = Header(index, index.arch)
    u32 = header.u32
    blocks = max(u32("block_count", 1), 1)
    n_embd = u32("embedding_length", 0)
    n_head = max(header.u32s("attention.head_count", blocks, 0))
    kv = header.u32s("attention.head_count_kv", blocks, 0) if header.has("attention.head_count_kv") else (n_head,)
    k = u32("attention.key_length", n_embd // max(n_head, 1))
    n_used = max(header.u32s("expert_used_count", blocks, 0))
    n_ff = max(header.u32s("feed_forward_length", blocks, 0))
    expert_ff = max(header.u32s("expert_feed_forward_length", blocks, 0)) or n_ff
    return Dims(
        arch=index.arch,
        n_embd=n_embd,
        n_ff=max(n_used * expert_ff, 0 if n_used else n_ff),
        n_used=n_used,
        n_head=n_head,
        n_embd_q=n_head * k,
        n_embd_kv=max(kv) * k,
        n_vocab=_n_vocab(index),
        n_inner=u32("ssm.inner_size", 0),
        n_latent=u32("attention.kv_lora_rank", 0) if header.has("attention.key_length_mla") else 0,
    )


def _n_vocab(index: GGUFIndex) -> int:
    for name in ("output.weight", "token_embd.weight"):
        if name in index.tensors and index.tensors[name].dims:
            return index.tensors[name].dims[-1]
    tokens = index.find("tokenizer.ggml.tokens")
    return tokens.count if tokens else 0
