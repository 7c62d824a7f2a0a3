"""How the engine is found: whose word counts, which build is taken, what is never taken, and what the user is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import engine
from mrrope_gguf.doctor import doctor
from mrrope_gguf.engine import find, pins, store
from mrrope_gguf.engine.programs import server_program
from mrrope_gguf.errors import EngineTrouble
from tests import patched as apart
from tests import tiny

ROOT = Path(__file__).parent.parent
PIN = pins.pin(pins.PIN)
ENGINE_FILE = {
    "rope.scaling.mrrope.version": 1,
    "rope.scaling.mrrope.method": "mrrope-pro",
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no word of the user's."""
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.delenv("MRROPE_ENGINE", raising=False)
    monkeypatch.setattr(find, "stock_gpu", lambda: None)
    return tmp_path / "cache"


def made(key: str, **fields: Any) -> store.Engine:
    """A folder as `mrrope build` leaves it, without a library in it; `age` in seconds."""
    built = time.time() - fields.pop("age", 0)
    values: dict[str, Any] = {
        "pin": PIN.release, "commit": PIN.commit, "patch_hash": PIN.patch_hash, "backend": "cpu", "rpc": True,
        "server": True, "tests": False, **fields,
    }  # fmt: skip
    build = store.Engine(path=store.engines_dir() / key, key=key, built=built, **values)
    build.lib.mkdir(parents=True)
    build.save()
    return build


def test_nothing_is_built() -> None:
    choice = find.choose(PIN.release)
    assert (choice.lib, choice.engine, choice.note) == (None, None, "")


def test_the_newest_build_and_a_gpu_before_the_cpu() -> None:
    made("a", age=10)
    newest = made("b")
    made("c", age=20)
    assert find.choose(PIN.release).lib == newest.lib
    gpu = made("d", age=30, backend="cuda")
    assert find.choose(PIN.release).engine == gpu


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"patch_hash": "0" * 12}, "old patch"),
        ({"commit": "f" * 40}, "other llama.cpp"),
        ({"commit": ""}, "other llama.cpp"),
        ({"commit": f"{PIN.commit}-dirty"}, "other llama.cpp"),
        ({"pin": "0.3.1"}, "other llama.cpp"),
    ],
)
def test_what_is_never_taken_by_itself(fields: dict[str, str], state: str) -> None:
    build = made("a", **fields)
    assert find.state(build, PIN.release) == state
    assert find.choose(PIN.release).lib is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to give files away")
@pytest.mark.parametrize("what", ["library", "program", "lib", "folder", "engines"])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_what_others_may_change_is_not_run(monkeypatch: pytest.MonkeyPatch, what: str, how: str) -> None:
    build = made("cpu-1")
    build.bin.mkdir()
    for file in (build.lib / "libllama.so", build.bin / "llama-server"):
        file.write_bytes(b"\x7fELF")
    assert find.choose(PIN.release).engine == build
    places = {
        "library": build.lib / "libllama.so", "program": build.bin / "llama-server", "lib": build.lib,
        "folder": build.path, "engines": build.path.parent,
    }  # fmt: skip
    if how == "owner":
        os.chown(places[what], 65534, 65534)
    else:
        places[what].chmod(0o777)
    assert find.state(build, PIN.release) == "not yours"
    assert find.choose(PIN.release).lib is None
    assert "other users may change" in find.why_stock(PIN.release)[0]
    with pytest.raises(EngineTrouble, match="none is built") as caught:
        server_program(PIN.release)
    assert "other users may change" in caught.value.why
    monkeypatch.setenv("MRROPE_ENGINE", "cpu-1")
    for choose in (find.choose, server_program):
        with pytest.raises(EngineTrouble, match="other users may change it"):
            choose(PIN.release)


def test_another_binding_takes_its_own() -> None:
    older = list(pins.pins().values())[1]
    if not older.patch.is_file():
        pytest.skip("there is one patch only")
    made("new")
    old = made("old", age=9, pin=older.release, commit=older.commit, patch_hash=older.patch_hash)
    assert find.choose(older.release).engine == old
    assert find.choose("0.1.0").lib is None
    assert find.choose(None).lib is None


