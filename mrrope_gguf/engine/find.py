"""Which libllama this process shall load, decided before llama_cpp is imported.

1. LLAMA_CPP_LIB_PATH, as llama-cpp-python itself has it: a folder.
2. MRROPE_ENGINE: "stock", or a build by key or folder.
3. The newest build of this version's patch for the installed llama-cpp-python, one for a GPU before one for the CPU.
   A CPU build takes the place of a llama-cpp-python that has a GPU backend only for a file that needs the patch.
4. llama-cpp-python's own library.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.engine import store
from mrrope_gguf.engine.pins import Pin, commits_differ, pins
from mrrope_gguf.errors import EngineTrouble

LIB_PATH = "LLAMA_CPP_LIB_PATH"
ENGINE = "MRROPE_ENGINE"

_GPU_LIBRARIES = ("cuda", "metal", "vulkan", "hip", "sycl", "musa", "opencl", "cann", "webgpu")


@dataclass(frozen=True)
class Choice:
    """`lib` is the folder to load from, None for llama-cpp-python's own; `note` is what the user should be told."""

    lib: Path | None
    engine: store.Engine | None
    why: str
    note: str = ""


def choose(binding: str | None, *, needs_patch: bool = False) -> Choice:
    """The library for this process; `binding` is the installed llama-cpp-python.

    Raises EngineTrouble where what the user named is not there or was built from another llama.cpp than the binding.
    """
    if named := os.environ.get(LIB_PATH):
        lib = Path(named)
        return Choice(lib, _engine_of(lib), f"{LIB_PATH} is set")
    wanted = os.environ.get(ENGINE, "")
    if wanted == "stock":
        return Choice(None, None, f"{ENGINE}=stock")
    if wanted:
        return _named(wanted, binding)
    usable = [build for build in store.installed() if state(build, binding) == "ready"]
    if not usable:
        return Choice(None, None, "no build for it is installed")
    best = min(usable, key=lambda build: build.backend == "cpu")  # the first, so the newest, of its kind
    gpu = stock_gpu() if best.backend == "cpu" else None
    if gpu is None:
        return Choice(best.lib, best, "the newest build")
    build = f"the patched engine is built for the CPU only, and llama-cpp-python has {gpu}"
    if needs_patch:
        return Choice(best.lib, best, "the file needs the patch", f"{build}: this runs on the CPU")
    return Choice(None, None, build, f"{build}: stock runs; {ENGINE}={best.key} takes the other")


def why_stock(binding: str | None) -> tuple[str, str]:
    """Why a stock library was loaded though the patched one is wanted, and what to do about it."""
    builds = store.installed()
    ready = [build for build in builds if state(build, binding) == "ready"]
    if os.environ.get(LIB_PATH):
        return f"{LIB_PATH} names it", f"unset {LIB_PATH}, or let it name a patched build's lib folder"
    if os.environ.get(ENGINE):
        make = "" if ready else " and run `mrrope build` once"
        return f"{ENGINE}={os.environ[ENGINE]} chose it", f"unset {ENGINE}{make}"
    if ready:
        before = "llama_cpp was imported before mrrope_gguf could choose"
        return before, f"call load before importing llama_cpp, or set {LIB_PATH}={ready[0].lib}"
    if builds and not all(build.ours for build in builds):
        return "other users may change what is built (`mrrope build --list`)", "`mrrope build` with a cache of your own"
    if builds:
        return (
            f"of {len(builds)} builds none is of this version's patch and llama-cpp-python {binding}",
            "`mrrope build`",
        )
    return "no patched engine is built", "`mrrope build` once"


def state(build: store.Engine, binding: str | None) -> str:
    """What a build is good for: "ready", or why load does not take it by itself.

    "old patch": this version has another patch; MRROPE_ENGINE still takes it. "other llama.cpp": its structs may differ
    from what the binding expects, so Python never loads it; its programs run. "not yours": other users may change it,
    and what lies there is run as this one.
    """
    if not build.ours:
        return "not yours"
    pin = pins().get(binding or "")
    if pin is None or not pin.patch.is_file() or build.pin != pin.release or _differs(build, pin):
        return "other llama.cpp"
    return "ready" if build.patch_hash == pin.patch_hash else "old patch"


def _differs(build: store.Engine, pin: Pin) -> bool:
    # a tree with changes, or one that git does not know, counts as another llama.cpp unless the user names the build
    return build.commit != pin.commit


def _engine_of(lib: Path) -> store.Engine | None:
    return store.read_engine(lib.parent) or store.read_engine(lib)


def _named(wanted: str, binding: str | None) -> Choice:
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        build = store.read_engine(folder) or _engine_of(folder)
        lib = build.lib if build else folder
    else:
        fitting = [build for build in store.installed() if build.key.startswith(wanted)]
        if not fitting:
            keys = ", ".join(build.key for build in store.installed()) or "none"
            raise EngineTrouble(
                f"{ENGINE}={wanted}: there is no such engine",
                why=f"it is no folder, and builds are: {keys}",
                fix=f"`mrrope build`, or {ENGINE}=stock",
            )
        build, lib = fitting[0], fitting[0].lib
        require_ours(build)
    if build:
        check_commit(build.commit, binding, str(build.path))
    return Choice(lib, build, f"{ENGINE} is set")


def require_ours(build: store.Engine) -> None:
    """EngineTrouble for a build in the cache that other users may change."""
    if not build.ours:
        raise EngineTrouble(
            f"{build.key}: this engine is not taken, since other users may change it",
            why=f"{build.path} or a file in it belongs to another user, or everybody may write there",
            fix="`mrrope build` makes it anew; or let MRROPE_CACHE name a folder of your own",
        )


def check_commit(commit: str, binding: str | None, what: str) -> None:
    """EngineTrouble if a library's llama.cpp is not the one the binding was written for.

    Structs go by value through ctypes: another layout corrupts memory. An unknown commit or binding passes.
    """
    pin = pins().get(binding or "")
    if pin and commit and commits_differ(commit, pin.commit):
        raise EngineTrouble(
            f"{what}: this libllama is of another llama.cpp than llama-cpp-python {binding}",
            why=f"it was built from {commit[:9]}, the binding is for {pin.commit[:9]}, and their structs may differ",
            fix=f"`mrrope build` for the installed binding, or unset {LIB_PATH} and {ENGINE}",
        )


def stock_gpu() -> str | None:
    """The GPU backend that llama-cpp-python's own library was built with, without loading it."""
    lib = stock_lib()
    if lib is None:
        return None
    names = {file.name.split(".")[0].removeprefix("lib") for file in lib.glob("*ggml-*")}
    return next((kind for kind in _GPU_LIBRARIES if f"ggml-{kind}" in names), None)


def stock_lib() -> Path | None:
    """The folder of llama-cpp-python's own library; None where it is not installed."""
    if sys.modules.get("llama_cpp", ...) is None:
        return None
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec and spec.origin else None
