"""A running context for tests: tokens in, logits out, and the cached keys as llama.cpp saves them.

Everything here runs in the process that holds the libllama under test (see engine_worker).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, dequantize

from mrrope_gguf.engine import capture, set_factors, set_table
from mrrope_gguf.tables import RopeTable
from tests.stock import context

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# a table for a worker: factors and attn_factor, a RopeTable, or None for the model's own scaling
Table = tuple[Sequence[float], float] | RopeTable | None


def kl(p: Floats, q: Floats) -> float:
    """Kullback-Leibler divergence of two rows of logits, in nats."""
    log_p, log_q = (row.astype(np.float64) - _logsumexp(row.astype(np.float64)) for row in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _logsumexp(row: NDArray[np.float64]) -> float:
    return float(row.max() + np.log(np.exp(row - row.max()).sum()))


def rel_rms(a: Floats, b: Floats) -> float:
    """Root mean square of a - b over that of b."""
    return float(np.sqrt(((a - b).astype(np.float64) ** 2).mean() / (b.astype(np.float64) ** 2).mean()))


@dataclass(frozen=True)
class Keys:
    """One layer's cached keys of one sequence, by position."""

    pos: NDArray[np.int32]  # (n_cells,), ascending
    raw: NDArray[np.uint8]  # (n_cells, row_bytes), as the cache holds them
    values: Floats  # (n_cells, n_embd_k_gqa)


HEAD = 8  # bytes before all else in a sequence's state: a magic number and the sequence
RECORD = b"MRRT"


class Session:
    """One model and one context of it. Positions follow each other unless a call says otherwise."""

    def __init__(self, model: Any, ctx: Any) -> None:
        import llama_cpp

        self.api, self.model, self.ctx = llama_cpp, model, ctx
        self.memory = llama_cpp.llama_get_memory(ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def set(self, table: Table) -> None:
        """Set a table as mrrope_gguf.engine does; its errors are the test's."""
        if table is None or isinstance(table, RopeTable):
            set_table(self.ctx, table)
        else:
            set_factors(self.ctx, *table)

    def next(self, seq: int = 0) -> int:
        """The position after the last one of a sequence."""
        return int(self.api.llama_memory_seq_pos_max(self.memory, seq)) + 1

    def feed(self, tokens: Sequence[int], seq: int = 0, first: int | None = None) -> Floats:
        """Decode tokens at first, first + 1, ... and return their logits, (n_tokens, n_vocab)."""
        first = self.next(seq) if first is None else first
        out = np.empty((len(tokens), self.n_vocab), np.float32)
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            out[start : start + len(part)] = self.decode([(t, first + start + i, seq) for i, t in enumerate(part)])
        return out

    def decode(self, places: Sequence[tuple[int, int, int]]) -> Floats:
        """Decode one batch of (token, position, sequence) and return its logits, (n_tokens, n_vocab)."""
        batch = self.api.llama_batch_init(len(places), 0, 1)
        batch.n_tokens = len(places)
        for i, (token, pos, seq) in enumerate(places):
            batch.token[i], batch.pos[i], batch.logits[i] = token, pos, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        status = self.api.llama_decode(self.ctx, batch)
        self.api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} at position {places[0][1]}")
        row = self.api.llama_get_logits(self.ctx)
        return np.array(np.ctypeslib.as_array(row, (len(places), self.n_vocab)))

    def tokenize(self, text: str) -> list[int]:
        data, vocab = text.encode(), self.api.llama_model_get_vocab(self.model)
        out = (self.api.llama_token * len(data))()
        return list(out[: self.api.llama_tokenize(vocab, data, len(data), out, len(out), True, False)])

    def peek(self, token: int = 5, seq: int = 0) -> Floats:
        """The logits of one more token, (n_vocab,), which is then forgotten. A pending shift is applied by it."""
        at = self.next(seq)
        row: Floats = self.feed([token], seq)[0]
        self.remove(seq, at)
        return row

    def shift(self, delta: int, seq: int = 0, first: int = -1, end: int = -1) -> None:
        """Move positions first..end by delta, and let llama.cpp do the work now rather than at the next decode."""
        self.api.llama_memory_seq_add(self.memory, seq, first, end, delta)
        self.peek(seq=seq)

    def remove(self, seq: int = 0, first: int = -1, end: int = -1) -> None:
        assert self.api.llama_memory_seq_rm(self.memory, seq, first, end)

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def copy(self, source: int, target: int) -> None:
        self.api.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def state(self, seq: int | None = None) -> bytes:
        """The saved state, of everything or of one sequence. A pending shift must have been applied."""
        buffer = (ctypes.c_uint8 * self._state_size(seq))()
        if seq is None:
            n = self.api.llama_state_get_data(self.ctx, buffer, len(buffer))
        else:
            n = self.api.llama_state_seq_get_data(self.ctx, buffer, len(buffer), seq)
        assert n == len(buffer)
        return bytes(buffer)

    def _state_size(self, seq: int | None) -> int:
        if seq is None:
            return int(self.api.llama_state_get_size(self.ctx))
        return int(self.api.llama_state_seq_get_size(self.ctx, seq))

    def restore(self, state: bytes, seq: int | None = None) -> int:
        """Read a saved state back; what llama.cpp returns: the bytes read, 0 if it refuses."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return int(self.api.llama_state_set_data(self.ctx, buffer, len(state)))
        return int(self.api.llama_state_seq_set_data(self.ctx, buffer, len(state), seq))

    def keys(self, seq: int = 0) -> list[Keys]:
        """The cached keys of a sequence, layer by layer; of a model with sliding windows the global layers first."""
        state = self.state(seq)
        layers: list[Keys] = []
        at = HEAD + record_size(state, HEAD)
        while at < len(state):
            at = _read_cache(state, at, layers)
        return layers


def record_size(state: bytes, at: int) -> int:
    """Bytes of the table's record that the patch writes before the caches; 0 if there is none."""
    if state[at : at + 4] != RECORD:
        return 0
    # magic, version, n, attn_factor, factors
    (n,) = struct.unpack_from("<I", state, at + 8)
    return int(16 + 4 * n)