def test_the_users_word_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new = made("0.3.36-cpu-old", age=9), made("0.3.36-cpu-new")
    assert find.choose(PIN.release).engine == new
    monkeypatch.setenv("MRROPE_ENGINE", "stock")
    assert find.choose(PIN.release).lib is None
    for word in ("0.3.36-cpu-old", "0.3.36-cpu-o", str(old.path), str(old.lib)):
        monkeypatch.setenv("MRROPE_ENGINE", word)
        assert find.choose(PIN.release).engine == old
    monkeypatch.setenv("MRROPE_ENGINE", str(tmp_path))
    assert find.choose(PIN.release).lib == tmp_path
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(new.lib))
    choice = find.choose(PIN.release)
    assert (choice.lib, choice.engine) == (new.lib, new)


def test_an_older_patch_is_taken_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build = made("a", patch_hash="0" * 12)
    monkeypatch.setenv("MRROPE_ENGINE", "a")
    assert find.choose(PIN.release).engine == build


def test_a_name_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made("a")
    monkeypatch.setenv("MRROPE_ENGINE", "b")
    with pytest.raises(EngineTrouble, match="there is no such engine") as caught:
        find.choose(PIN.release)
    assert "builds are: a" in caught.value.why


def test_another_llama_cpp_is_refused_even_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made("a", commit="f" * 40)
    monkeypatch.setenv("MRROPE_ENGINE", "a")
    with pytest.raises(EngineTrouble, match=r"of another llama\.cpp") as caught:
        find.choose(PIN.release)
    assert PIN.commit[:9] in caught.value.why


def test_a_gpu_is_not_given_up_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python has CUDA, the build has not: stock runs, but for a file that needs the patch."""
    cpu = made("cpu")
    monkeypatch.setattr(find, "stock_gpu", lambda: "cuda")
    choice = find.choose(PIN.release)
    assert choice.lib is None
    assert "MRROPE_ENGINE=cpu" in choice.note
    choice = find.choose(PIN.release, needs_patch=True)
    assert choice.lib == cpu.lib
    assert "this runs on the CPU" in choice.note
    gpu = made("cuda", backend="cuda")
    choice = find.choose(PIN.release)
    assert (choice.lib, choice.note) == (gpu.lib, "")


@pytest.mark.parametrize(
    ("name", "kind"), [("libggml-cuda.so", "cuda"), ("ggml-vulkan.dll", "vulkan"), ("libggml-cpu.so", None)]
)
def test_the_gpu_of_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str | None) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(find, "stock_lib", lambda: tmp_path)
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "libggml-base.so.0").write_bytes(b"")
    assert find.stock_gpu() == kind


def test_why_stock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    why, fix = find.why_stock(PIN.release)
    assert (why, fix) == ("no patched engine is built", "`mrrope build` once")
    made("a", patch_hash="0" * 12)
    assert "this version's patch" in find.why_stock(PIN.release)[0]
    build = made("b")
    why, fix = find.why_stock(PIN.release)
    assert "imported before" in why
    assert str(build.lib) in fix
    monkeypatch.setenv("MRROPE_ENGINE", "stock")
    assert find.why_stock(PIN.release)[1] == "unset MRROPE_ENGINE"
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert "unset LLAMA_CPP_LIB_PATH" in find.why_stock(PIN.release)[1]


@pytest.mark.engine
def test_doctor_shows_every_build() -> None:
    assert doctor()["patched engine"].status == "none"
    made("from-before", patch_hash="0" * 12)
    check = doctor()["patched engine"]
    assert (check.status, check.fix) == ("old", "mrrope build")
    assert "from-before (old patch)" in check.detail
    made("fresh")
    check = doctor()["patched engine"]
    assert check.status == "ok"
    assert "fresh (in use)" in check.detail


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that chooses an engine by itself."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LLAMA_CPP_LIB_PATH", "MRROPE_ENGINE")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env={**kept, **env}, capture_output=True, text=True, check=False)


def installed(patched: Path) -> store.Engine:
    """The patched library as an installed build of this test's cache."""
    build = made("0.3.36-cpu-real")
    build.lib.rmdir()
    build.lib.symlink_to(patched, target_is_directory=True)
    return build


LOADED = "from mrrope_gguf import engine; print(engine.loaded_library())"


