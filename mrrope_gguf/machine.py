"""How much memory this machine has, and how much of it a new process may take now, on Linux, macOS and Windows."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# what a cgroup v1 says instead of "no limit" is a page short of 2^63
UNLIMITED = 1 << 60


@dataclass(frozen=True)
class MachineMemory:
    """Bytes. `available` counts caches the system would give up; `limit` is the container's, where there is one.

    `mapped`: what limits us is the process's address space (ulimit -v), where memory counts that is never touched.
    """

    total: int
    available: int
    limit: int | None = None
    mapped: bool = False


def machine_memory() -> MachineMemory | None:
    """The memory of this machine, or of the container we run in; None where the system does not tell."""
    try:
        if sys.platform == "win32":
            return _windows()
        if sys.platform == "darwin":
            return _macos()
        return _linux(Path("/proc"), CGROUPS)
    except (OSError, ValueError, KeyError, IndexError, AttributeError):
        return None


def _linux(proc: Path, cgroups: Path) -> MachineMemory:
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = None
    for allowed, used in _cgroup_limits((proc / "self/cgroup").read_text(), cgroups):
        limit = min(limit or allowed, allowed)
        available = min(available, max(allowed - used, 0))
    own = _address_space(proc)
    if own is not None and own < available:
        return MachineMemory(total, own, limit, mapped=True)
    if limit is None or limit >= total:
        return MachineMemory(total, available)
    return MachineMemory(limit, available, limit)


def _address_space(proc: Path) -> int | None:
    """What this process may still map where its address space is limited, else None."""
    import resource

    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed == resource.RLIM_INFINITY:
        return None
    mapped = int((proc / "self/statm").read_text().split()[0]) * resource.getpagesize()
    return max(allowed - mapped, 0)


def _cgroup_limits(membership: str, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, in use) of our memory cgroup and of every one above it: the tightest counts. Versions 1 and 2."""
    for line in membership.splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, files = (root / "memory", _V1) if controllers else (root, _V2)
        here = top / name.lstrip("/")
        for folder in (here, *here.parents):
            found = _limit_of(folder, *files)
            if found:
                yield found
            if folder == top:
                break


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _limit_of(folder: Path, limit_file: str, usage_file: str, cache: str) -> tuple[int, int] | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        if not limit.isdigit() or int(limit) >= UNLIMITED:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage_file).read_text()) - int(stat.get(cache, 0))
        return int(limit), max(used, 0)
    except (OSError, ValueError):
        return None


def _macos() -> MachineMemory:
    """Free, inactive, speculative and purgeable pages count as available, as Activity Monitor has it."""
    total = int(_output("sysctl", "-n", "hw.memsize"))
    lines = _output("vm_stat").splitlines()
    page = int(lines[0].split("page size of")[1].split()[0])
    pages = {name.strip(): int(count.strip(" .")) for name, _, count in (line.partition(":") for line in lines[1:])}
    names = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    return MachineMemory(total, page * sum(pages.get(name, 0) for name in names))


def _output(*command: str) -> str:
    import subprocess  # late: `extend` and `fit` start faster without it

    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    except subprocess.SubprocessError as err:
        raise OSError(str(err)) from err


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


def _windows() -> MachineMemory:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  the attribute exists on Windows only
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return MachineMemory(status.total, status.available)
