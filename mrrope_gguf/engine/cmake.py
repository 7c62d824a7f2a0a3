"""Configures and compiles llama.cpp with CMake, reporting progress, and explains a build that fails."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.engine.toolchain import FLAGS, Backend, compiler_fix, find
from mrrope_gguf.errors import EngineTrouble
from mrrope_gguf.progress import Progress

PROGRAMS = (
    "llama-server", "llama-cli", "llama-completion", "llama-bench", "llama-quantize", "llama-perplexity",
)  # fmt: skip
RPC_SERVER = "ggml-rpc-server"
TESTS = "test-llama-archs"

_STEP = re.compile(r"^\[\s*(\d+)/(\d+)\]")  # ninja
_SHARE = re.compile(r"^\[\s*(\d+)%\]")  # make
_FAULT = re.compile(r"(error( [A-Z]?\d+)?:|fatal error|undefined reference|CMake Error|ninja: error|\*\*\* )")


@dataclass(frozen=True)
class Recipe:
    """What is compiled: everything that makes one build another than the next."""

    backend: Backend
    rpc: bool = True
    server: bool = True
    tests: bool = False
    native: bool = True

    def flags(self) -> tuple[str, ...]:
        """CMake's arguments, but for folders, compilers and commits."""
        origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
        return (
            "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *FLAGS[self.backend],
            f"-DGGML_RPC={_on(self.rpc)}", f"-DGGML_NATIVE={_on(self.native)}",
            f"-DLLAMA_BUILD_TESTS={_on(self.tests)}", "-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_BUILD_TOOLS=ON",
            "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF",
            # llama-server's web page is built apart, see page.py
            "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
            # lib/ and bin/ find each other wherever the folder above them is moved to
            "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", f"-DCMAKE_INSTALL_RPATH={origin};{origin}/../lib",
        )  # fmt: skip

    def targets(self) -> tuple[str, ...]:
        """What CMake is asked to build."""
        names = ["llama", "ggml"]
        names += PROGRAMS if self.server else ()
        names += [RPC_SERVER] if self.rpc else []
        return (*names, *([TESTS] if self.tests else []))


def _on(flag: bool) -> str:
    return "ON" if flag else "OFF"


def configure(recipe: Recipe, source: Path, build: Path, commit: str) -> None:
    """Run CMake's configuration. EngineTrouble with its last lines if it fails; the log stays in build/../*.log."""
    build.mkdir(parents=True, exist_ok=True)
    command = [_cmake(), "-S", str(source), "-B", str(build), *_generator(), *_launchers(), *recipe.flags()]
    # the copy is no repository: git would name the commit of whatever it lies in
    command += [f"-DLLAMA_BUILD_COMMIT={commit}", "-DLLAMA_BUILD_NUMBER=0", "-DGIT_EXE="]
    command += shlex.split(os.environ.get("CMAKE_ARGS", ""))  # as llama-cpp-python's own build has it
    _run(command, build, "configure", recipe, None)


def compile_targets(recipe: Recipe, build: Path, jobs: int, progress: Progress | None = None) -> None:
    """Compile. progress(done, total) counts files where Ninja says so, else hundredths.

    EngineTrouble with the compiler's last lines if it fails; what is compiled already is kept for the next try.
    """
    command = [_cmake(), "--build", str(build), "--config", "Release", "--parallel", str(jobs), "--target"]
    _run([*command, *recipe.targets()], build, "compile", recipe, progress)


def _cmake() -> str:
    return find("cmake") or "cmake"


def _generator() -> list[str]:
    ninja = find("ninja")
    # without -G, Windows finds Visual Studio's compiler by itself
    if ninja is None or sys.platform == "win32":
        return []
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]


def _launchers() -> list[str]:
    ccache = find("ccache")
    languages = ("C", "CXX", "CUDA") if ccache else ()
    # upstream's own switch would run it twice
    return ["-DGGML_CCACHE=OFF", *(f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in languages)]


def _environment(build: Path) -> dict[str, str]:
    """ccache shares what was compiled between builds in different folders; git looks no higher than the work folder."""
    work = str(build.parent)
    shared = {"CCACHE_BASEDIR": work, "CCACHE_NOHASHDIR": "1", "CCACHE_SLOPPINESS": "time_macros"}
    return {**os.environ, **shared, "GIT_CEILING_DIRECTORIES": work, "LC_ALL": "C"}


def _run(command: Sequence[str], build: Path, step: str, recipe: Recipe, progress: Progress | None) -> None:
    log = build.parent / f"{step}.log"
    tail: deque[str] = deque(maxlen=400)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=_environment(build),
        text=True, encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    with log.open("w", encoding="utf-8", buffering=1) as out, process, stopped_with_us(process):
        for line in process.stdout or ():
            out.write(line)
            tail.append(line.rstrip())
            if progress and (at := _position(line)):
                progress(*at)
        code = process.wait()
    if code:
        raise _failure(step, code, list(tail), log, recipe)


@contextmanager
def stopped_with_us(process: subprocess.Popen[str]) -> Iterator[None]:
    """Stop the build tool and its compilers when we are stopped: else they would go on behind the next build's back."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if main else None
    try:
        yield
    except BaseException:
        if sys.platform == "win32":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)  # on which ninja and make remove half-written files
        process.wait()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _position(line: str) -> tuple[int, int] | None:
    if match := _STEP.match(line):
        return int(match[1]), int(match[2])
    if match := _SHARE.match(line):
        return int(match[1]), 100
    return None


def _failure(step: str, code: int, tail: list[str], log: Path, recipe: Recipe) -> EngineTrouble:
    first = next((i for i, line in enumerate(tail) if _FAULT.search(line)), max(len(tail) - 8, 0))
    lines = [line for line in tail[first : first + 12] if line.strip()] or [f"{step} exited with {code}"]
    verb = "does not configure" if step == "configure" else "does not compile"
    shown = "".join(f"\n       {line}" for line in lines)
    why = f"{_reason(code, tail)}{shown}\n       the whole log: {log}"
    return EngineTrouble(f"llama.cpp {verb}", why=why, fix=_fix(tail, recipe))


def _reason(code: int, tail: list[str]) -> str:
    if _out_of_memory(tail):
        return "the compiler was killed, most likely for want of memory:"
    return f"the build stopped with status {code}:"


def _out_of_memory(tail: list[str]) -> bool:
    return any("Killed" in line or ("cc1plus" in line and "terminated" in line) for line in tail)


def _fix(tail: list[str], recipe: Recipe) -> str:
    text = "\n".join(tail)
    if _out_of_memory(tail):
        return "`mrrope build -j 1`"
    if "No space left on device" in text:
        return "free some space, or set MRROPE_CACHE to a folder on another disk"
    if "No CMAKE_CXX_COMPILER" in text or "No CMAKE_C_COMPILER" in text:
        return f"`{compiler_fix()}`"
    if recipe.backend != "cpu":
        return f"`mrrope build --backend cpu` works without the {recipe.backend} tools"
    return "`mrrope doctor` shows the tools found; another compiler may be named with CC and CXX"
