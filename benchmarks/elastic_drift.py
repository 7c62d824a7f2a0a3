"""What re-rotating costs a cache: each turn of the keys rounds them to the cache's type.

    drift/smollm2/TYPE/stages/N     S from 1 to 4 in N equal ratios, none of them followed by a token
    drift/smollm2/TYPE/trips/N      S to 1.58, then N times back to 1 and to 1.58: a text regenerated at a bound
TYPE is the keys' type in the cache; values are f16. Kept of each: the relative RMS of layer 0's keys against keys made
under the last table, and the mean loss of the 512 tokens that follow.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.elastic_growth import Reader, parse
from mrrope_gguf import engine
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.gguf.types import ggml_type
from mrrope_gguf.kernels import nll
from mrrope_gguf.model import load

if TYPE_CHECKING:
    from numpy.typing import NDArray

READ, SCORED, TOP, TRIP = 2048, 512, 4.0, 1.58
COUNTS = {"stages": (1, 2, 4, 8, 16, 24), "trips": (0, 1, 10, 50)}


class Drift:
    """One model with one type of keys, and what its keys are when nothing was turned."""

    def __init__(self, path: Path, kind: str, tokens: list[int], threads: int) -> None:
        self.kind, self.tokens = kind, tokens
        self.llm: Any = load(
            path, n_ctx=4096, type_k=kind, flash_attn=False, n_threads=threads, n_threads_batch=threads
        )
        self._decoder = Decoder(self.llm)
        self._reader = Reader(self.llm, path, self._decoder, parse("none", 8192))
        self._fresh: dict[float, NDArray[np.float32]] = {}

    def measure(self, how: str, n: int) -> dict[str, Any]:
        """Turn the keys of READ tokens and see what became of them."""
        scales = [TOP ** (i / n) for i in range(1, n + 1)] if how == "stages" else [TRIP, *[1.0, TRIP] * n]
        fresh = self._fresh_keys(scales[-1])
        self._read(1.0)
        for scale in scales:
            self._turn(scale)
        off, size = np.sqrt(((self._keys() - fresh) ** 2).mean()), np.sqrt((fresh**2).mean())
        return {"keys": float(f"{off / size:.3g}"), "loss": round(self._loss(), 5)}

    def _turn(self, scale: float) -> None:
        engine.set_table(self.llm, self._reader.table(scale))

    def _read(self, scale: float) -> None:
        self._decoder.rewind(0)
        self._turn(scale)
        for _ in self._decoder.logits(self.tokens[:READ], every=False):
            pass

    def _fresh_keys(self, scale: float) -> NDArray[np.float32]:
        if scale not in self._fresh:
            self._read(scale)
            self._fresh[scale] = self._keys()
        return self._fresh[scale]

    def _loss(self) -> float:
        targets = np.asarray(self.tokens[READ + 1 : READ + SCORED + 1])
        (logits,) = self._decoder.logits(self.tokens[READ : READ + SCORED])
        return float(nll(logits, targets).mean())

    def _keys(self) -> NDArray[np.float32]:
        """Layer 0's cached keys, (READ, n_embd_k), as the state of the sequence holds them."""
        api, ctx = self._decoder.api, self._decoder.ctx
        size = api.llama_state_seq_get_size(ctx, 0)
        state = (ctypes.c_uint8 * size)()
        api.llama_state_seq_get_data(ctx, state, size, 0)
        return first_keys(bytes(state), self.kind)


def first_keys(state: bytes, kind: str) -> NDArray[np.float32]:
    """The keys of the first layer in a sequence's state, float32 (n_cells, n_embd_k)."""
    from gguf import GGMLQuantizationType, dequantize

    at = 8  # a magic number and the sequence
    if state[at : at + 4] == b"MRRT":  # the table's record: magic, version, n, attn_factor, factors
        at += 16 + 4 * struct.unpack_from("<I", state, at + 8)[0]
    streams, cells = struct.unpack_from("<II", state, at)
    assert streams == 1, streams
    at += 8 + 12 * cells + 8  # each cell: position, 1, the sequence; then whether values lie transposed, layers
    number, row = struct.unpack_from("<iQ", state, at)
    assert number == ggml_type(kind).id, number
    raw = np.frombuffer(state, np.uint8, cells * row, at + 12).reshape(cells, row)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    values: NDArray[np.float32] = dequantize(raw, GGMLQuantizationType(number))
    return values


def runs() -> list[str]:
    return [
        f"drift/smollm2/{kind}/{how}/{n}"
        for kind in ("f16", "q8_0", "q4_0")
        for how, counts in COUNTS.items()
        for n in counts
    ]
