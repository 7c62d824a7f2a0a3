"""How much memory there is: /proc and control groups made up in a folder, and this machine's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mrrope_gguf import machine
from mrrope_gguf.machine import MachineMemory, machine_memory

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Total: 0\n"


def proc(folder: Path, cgroup: str) -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(MEMINFO)
    (folder / "self" / "cgroup").write_text(cgroup)
    return folder


def group(folder: Path, limit: str, usage: int, cached: int = 0, *, version: int = 2) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_without_a_limit(tmp_path: Path) -> None:
    group(tmp_path / "cg/user.slice", "max", GIB)
    seen = machine._linux(proc(tmp_path / "proc", "0::/user.slice\n"), tmp_path / "cg")
    assert seen == MachineMemory(16 * GIB, 8 * GIB)


def test_the_tightest_group_above_counts(tmp_path: Path) -> None:
    group(tmp_path / "cg/a/b", "max", GIB)
    group(tmp_path / "cg/a", str(4 * GIB), 3 * GIB, cached=GIB)
    seen = machine._linux(proc(tmp_path / "proc", "0::/a/b\n"), tmp_path / "cg")
    assert seen == MachineMemory(4 * GIB, 2 * GIB, 4 * GIB)


def test_a_container_that_sees_itself_as_the_root(tmp_path: Path) -> None:
    group(tmp_path / "cg", str(2 * GIB), GIB // 2)
    seen = machine._linux(proc(tmp_path / "proc", "0::/\n"), tmp_path / "cg")
    assert seen == MachineMemory(2 * GIB, 2 * GIB - GIB // 2, 2 * GIB)


def test_version_1_groups(tmp_path: Path) -> None:
    group(tmp_path / "cg/memory/docker/x", str(GIB), GIB // 4, version=1)
    group(tmp_path / "cg/memory", "9223372036854771712", 0, version=1)
    cgroup = "4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n0::/docker/x\n"
    seen = machine._linux(proc(tmp_path / "proc", cgroup), tmp_path / "cg")
    assert seen == MachineMemory(GIB, GIB - GIB // 4, GIB)


def test_a_group_that_is_full_already(tmp_path: Path) -> None:
    group(tmp_path / "cg", str(GIB), 2 * GIB)
    seen = machine._linux(proc(tmp_path / "proc", "0::/\n"), tmp_path / "cg")
    assert seen.available == 0


def test_a_limit_beyond_the_machine_is_none(tmp_path: Path) -> None:
    group(tmp_path / "cg", str(64 * GIB), GIB)
    seen = machine._linux(proc(tmp_path / "proc", "0::/\n"), tmp_path / "cg")
    assert (seen.total, seen.limit) == (16 * GIB, None)


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         1000.
Pages purgeable:                            500.
"Translation faults":                 123456789.
"""


def test_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"sysctl": "17179869184\n", "vm_stat": VM_STAT}
    monkeypatch.setattr(machine, "_output", lambda program, *_: said[program])
    assert machine._macos() == MachineMemory(16 * GIB, 31500 * 16384)


def test_macos_without_its_tools_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", "")
    assert machine_memory() is None


def test_a_tool_that_fails_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("sysctl", 10)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert machine_memory() is None


def test_windows_elsewhere_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine_memory() is None


def test_this_machine() -> None:
    seen = machine_memory()
    assert seen is not None
    assert 1 << 28 < seen.available <= seen.total


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited this way on Linux")
def test_a_limit_of_address_space_counts() -> None:
    """What may still be mapped is what is left of it, and a little more than that is refused by the system."""
    code = (
        "import mmap, resource, sys\n"
        "from mrrope_gguf.machine import machine_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))\n"
        "seen = machine_memory()\n"
        "mmap.mmap(-1, seen.available - (16 << 20)).close()\n"
        "try: mmap.mmap(-1, seen.available + (16 << 20))\n"
        "except OSError: print(seen.mapped, seen.available < 600 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
