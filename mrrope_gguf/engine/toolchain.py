"""What this machine can compile with: CMake, a generator, compilers, ccache, and the backends they allow."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from mrrope_gguf.errors import EngineTrouble

Backend = Literal["cpu", "cuda", "metal", "vulkan", "rocm"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# by /etc/os-release's ID or ID_LIKE
COMPILER_PACKAGES = {
    "debian": "sudo apt install build-essential cmake git",
    "fedora": "sudo dnf install gcc-c++ make cmake git",
    "rhel": "sudo dnf install gcc-c++ make cmake git",
    "suse": "sudo zypper install gcc-c++ make cmake git",
    "arch": "sudo pacman -S base-devel cmake git",
    "alpine": "sudo apk add build-base cmake git",
}

# CMake's switch of each backend, and what is missing where it cannot be compiled
FLAGS: dict[Backend, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "metal": ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "rocm": ("-DGGML_HIP=ON",),
}
_NEEDS: dict[Backend, tuple[str, str]] = {
    "cuda": ("nvcc, of the CUDA toolkit", "install the CUDA toolkit (developer.nvidia.com/cuda-downloads)"),
    "metal": ("macOS", "choose another backend"),
    "vulkan": ("glslc and vulkan/vulkan.h", "install glslc (shaderc), the Vulkan headers and SPIR-V headers"),
    "rocm": ("hipcc, of ROCm", "install ROCm's HIP development files (rocm.docs.amd.com)"),
}


def find(name: str) -> str | None:
    """A program, from PATH or from this Python's own environment (`pip install cmake ninja` puts them there)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def compilers() -> tuple[str, ...]:
    """The names a C++ compiler goes by here; the one CXX names first."""
    return (*shlex.split(os.environ.get("CXX", ""))[:1], "c++", "g++", "clang++", "cl")


def compiler_fix() -> str:
    """The command that installs a compiler on this system."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "win32":
        workload = '--override "--wait --passive --add Microsoft.VisualStudio.Workload.VCTools"'
        return f"winget install Microsoft.VisualStudio.2022.BuildTools {workload}"
    known = (COMPILER_PACKAGES[name] for name in _distributions() if name in COMPILER_PACKAGES)
    return next(known, "install g++ or clang++ with this system's package manager")


def _distributions() -> list[str]:
    """This Linux and those it descends from, as /etc/os-release names them: ["ubuntu", "debian"]."""
    import platform

    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return []
    return [release.get("ID", ""), *release.get("ID_LIKE", "").split()]


def require_tools() -> None:
    """EngineTrouble naming the one thing to install where CMake or a compiler is missing."""
    # Visual Studio's compiler is found by CMake, not on PATH
    if sys.platform != "win32" and not any(shutil.which(name) for name in compilers()):
        what = "no C++ compiler is installed"
        raise EngineTrouble(what, why="llama.cpp is compiled on this machine", fix=f"`{compiler_fix()}`")
    if find("cmake") is None:
        python = f"{shlex.quote(sys.executable)} -m pip install cmake ninja"
        raise EngineTrouble("CMake is not installed", why="it configures llama.cpp's build", fix=f"`{python}`")


def available(backend: Backend) -> bool:
    """Whether the compilers and headers of a backend are here. Says nothing about a GPU to run it on."""
    if backend == "cuda":
        return find("nvcc") is not None or _toolkit("CUDA_PATH", "bin/nvcc", "/usr/local/cuda")
    if backend == "rocm":
        return find("hipcc") is not None or _toolkit("ROCM_PATH", "bin/hipcc", "/opt/rocm")
    if backend == "vulkan":
        return find("glslc") is not None and _vulkan_headers()
    return backend == "cpu" or sys.platform == "darwin"


def _toolkit(variable: str, program: str, usual: str) -> bool:
    return (Path(os.environ.get(variable) or usual) / program).exists()


def _vulkan_headers() -> bool:
    sdk = os.environ.get("VULKAN_SDK")
    folders = [Path(sdk) / "include", Path(sdk) / "Include"] if sdk else []
    folders += [Path("/usr/include"), Path("/usr/local/include"), Path("/opt/homebrew/include")]
    return any((folder / "vulkan" / "vulkan.hpp").is_file() for folder in folders)


def choose(wanted: str) -> Backend:
    """The backend to build: the one named, or for "auto" the GPU this system has the compiler and the device for.

    A GPU compiler without a GPU's driver means a machine that only builds, so "auto" looks for both.
    EngineTrouble where the one named cannot be compiled here.
    """
    if wanted == "auto":
        order: Iterable[Backend] = ("metal", "cuda", "rocm", "vulkan")
        return next((backend for backend in order if available(backend) and _has_device(backend)), "cpu")
    backend = next(known for known in BACKENDS if known == wanted)
    if not available(backend):
        missing, fix = _NEEDS[backend]
        raise EngineTrouble(f"the {backend} backend cannot be compiled here", why=f"it needs {missing}", fix=fix)
    return backend


def _has_device(backend: Backend) -> bool:
    if sys.platform in ("darwin", "win32"):
        return True
    nodes = {"cuda": ("/dev/nvidiactl", "/dev/dxg"), "rocm": ("/dev/kfd",), "vulkan": ("/dev/dri", "/dev/dxg")}
    return any(Path(node).exists() for node in nodes.get(backend, ()))


def default_jobs() -> int:
    """Compilers at once: the cores, but no more than memory holds at 1.5 GB each."""
    from mrrope_gguf.machine import machine_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = machine_memory()
    return max(1, min(cores, memory.available // 1_500_000_000)) if memory else cores