def _read_cache(state: bytes, at: int, layers: list[Keys]) -> int:
    """Read one llama_kv_cache, as llama_kv_cache::state_write writes it, and return where it ends."""
    (n_stream,) = struct.unpack_from("<I", state, at)
    at += 4
    for _ in range(n_stream):
        (n_cells,) = struct.unpack_from("<I", state, at)
        at += 4
        if n_cells:
            at = _read_stream(state, at, n_cells, layers)
    return at


def _read_stream(state: bytes, at: int, n_cells: int, layers: list[Keys]) -> int:
    # each cell: position, number of sequences (1), the sequence
    cells = np.frombuffer(state, "<i4", 3 * n_cells, at).reshape(n_cells, 3)
    assert (cells[:, 1] == 1).all()
    pos, at = cells[:, 0], at + 12 * n_cells
    order = np.argsort(pos)
    v_trans, n_layer = struct.unpack_from("<II", state, at)
    at += 8
    for _ in range(n_layer):
        kind, row = struct.unpack_from("<iQ", state, at)
        raw = np.frombuffer(state, np.uint8, n_cells * row, at + 12).reshape(n_cells, row)[order]
        layers.append(Keys(pos[order], raw, _floats(raw, kind)))
        at += 12 + n_cells * row
    for _ in range(n_layer):
        if v_trans:
            _, size, width = struct.unpack_from("<iII", state, at)
            at += 12 + n_cells * size * width
        else:
            _, row = struct.unpack_from("<iQ", state, at)
            at += 12 + n_cells * row
    return at


def _floats(raw: NDArray[np.uint8], kind: int) -> Floats:
    plain = {0: np.float32, 1: np.float16}
    if kind in plain:
        return raw.view(plain[kind]).astype(np.float32)
    values: Floats = dequantize(raw, GGMLQuantizationType(kind))
    return values


@contextmanager
def session(
    path: Path,
    *,
    n_ctx: int = 256,
    cache: str = "f32",
    table: Table = None,
    n_seq: int = 1,
    unified: bool = True,
    **params: Any,
) -> Iterator[Session]:
    """A Session with keys of the type `cache` names and f32 values; `table` is set before the first token if given."""
    kinds = {t.name.lower(): int(t) for t in GGMLQuantizationType}
    settings = {"type_k": kinds[cache], "n_seq_max": n_seq, "kv_unified": unified, "swa_full": True, **params}
    with context(path, n_ctx, **settings) as (model, ctx):
        held = Session(model, ctx)
        if table is not None:
            held.set(table)
        yield held


def requantise(source: Path, target: Path, ftype: int) -> None:
    """Write the same model in another type: 1 is f16, 7 is q8_0 (enum llama_ftype)."""
    import llama_cpp

    with capture():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.allow_requantize = ftype, 2, True
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
