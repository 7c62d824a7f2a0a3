"""A whole llama of one layer in bytes, which every command and llama.cpp itself accept: what attacks start from.

Written with tests.gguf_bytes alone, so nothing is shared with the code under test.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.gguf_bytes import ARRAY, F32, I32, STRING, U32, array, gguf, kv, string, strings, tensor, u32

N_EMBD, N_HEAD, N_FF, N_CTX = 32, 2, 32, 1024
N_ROT = N_EMBD // N_HEAD
CONTROL, BYTE, UNKNOWN = 3, 6, 2


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def i32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *map(chr, range(97, 123))]
TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[1] * (len(PIECES) - 259)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass
class Parts:
    """A file's records by key and its tensors by name: (dims, type, data). Change them, then ask for `data`."""

    kvs: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = field(default_factory=dict)

    def put(self, key: str, kind: int, value: bytes) -> None:
        """Set a record where it was, or put a new one last; `value` is what follows the type."""
        self.kvs[key] = kv(key, kind, value)

    @property
    def data(self) -> bytes:
        infos, at = [], 0
        for name, (dims, kind, data) in self.tensors.items():
            infos.append(tensor(name, dims, kind, at))
            at += len(data) + -len(data) % 32
        return gguf(list(self.kvs.values()), infos, [data for _, _, data in self.tensors.values()])

    def offset(self, key: str) -> int:
        """Where the record of `key` starts, or where the tensor infos do if there is none."""
        before = list(self.kvs)[: list(self.kvs).index(key)] if key in self.kvs else self.kvs
        return 24 + sum(len(self.kvs[k]) for k in before)

    def tensor_offset(self, name: str) -> int:
        """Where a tensor's info record starts."""
        names = list(self.tensors)
        before = [tensor(n, self.tensors[n][0]) for n in names[: names.index(name)]]
        return self.offset("") + sum(map(len, before))


def llama(arch: str = "llama") -> Parts:
    """The sound model. Its weights are all 0.01 but for the norms' 1."""
    parts = Parts()
    parts.put("general.architecture", STRING, string(arch))
    for name, value in _numbers().items():
        parts.put(f"{arch}.{name}", U32, u32(value))
    parts.put(f"{arch}.attention.layer_norm_rms_epsilon", F32, f32(1e-5))
    parts.put(f"{arch}.rope.freq_base", F32, f32(10000.0))
    parts.kvs.update(_vocabulary())
    for name, dims in _shapes().items():
        n = dims[0] * (dims[1] if len(dims) > 1 else 1)
        parts.tensors[name] = (dims, 0, f32(*[1.0 if len(dims) == 1 else 0.01] * n))
    return parts


def _numbers() -> Mapping[str, int]:
    return {
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "block_count": 1,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD,
        "rope.dimension_count": N_ROT,
    }


def _vocabulary() -> dict[str, bytes]:
    scores = f32(*(float(-i) for i in range(len(PIECES))))
    values = {
        "tokenizer.ggml.model": (STRING, string("llama")),
        "tokenizer.ggml.tokens": (ARRAY, strings(*PIECES)),
        "tokenizer.ggml.scores": (ARRAY, array(F32, len(PIECES), scores)),
        "tokenizer.ggml.token_type": (ARRAY, array(I32, len(PIECES), i32(*TYPES))),
        "tokenizer.ggml.bos_token_id": (U32, u32(1)),
        "tokenizer.ggml.eos_token_id": (U32, u32(2)),
        "tokenizer.chat_template": (STRING, string(TEMPLATE)),
    }
    return {key: kv(key, kind, value) for key, (kind, value) in values.items()}


def _shapes() -> dict[str, tuple[int, ...]]:
    square = (N_EMBD, N_EMBD)
    blk = {f"blk.0.{name}.weight": square for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    ff = {f"blk.0.ffn_{name}.weight": (N_EMBD, N_FF) for name in ("gate", "up", "down")}
    norms = dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"), (N_EMBD,))
    return {"token_embd.weight": (N_EMBD, len(PIECES)), **blk, **ff, **norms}
