"""Which llama-server this machine has: that of a build of ours, or of a folder that MRROPE_ENGINE names.

A program runs in a process of its own, so unlike a library it need not fit the installed llama-cpp-python: the newest
build of this version's patch is taken, one for a GPU before one for the CPU. Unlike a library, an older patch or a
stock program in a named folder is refused where it lacks what serving needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.engine import find, store
from mrrope_gguf.engine.cmake import RPC_SERVER
from mrrope_gguf.engine.pins import PIN, pins
from mrrope_gguf.errors import EngineTrouble

SERVER = "llama-server"
PAGE = "page"  # the folder of a build that holds llama-server's web page
BUILD = "`mrrope build`"


@dataclass(frozen=True)
class Program:
    """A patched llama-server. `engine` is None where a folder that is no build of ours was named."""

    path: Path
    engine: store.Engine | None
    note: str = ""

    @property
    def name(self) -> str:
        return self.engine.key if self.engine else str(self.path.parent)

    @property
    def on_gpu(self) -> bool:
        """Whether layers may lie in another memory than this machine's; of a named folder it is not known: no."""
        return self.engine is not None and self.engine.backend != "cpu"

    @property
    def rpc(self) -> bool:
        return self.engine is None or self.engine.rpc

    def require_rpc(self) -> None:
        """EngineTrouble for a build that cannot hand layers to other machines."""
        if not self.rpc:
            why = "the engine was built with --no-rpc"
            raise EngineTrouble("--rpc: this llama-server has no RPC backend", why=why, fix=BUILD)

    @property
    def rpc_server(self) -> Path:
        """The program that lends a machine's memory and cores to others."""
        return self.path.with_name(_file(RPC_SERVER))

    @property
    def page(self) -> Path | None:
        """The folder of the web page; None where it was not built."""
        return page_of(self.engine) if self.engine else None


def page_of(engine: store.Engine) -> Path | None:
    """The web page of a build; None where it was not built."""
    folder = engine.path / PAGE
    return folder if (folder / "index.html").is_file() else None


def server_program(binding: str | None) -> Program:
    """The llama-server to run; `binding` is the installed llama-cpp-python, None where there is none.

    Raises EngineTrouble with the command that makes one, or for one that is named and is not the patched one.
    """
    if named := os.environ.get(find.LIB_PATH) or os.environ.get(find.ENGINE):
        return _named(named, find.LIB_PATH if os.environ.get(find.LIB_PATH) else find.ENGINE)
    release = binding if binding in pins() else PIN
    builds = store.installed()
    ready = [build for build in builds if find.state(build, release) == "ready" and _program(build.bin)]
    if not ready:
        raise EngineTrouble(
            "serve needs the patched llama-server, and none is built", why=_lacking(builds, release), fix=BUILD
        )
    best = min(ready, key=lambda build: (build.backend == "cpu", page_of(build) is None))  # then the newest
    gpu = find.stock_gpu() if best.backend == "cpu" else None
    note = f"llama-cpp-python has {gpu}, this engine only the CPU: {BUILD} makes one for the GPU" if gpu else ""
    return Program(best.bin / _file(SERVER), best, note)


def _lacking(builds: list[store.Engine], release: str) -> str:
    if not builds:
        return "no engine is built at all"
    ready = [build.key for build in builds if find.state(build, release) == "ready"]
    if ready:
        return f"built without programs (--no-server): {', '.join(ready)}"
    if not all(build.ours for build in builds):
        return "other users may change what is built (`mrrope build --list`)"
    return f"of {len(builds)} builds none is of this version's patch"


def _named(word: str, variable: str) -> Program:
    """The llama-server of the engine that the user chose."""
    fix = f"unset {variable}, or {BUILD}"
    if word == "stock":
        raise EngineTrouble(
            f"{variable}=stock: serve runs the patched llama-server",
            why="a stock one knows neither elastic context nor the tables of engine files",
            fix=f"unset {variable}; `mrrope export llama-server MODEL` prints the command for a stock one",
        )
    folder = Path(word).expanduser()
    if not folder.is_dir():
        fitting = [build for build in store.installed() if build.key.startswith(word)]
        if not fitting:
            raise EngineTrouble(f"{variable}={word}: there is no such engine", why="`mrrope build --list`", fix=fix)
        find.require_ours(fitting[0])
        folder = fitting[0].path
    engine = store.read_engine(folder) or store.read_engine(folder.parent)
    path = next(filter(None, map(_program, (folder, folder / "bin", folder.parent / "bin"))), None)
    if path is None:
        why = f"neither {folder} nor a bin folder there has one"
        raise EngineTrouble(f"{variable}={word}: this engine has no llama-server", why=why, fix=fix)
    _require_patched(path, fix)
    return Program(path, engine)


def _require_patched(path: Path, fix: str) -> None:
    """EngineTrouble for a llama-server that is stock's, of too old a patch, or does not run. Starts it for its help."""
    try:
        help_ = subprocess.run([path, "--help"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineTrouble(f"{path}: does not run", why=str(error), fix=fix) from error
    if "--rope-elastic" in help_.stdout:
        return
    said = (help_.stderr.strip().splitlines() or [f"it ended with {help_.returncode}"])[-1]
    why = said if help_.returncode else "it has no --rope-elastic: it is stock, or of an older patch"
    raise EngineTrouble(f"{path}: this is not the patched llama-server", why=why, fix=fix)


def _program(folder: Path) -> Path | None:
    path = folder / _file(SERVER)
    return path if path.is_file() else None


def _file(name: str) -> str:
    return f"{name}.exe" if sys.platform == "win32" else name
