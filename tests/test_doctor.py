"""doctor: says what is here and what is missing, on machines with next to nothing too, and one command to run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrrope_gguf import engine
from mrrope_gguf.doctor import Report, doctor

TOOLS = ["C++ compiler", "CMake", "build tool", "ccache", "git"]
NAMES = ["Python", "native core", *TOOLS, "llama-cpp-python", "patched engine", "GPU tools", "GPU compilers"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if llama-cpp-python were not installed."""
    engine.loaded_library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("mrrope_gguf.engine.libllama.metadata.version", _not_found)
    yield
    monkeypatch.undo()
    engine.loaded_library.cache_clear()


def _not_found(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def ubuntu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "ubuntu", "ID_LIKE": "debian"})


@pytest.mark.engine
def test_with_everything() -> None:
    report = doctor()
    assert [check.name for check in report.checks] == [*NAMES, "matplotlib", "memory", "disk"]
    found = report["llama-cpp-python"]
    assert found.status == "ok"
    assert f"{engine.PIN}, stock llama.cpp" in found.detail
    assert "runs on CPU" in found.detail
    assert report["native core"].detail.split()[0] in ("avx512", "avx2", "neon", "scalar")
    assert report.next == "mrrope demo"


@pytest.mark.usefixtures("no_engine", "no_tools", "ubuntu")
def test_with_nothing_the_compiler_comes_first() -> None:
    report = doctor()
    for name in (*TOOLS, "llama-cpp-python"):
        assert report[name].status == "missing", name
    assert report.next == "sudo apt install build-essential cmake git"


@pytest.mark.usefixtures("no_engine")
def test_then_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho c++ 14.2 of somewhere\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    report = doctor()
    assert report["C++ compiler"].detail == f"c++: c++ 14.2 of somewhere ({compiler})"
    assert report.next == f"{sys.executable} -m pip install llama-cpp-python=={engine.PIN}"


@pytest.mark.engine
@pytest.mark.usefixtures("no_tools")
def test_with_an_engine_no_compiler_is_needed() -> None:
    report = doctor()
    assert report["C++ compiler"].status == "missing"
    assert report.next == "mrrope demo"


@pytest.mark.usefixtures("no_engine", "no_tools")
@pytest.mark.parametrize(
    ("system", "command"),
    [("darwin", "xcode-select --install"), ("win32", "winget install Microsoft.VisualStudio.2022.BuildTools")],
)
def test_other_systems(monkeypatch: pytest.MonkeyPatch, system: str, command: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert doctor().next.startswith(command)


@pytest.mark.usefixtures("no_engine", "no_tools")
def test_a_linux_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> dict[str, str]:
        raise OSError("no os-release")

    monkeypatch.setattr(platform, "freedesktop_os_release", nameless)
    assert "package manager" in doctor().next


@pytest.mark.engine
def test_another_release_of_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PIN", "0.3.99")
    report = doctor()
    assert report["llama-cpp-python"].status == "old"
    assert report.next.endswith("pip install llama-cpp-python==0.3.99")


@pytest.mark.engine
def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    """LLAMA_CPP_LIB_PATH names a folder without a library: the report says so, and how to get out of it."""
    code = "from mrrope_gguf.doctor import doctor; r = doctor(); print(r['llama-cpp-python'].status, r.next, sep='\\n')"
    found = _run(code, LLAMA_CPP_LIB_PATH=str(tmp_path))
    status, command = found.splitlines()
    assert status == "broken"
    assert "LLAMA_CPP_LIB_PATH" in command


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None; from mrrope_gguf.doctor import doctor; doctor();"
        "print('numpy' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert _run(code).split() == ["False", "False"]


def _run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.usefixtures("no_engine", "no_tools", "ubuntu")
def test_the_report_shows_every_check_and_the_command() -> None:
    report = doctor()
    shown = report.render().splitlines()
    assert len(shown) == len(report.checks) + 2
    assert shown[-1] == "next: sudo apt install build-essential cmake git"
    as_json = json.loads(json.dumps(report.to_json()))
    assert as_json["next"] == report.next
    assert [check["name"] for check in as_json["checks"]] == [check.name for check in report.checks]


def test_a_report_has_no_check_of_that_name() -> None:
    with pytest.raises(KeyError):
        Report((), "")["Python"]


def test_the_pin_is_the_one_that_pip_installs() -> None:
    assert f'\nengine = ["llama-cpp-python=={engine.PIN}"]\n' in (ROOT / "pyproject.toml").read_text()