@pytest.mark.engine
def test_a_build_is_loaded_by_itself(patched: Path) -> None:
    build = installed(patched)
    assert run(LOADED).stdout.startswith("patched llama.cpp")
    assert str(build.lib) in run(LOADED).stdout
    assert run(LOADED, MRROPE_ENGINE="stock").stdout.startswith("stock llama.cpp")
    assert run(LOADED, LLAMA_CPP_LIB_PATH=str(patched)).stdout.startswith("patched llama.cpp")
    left = run(f"{LOADED}; import os; print(os.environ.get('LLAMA_CPP_LIB_PATH'))").stdout
    assert left.splitlines()[-1] == "None"


@pytest.mark.engine
def test_llama_cpp_imported_first(patched: Path, tmp_path: Path) -> None:
    build = installed(patched)
    path = tiny.make(tmp_path / "m.gguf", "qwen2", n_ctx=256, extra=ENGINE_FILE)
    code = f"import llama_cpp, mrrope_gguf as m; m.load({str(path)!r})"
    said = run(code).stderr
    assert "llama_cpp was imported before mrrope_gguf could choose" in said
    assert f"LLAMA_CPP_LIB_PATH={build.lib}" in said


@pytest.mark.engine
def test_a_library_of_another_llama_cpp(tmp_path: Path) -> None:
    """A folder says nothing of its commit; the library in it does. The binding's own is never doubted."""
    lib = find.stock_lib()
    assert lib is not None
    (tmp_path / "lib").symlink_to(lib, target_is_directory=True)
    other = (
        "from mrrope_gguf.engine import find, pins\n"
        "pin = pins.pin(pins.PIN)\n"
        "find.pins = lambda: {pin.release: pins.Pin(pin.release, 'f' * 40, pin.sdist, pin.sha256)}\n"
    )
    named = {"LLAMA_CPP_LIB_PATH": str(tmp_path / "lib")}
    assert run(LOADED, **named).stdout.startswith("stock llama.cpp")
    done = run(other + LOADED, **named)
    assert done.returncode == 1
    assert "this libllama is of another llama.cpp than llama-cpp-python" in done.stderr
    assert run(other + LOADED).stdout.startswith("stock llama.cpp")


@pytest.mark.engine
def test_the_error_for_an_engine_file_names_the_build(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "qwen2", n_ctx=256, extra=ENGINE_FILE)
    said = run(f"import mrrope_gguf as m; m.load({str(path)!r})").stderr
    assert "no patched engine is built" in said
    assert "fix: `mrrope build` once; or `mrrope extend --portable`" in said


def context_of(path: str, n_ctx: int, **options: Any) -> tuple[int, str]:
    from mrrope_gguf import load

    llm = load(path, n_ctx, **options)
    return llm.n_ctx(), str(engine.loaded_library().kind)


@pytest.mark.engine
def test_the_patched_engine_runs_a_plain_file_at_any_length(patched: Path, tmp_path: Path) -> None:
    path = str(tiny.make(tmp_path / "m.gguf", "qwen2", n_ctx=256))
    with pytest.raises(apart.Failed, match="and the file has 256"):
        apart.run(context_of, path, 1024, lib=patched)
    for method in ("mrrope-pro", "mrrope-uni", 4, 5):
        assert apart.run(context_of, path, 1024, lib=patched, rope_scaling_type=method) == (1024, "patched")
    with pytest.raises(apart.Failed, match="'mrrope-pro' needs the patched engine"):
        apart.run(context_of, path, 1024, lib=None, rope_scaling_type=5)
    with pytest.raises(apart.Failed, match="rope_scaling_type='mrrope'"):
        apart.run(context_of, path, 1024, lib=patched, rope_scaling_type="mrrope")
    assert apart.run(context_of, path, 1024, lib=None, rope_scaling_type="yarn") == (1024, "stock")


@pytest.mark.engine
def test_the_start_says_which_engine_runs(patched: Path) -> None:
    installed(patched)
    code = "from mrrope_gguf import engine; engine.announce(print)"
    assert run(code).stdout.startswith("engine: patched llama.cpp")
    assert "on CPU" in run(code).stdout
    assert run(code, MRROPE_ENGINE="stock").stdout.startswith("engine: stock llama.cpp")
