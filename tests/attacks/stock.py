"""What stock llama.cpp does with a file, in a child of a Launcher: ggml's reader alone, or the whole model loaded.

The arguments are ["ggml", FILE] or ["llama", FILE]; the exit code is ACCEPTS or REFUSES, a signal is a crash.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

ACCEPTS, REFUSES = 0, 3


def prepare() -> Callable[[Sequence[str]], int]:
    """Load both libraries once, for all children; returns what a child does."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    import llama_cpp

    from tests import ggml_oracle

    ggml = ggml_oracle.load()
    llama_cpp.llama_backend_init()

    def judge(argv: Sequence[str]) -> int:
        how, path = argv
        accepts = ggml_oracle.accepts(ggml, path) if how == "ggml" else _loads(llama_cpp, path)
        return ACCEPTS if accepts else REFUSES

    return judge


def _loads(llama_cpp: Any, path: str) -> bool:
    """The model loaded whole, given a context and one token, as any program would that runs it."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        return False
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.n_threads = settings.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        return False
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens = (ctypes.c_int32 * 16)()
    n = llama_cpp.llama_tokenize(vocab, b"a", 1, tokens, 16, True, False)
    if n <= 0:
        return False
    return bool(llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, n)) == 0)
