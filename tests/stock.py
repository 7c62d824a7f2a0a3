"""Logits of stock llama.cpp through its low-level API, with nothing in the way: f32 cache, plain attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrrope_gguf.engine import Log, capture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


@contextmanager
def context(path: str | Path, n_ctx: int, *, n_threads: int = 1, **params: Any) -> Iterator[tuple[Any, Any]]:
    """(model, context) of stock llama.cpp: f32 cache, no flash attention, and the file's own RoPE values.

    `params` sets fields of llama_context_params (rope_freq_base=...).
    Raises RuntimeError with llama.cpp's log where the file does not load.
    """
    import llama_cpp

    llama_cpp.llama_backend_init()
    with capture() as log:
        yield from _opened(llama_cpp, path, n_ctx, n_threads, params, log)


def _opened(
    llama_cpp: Any, path: str | Path, n_ctx: int, n_threads: int, params: dict[str, Any], log: Log
) -> Iterator[tuple[Any, Any]]:
    mparams = llama_cpp.llama_model_default_params()
    mparams.n_gpu_layers = 0
    mparams.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), mparams)
    if not model:
        raise RuntimeError(log.text[-2000:])
    cparams = llama_cpp.llama_context_default_params()
    cparams.n_ctx = n_ctx
    cparams.n_batch = cparams.n_ubatch = 512
    cparams.n_threads = cparams.n_threads_batch = n_threads
    cparams.type_k = cparams.type_v = 0
    cparams.flash_attn_type = 0
    for key, value in params.items():
        setattr(cparams, key, value)
    ctx = llama_cpp.llama_init_from_model(model, cparams)
    try:
        if not ctx:
            raise RuntimeError(log.text[-2000:])
        yield model, ctx
    finally:
        if ctx:
            llama_cpp.llama_free(ctx)
        llama_cpp.llama_model_free(model)


def logits(path: str | Path, token_ids: Sequence[int], n_ctx: int | None = None, **kw: Any) -> Floats:
    """What stock llama.cpp computes for each token: float32 (n_tokens, n_vocab). n_ctx defaults to their number."""
    with context(path, n_ctx or len(token_ids), **kw) as (_model, ctx):
        return decode(ctx, token_ids)


def decode(ctx: Any, token_ids: Sequence[int], first: int = 0) -> Floats:
    """Logits of tokens at positions first, first+1, ...: float32 (n_tokens, n_vocab)."""
    import llama_cpp

    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx)))
    out = np.empty((len(token_ids), n_vocab), np.float32)
    for start in range(0, len(token_ids), 512):
        part = token_ids[start : start + 512]
        batch = llama_cpp.llama_batch_init(len(part), 0, 1)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = llama_cpp.llama_decode(ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} at position {first + start}")
        row = llama_cpp.llama_get_logits(ctx)
        out[start : start + len(part)] = np.ctypeslib.as_array(row, (len(part), n_vocab))
    return out
