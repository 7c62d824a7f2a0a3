"""What this machine has of what is needed to extend, run and build, and the one command to run next."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from mrrope_gguf import engine
from mrrope_gguf.engine import find, store, toolchain
from mrrope_gguf.errors import EngineTrouble
from mrrope_gguf.fit import size
from mrrope_gguf.machine import machine_memory
from mrrope_gguf.paths import cache_dir
from mrrope_gguf.text import printable

Status = Literal["ok", "missing", "broken", "old", "none"]

_GPU_TOOLS = {"nvidia-smi": "CUDA", "rocminfo": "ROCm", "vulkaninfo": "Vulkan"}


@dataclass(frozen=True)
class Check:
    """One line of the report. `fix` is a command, empty where nothing has to be done."""

    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """All checks, and the command to run next."""

    checks: tuple[Check, ...]
    next: str

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def to_json(self) -> dict[str, Any]:
        """As `mrrope doctor --json` prints it."""
        return {"checks": [asdict(check) for check in self.checks], "next": self.next}

    def render(self) -> str:
        """One line a check, then the command."""
        lines = [f"  {check.status:<8}{check.name:<18}{printable(check.detail)}" for check in self.checks]
        return "\n".join([*lines, "", f"next: {self.next}"])


def doctor() -> Report:
    """Look, without changing anything or importing what is not needed. Never raises for what it finds missing."""
    checks = (
        _python(),
        _native(),
        _tool("C++ compiler", toolchain.compilers(), "needed to compile llama.cpp", toolchain.compiler_fix()),
        _tool("CMake", ("cmake",), "`mrrope build` needs it", f"{_pip()} install cmake ninja"),
        _tool("build tool", ("ninja", "make", "nmake"), "`mrrope build` needs one", f"{_pip()} install ninja"),
        _tool("ccache", ("ccache",), "optional: with it a second `mrrope build` compiles what changed", ""),
        _tool("git", ("git",), "optional: merges the patch into a changed `mrrope build --source`", ""),
        _engine(),
        _patched(),
        _gpu(),
        _gpu_compilers(),
        _matplotlib(),
        _memory(),
        _disk(),
    )
    return Report(checks, _next(checks))


def _next(checks: tuple[Check, ...]) -> str:
    """The first command that something needs; a compiler is needed only as long as the engine is missing."""
    by_name = {check.name: check for check in checks}
    order = ["Python", "native core", "llama-cpp-python"]
    if by_name["llama-cpp-python"].status != "ok":
        order.insert(2, "C++ compiler")
    fixes = (by_name[name].fix for name in order if by_name[name].status != "ok")
    return next((fix for fix in fixes if fix), "mrrope demo")


def _python() -> Check:
    detail = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("Python", "ok", detail)


def _native() -> Check:
    try:
        from mrrope_gguf import _native as native
    except ImportError as err:
        return Check("native core", "broken", str(err), f"{_pip()} install --force-reinstall mrrope-gguf")
    levels = native.simd_levels()
    return Check("native core", "ok", f"{levels[0]} (this machine runs {', '.join(levels)})")


def _tool(name: str, programs: tuple[str, ...], otherwise: str, fix: str) -> Check:
    for program in programs:
        path = toolchain.find(program)
        if path:
            return Check(name, "ok", f"{program}: {_version(path)}")
    return Check(name, "missing", otherwise, fix)


def _version(path: str) -> str:
    """The first line a tool says about itself, or its path where it says nothing."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return path
    lines = said.stdout.strip().splitlines()
    return f"{lines[0]} ({path})" if lines else path


def _engine() -> Check:
    install = f"{_pip()} install llama-cpp-python=={engine.PIN}"
    try:
        library = engine.loaded_library()
    except EngineTrouble as err:
        missing = engine.binding_version() is None
        return Check("llama-cpp-python", "missing" if missing else "broken", err.why, install if missing else err.fix)
    build = f"{library.binding}, {library.kind} llama.cpp {library.commit or library.version}"
    detail = f"{build}, runs on {', '.join(library.devices)} ({library.path.parent})"
    if library.binding != engine.PIN:
        return Check("llama-cpp-python", "old", f"{detail}; {engine.PIN} is the one this release knows", install)
    return Check("llama-cpp-python", "ok", detail)


def _patched() -> Check:
    """What `mrrope build` made, and which of it Python runs."""
    binding, builds = engine.binding_version(), store.installed()
    try:
        choice = find.choose(binding)
    except EngineTrouble as err:
        return Check("patched engine", "broken", f"{err.what}: {err.why}", err.fix)
    states = [f"{build.key} ({_state(build, choice.engine, binding)})" for build in builds]
    listed = "; ".join(states) or "none is built"
    if choice.lib and not (choice.engine and choice.engine in builds):
        listed = f"{choice.lib} ({choice.why}); {listed}"
    if choice.note:
        listed = f"{choice.note}; {listed}"
    if choice.lib or any(find.state(build, binding) == "ready" for build in builds):
        return Check("patched engine", "ok", listed)
    if builds:
        return Check("patched engine", "old", listed, "mrrope build")
    return Check(
        "patched engine", "none", f"{listed}: `mrrope build` makes one, for files stock cannot run", "mrrope build"
    )


def _state(build: store.Engine, chosen: store.Engine | None, binding: str | None) -> str:
    return "in use" if build == chosen else find.state(build, binding)


def _gpu_compilers() -> Check:
    found = [name for name in toolchain.BACKENDS if name != "cpu" and toolchain.available(name)]
    if not found:
        return Check("GPU compilers", "none", "no nvcc, hipcc, or glslc with Vulkan's headers: builds are for the CPU")
    return Check("GPU compilers", "ok", f"`mrrope build --backend` can make {', '.join(found)}")


def _gpu() -> Check:
    found = [f"{kind} ({tool})" for tool, kind in _GPU_TOOLS.items() if shutil.which(tool)]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append("Metal")
    return Check("GPU tools", "ok", ", ".join(found)) if found else Check("GPU tools", "none", "models run on the CPU")


def _matplotlib() -> Check:
    if importlib.util.find_spec("matplotlib") is None:
        return Check("matplotlib", "missing", "plots are left out", f"{_pip()} install matplotlib")
    return Check("matplotlib", "ok", _distribution_version("matplotlib"))


def _distribution_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "installed"


def _memory() -> Check:
    memory = machine_memory()
    if memory is None:
        return Check("memory", "none", "this system does not say")
    where = " (limit of this container)" if memory.limit else ""
    return Check("memory", "ok", f"{size(memory.available)} of {size(memory.total)} free{where}")


def _disk() -> Check:
    folder = _existing(cache_dir())
    usage: Callable[[Path], Any] = shutil.disk_usage
    try:
        return Check("disk", "ok", f"{size(usage(folder).free)} free in {folder}")
    except OSError as err:
        return Check("disk", "none", f"{folder}: {err.strerror}")


def _existing(folder: Path) -> Path:
    return next((parent for parent in (folder, *folder.parents) if parent.exists()), Path.cwd())


def _pip() -> str:
    return f"{shlex.quote(sys.executable) if sys.platform != 'win32' else sys.executable} -m pip"
