"""Which libllama runs: llama-cpp-python's own, or the one in the directory LLAMA_CPP_LIB_PATH names.

llama_cpp reads that variable once, when it is imported, so the choice holds for the process. A library that exports
`llama_rope_table_set` has the MrRoPE patch; any other is stock.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mrrope_gguf.errors import EngineTrouble

# the release whose llama.cpp the facts in this package were read from, and whose structs the patch is built for
PIN = "0.3.36"
INSTALL = "pip install 'mrrope-gguf[engine]'"
LIB_PATH = "LLAMA_CPP_LIB_PATH"
ROPE_TABLE_SYMBOL = "llama_rope_table_set"


@dataclass(frozen=True)
class Library:
    """The libllama of this process. `devices` are ggml's, the CPU among them: ("CUDA0", "CPU")."""

    kind: Literal["stock", "patched"]
    path: Path
    binding: str
    version: str
    commit: str
    devices: tuple[str, ...]

    @property
    def has_rope_table(self) -> bool:
        return self.kind == "patched"


def binding_version() -> str | None:
    """The version of llama-cpp-python, without importing it; None if it is not installed."""
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return None


def llama_cpp() -> ModuleType:
    """The llama_cpp module. EngineTrouble if it is missing or its library does not load."""
    try:
        return importlib.import_module("llama_cpp")
    except ModuleNotFoundError as err:
        if err.name != "llama_cpp":
            raise EngineTrouble("llama-cpp-python is incomplete", why=str(err), fix=f"`{INSTALL}`") from err
        raise EngineTrouble(
            "llama-cpp-python is not installed",
            why="running a model needs libllama; inspect, extend and fit do not",
            fix=f"`{INSTALL}` (it compiles for some minutes; `mrrope doctor` names anything missing)",
        ) from err
    except (RuntimeError, OSError, AttributeError) as err:
        raise _does_not_load(err) from err


def _does_not_load(err: Exception) -> EngineTrouble:
    chosen = os.environ.get(LIB_PATH)
    if chosen:
        fix = f"unset {LIB_PATH}, or build the library in {chosen} from the commit llama-cpp-python was built from"
    else:
        fix = f"`pip install --force-reinstall --no-cache-dir llama-cpp-python=={binding_version()}`"
    return EngineTrouble("libllama does not load", why=" ".join(str(err).split()), fix=fix)


@cache
def loaded_library() -> Library:
    """What is loaded, loading it if need be. Raises EngineTrouble as `llama_cpp` does."""
    module = llama_cpp()
    lib = module.llama_cpp._lib
    return Library(
        kind="patched" if hasattr(lib, ROPE_TABLE_SYMBOL) else "stock",
        path=Path(lib._name),
        binding=module.__version__,
        version=_text(lib, "llama_version"),
        commit=_text(lib, "ggml_commit"),
        devices=_devices(lib),
    )


def _function(lib: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A function of libllama or of the ggml libraries it brings along; None where it is not exported."""
    for owner in (lib, *_siblings(lib)):
        if hasattr(owner, name):
            # indexing makes a fresh object: the signature set here is ours alone
            function = owner[name]
            function.restype, function.argtypes = result, list(arguments)
            return function
    return None


def _siblings(lib: Any) -> list[Any]:
    """On Windows a DLL answers for its own symbols only; elsewhere libllama's handle finds ggml's too."""
    if sys.platform != "win32":
        return []
    files = (Path(lib._name).with_name(f"{name}.dll") for name in ("ggml", "ggml-base"))
    return [ctypes.CDLL(str(file)) for file in files if file.exists()]


def _text(lib: Any, name: str) -> str:
    function = _function(lib, name, ctypes.c_char_p)
    return function().decode() if function else ""


def _devices(lib: Any) -> tuple[str, ...]:
    count = _function(lib, "ggml_backend_dev_count", ctypes.c_size_t)
    get = _function(lib, "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = _function(lib, "ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    if not (count and get and name):
        return ()
    return tuple(name(get(i)).decode() for i in range(count()))
