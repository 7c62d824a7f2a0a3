"""The devices ggml runs on, and how much memory each GPU among them has."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from mrrope_gguf.engine.libllama import _function, llama_cpp

_GPU, _INTEGRATED = 1, 2  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class Gpu:
    """A device with memory of its own (or, if integrated, a share of the machine's): bytes free and in all."""

    name: str
    free: int
    total: int


def gpus() -> list[Gpu]:
    """The GPUs of the library of this process, empty for one that runs on the CPU. Loads the library if need be."""
    lib = llama_cpp().llama_cpp._lib
    count = _function(lib, "ggml_backend_dev_count", ctypes.c_size_t)
    get = _function(lib, "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = _function(lib, "ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    name = _function(lib, "ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    size = ctypes.POINTER(ctypes.c_size_t)
    memory = _function(lib, "ggml_backend_dev_memory", None, ctypes.c_void_p, size, size)
    if not (count and get and kind and name and memory):
        return []
    found = []
    for device in map(get, range(count())):
        if kind(device) in (_GPU, _INTEGRATED):
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append(Gpu(name(device).decode(), free.value, total.value))
    return found
