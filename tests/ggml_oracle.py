"""What ggml and llama.cpp's loader say of a file: `verdicts(paths)`, asked in another process because ggml may abort.

Run as a script it reads paths from stdin and answers each with a line: accept or refuse.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


def libggml() -> Path | None:
    """The ggml that llama-cpp-python brings, or None."""
    spec = find_spec("llama_cpp")
    folders = [Path(p) / "lib" for p in (spec.submodule_search_locations or [])] if spec else []
    return next((f / n for f in folders for n in NAMES if (f / n).exists()), None)


def verdicts(paths: Sequence[Path]) -> list[str]:
    """ "accept", "refuse" or "abort" for each file; an abort is a refusal that takes the process with it."""
    answers: list[str] = []
    while len(answers) < len(paths):
        rest = "\n".join(map(str, paths[len(answers) :]))
        run = subprocess.run(
            [sys.executable, __file__],
            input=rest,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=60,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
        answers += [line for line in run.stdout.splitlines() if line in ("accept", "refuse")]
        if run.returncode:
            answers.append("abort")
    return answers


class Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


def load() -> Any:
    path = libggml()
    assert path is not None
    ggml = ctypes.CDLL(str(path))
    size, number, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes, ggml.gguf_init_from_file.restype = [ctypes.c_char_p, Params], pointer
    ggml.gguf_free.argtypes = ggml.ggml_free.argtypes = [pointer]
    ggml.gguf_get_n_tensors.argtypes, ggml.gguf_get_n_tensors.restype = [pointer], number
    ggml.gguf_get_data_offset.argtypes, ggml.gguf_get_data_offset.restype = [pointer], size
    for function, result in (("name", ctypes.c_char_p), ("offset", size), ("size", size)):
        getter = getattr(ggml, f"gguf_get_tensor_{function}")
        getter.argtypes, getter.restype = [pointer, number], result
    return ggml


def accepts(ggml: Any, path: str) -> bool:
    """As llama.cpp's loader opens a file: no data read, but all of it within the file, and names unique."""
    tensors = ctypes.c_void_p()
    gguf = ggml.gguf_init_from_file(os.fsencode(path), Params(True, ctypes.pointer(tensors)))
    if not gguf:
        return False
    count, start, size = ggml.gguf_get_n_tensors(gguf), ggml.gguf_get_data_offset(gguf), os.path.getsize(path)
    names = {ggml.gguf_get_tensor_name(gguf, i) for i in range(count)}
    begins = [(start + ggml.gguf_get_tensor_offset(gguf, i)) % 2**64 for i in range(count)]
    inside = all(begin + ggml.gguf_get_tensor_size(gguf, i) <= size for i, begin in enumerate(begins))
    ggml.ggml_free(tensors)
    ggml.gguf_free(gguf)
    return inside and len(names) == count


if __name__ == "__main__":
    library_in_use = load()
    for line in sys.stdin.read().split("\n"):
        print("accept" if accepts(library_in_use, line) else "refuse", flush=True)
