"""Loads libllama: llama-cpp-python's own, or the patched one that `find` chooses.

llama_cpp reads LLAMA_CPP_LIB_PATH once, when it is imported, so the choice holds for the process. A library that
exports `llama_rope_table_set` has the MrRoPE patch; any other is stock.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mrrope_gguf.engine import find
from mrrope_gguf.engine.find import ENGINE, LIB_PATH, Choice, check_commit, choose, stock_lib
from mrrope_gguf.errors import EngineTrouble

INSTALL = "pip install 'mrrope-gguf[engine]'"
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

    def __str__(self) -> str:
        """One line for the start of every verb that runs a model."""
        commit = f" {self.commit}" if self.commit else ""
        return f"{self.kind} llama.cpp{commit} on {', '.join(self.devices) or 'unknown devices'} ({self.path.parent})"


def binding_version() -> str | None:
    """The version of llama-cpp-python, without importing it; None if it is not installed."""
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return None


def llama_cpp(*, needs_patch: bool = False, tell: Callable[[str], object] = warnings.warn) -> ModuleType:
    """The llama_cpp module, on the library that `find.choose` names when this is called for the first time.

    needs_patch: a CPU build of the patched library may then take the place of a stock one that has a GPU; tell(line)
    is called where one backend is passed over for another.
    Raises EngineTrouble if llama_cpp is missing or its library does not load or is of another llama.cpp.
    """
    module = sys.modules.get("llama_cpp")
    if module is None:
        choice = choose(binding_version(), needs_patch=needs_patch)
        if choice.note:
            tell(choice.note)
        with _lib_path(choice.lib):
            module = _import(choice)
    _check(module)
    return module


@cache
def _check(module: ModuleType) -> None:
    lib = module.llama_cpp._lib
    if Path(lib._name).parent == stock_lib():
        return  # whatever it was built from, the binding was built with it
    check_commit(_text(lib, "ggml_commit"), binding_version(), str(lib._name))


@contextmanager
def _lib_path(lib: Path | None) -> Iterator[None]:
    """LLAMA_CPP_LIB_PATH while llama_cpp is imported; processes started later choose for themselves."""
    before = os.environ.get(LIB_PATH)
    if lib is not None:
        os.environ[LIB_PATH] = str(lib)
    try:
        yield
    finally:
        if lib is not None and before is None:
            del os.environ[LIB_PATH]


def _import(choice: Choice) -> ModuleType:
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
        raise _does_not_load(err, choice) from err


def _does_not_load(err: Exception, choice: Choice) -> EngineTrouble:
    if choice.engine:
        fix = f"`mrrope build --remove {choice.engine.key}`, then `mrrope build`; {ENGINE}=stock does without it"
    elif choice.lib:
        fix = f"unset {LIB_PATH}, or build the library in {choice.lib} from the commit llama-cpp-python was built from"
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


def announce(say: Callable[[str], object], *, needs_patch: bool = False) -> None:
    """Load the library and say in one line which it is and what it runs on, as every verb does that runs a model."""
    llama_cpp(needs_patch=needs_patch, tell=lambda note: say(f"note: {note}"))
    say(f"engine: {loaded_library()}")


def why_stock() -> tuple[str, str]:
    """Why the library of this process is a stock one, and what gives the patched one."""
    return find.why_stock(binding_version())


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
