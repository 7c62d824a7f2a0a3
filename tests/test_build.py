"""mrrope build on a toy in llama.cpp's place: compiled, kept, found again, explained when it fails, never twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pybind11
import pytest

from mrrope_gguf.cli import main
from mrrope_gguf.engine import pins, store, toolchain
from mrrope_gguf.engine.build import build, library_file, plan
from mrrope_gguf.engine.checkout import open_checkout
from mrrope_gguf.engine.cmake import Recipe, _fix, _position
from mrrope_gguf.errors import EngineTrouble, Refused
from tests import toy_llama

ROOT = Path(__file__).parent.parent
# a compiler and CMake are needed
pytestmark = pytest.mark.engine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a patch for the toy alone."""
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    real = pins.data_dir
    toy_llama.use(tmp_path / "patches", sha256=toy_llama.put_sdist(tmp_path / "cache"))
    yield tmp_path / "cache"
    pins.data_dir = real
    pins.pins.cache_clear()


def make(said: list[str] | None = None, source: Path | None = None) -> store.Engine:
    say = (lambda line: None) if said is None else said.append
    return build(backend="cpu", server=False, release=toy_llama.RELEASE, source=source, say=say)


def test_from_the_sdist_and_the_second_call_is_instant(cache: Path) -> None:
    said: list[str] = []
    engine = make(said)
    assert library_file(engine.lib) is not None
    assert (engine.pin, engine.commit, engine.backend) == (toy_llama.RELEASE, toy_llama.COMMIT, "cpu")
    assert engine.patch_hash == pins.pin(toy_llama.RELEASE).patch_hash
    assert any(line.startswith("built in") for line in said)
    assert [path.name for path in store.engines_dir().iterdir() if not path.name.endswith(".lock")] == [engine.key]
    start = time.monotonic()
    again: list[str] = []
    assert make(again) == engine
    assert again == []
    assert time.monotonic() - start < 1


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_build_that_others_may_change_is_made_anew(cache: Path) -> None:
    engine = make()
    (engine.lib / "libevil.so").write_bytes(b"")
    engine.lib.chmod(0o777)
    said: list[str] = []
    assert make(said) == replace(engine, built=store.installed()[0].built)
    assert any(line.startswith("built in") for line in said)
    assert not (engine.lib / "libevil.so").exists()
    assert store.installed()[0].ours


def test_lib_and_bin_find_each_other_wherever_they_are(cache: Path, tmp_path: Path) -> None:
    engine = make()
    shutil.move(engine.path, tmp_path / "else where")
    subprocess.run([tmp_path / "else where" / "bin" / "ggml-rpc-server"], check=True)


def test_flags_sources_and_patches_make_builds_of_their_own(cache: Path, tmp_path: Path) -> None:
    def key(recipe: Recipe, source: Path | None = None) -> str:
        return plan(recipe, pins.pin(toy_llama.RELEASE), open_checkout(source) if source else None).key

    recipes = [Recipe("cpu"), Recipe("cuda"), Recipe("cpu", rpc=False), Recipe("cpu", server=False)]
    recipes += [Recipe("cpu", tests=True), Recipe("cpu", native=False)]
    tree = toy_llama.tree(tmp_path / "tree")
    keys = [*map(key, recipes), key(recipes[0], tree)]
    (tree / "src" / "ggml.cpp").write_text("// changed")
    keys.append(key(recipes[0], tree))
    toy_llama.use(tmp_path / "patches", patch=toy_llama.PATCH.replace("return 7", "return 8"))
    keys.append(key(recipes[0]))
    assert len(set(keys)) == len(keys)
    assert keys[0].startswith("9.9.9-cpu-rpc-tools-")


def test_a_patch_that_changes_while_it_compiles(cache: Path, tmp_path: Path) -> None:
    """What is kept has the hash of what was compiled."""
    before = pins.pin(toy_llama.RELEASE).patch_hash

    def say(line: str) -> None:
        if line.startswith("compiling"):
            toy_llama.use(tmp_path / "patches", patch=toy_llama.PATCH.replace("return 7", "return 8"))

    tree = toy_llama.tree(tmp_path / "tree")
    engine = build(backend="cpu", server=False, release=toy_llama.RELEASE, source=tree, say=say)
    after = pins.pin(toy_llama.RELEASE).patch_hash
    assert (engine.patch_hash, engine.patch_hash == after) == (before, False)
    again = make(source=tree)
    assert (again.patch_hash, again.key == engine.key) == (after, False)


def test_a_named_tree_is_copied_and_never_changed(cache: Path, tmp_path: Path) -> None:
    tree = toy_llama.tree(tmp_path / "tree")
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    engine = make(source=tree)
    assert engine.commit == ""
    assert engine.key.startswith("source-cpu")
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_tree(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineTrouble, match=r"not a llama\.cpp source tree"):
        make(source=tmp_path)
    toy_llama.tree(tmp_path / "vendor" / "llama.cpp")
    with pytest.raises(EngineTrouble) as caught:
        make(source=tmp_path)
    assert str(tmp_path / "vendor" / "llama.cpp") in caught.value.fix


def test_a_compiler_error_is_shown_and_the_next_try_goes_on(cache: Path, tmp_path: Path) -> None:
    broken = toy_llama.tree(tmp_path / "tree", **{"src/server.cpp": "int main() { return no_such_name; }\n"})
    with pytest.raises(EngineTrouble, match="does not compile") as caught:
        make(source=broken)
    assert "server.cpp:1" in caught.value.why
    assert "no_such_name" in caught.value.why
    assert "mrrope doctor" in caught.value.fix
    log = Path(caught.value.why.rpartition("the whole log: ")[2])
    assert "no_such_name" in log.read_text()
    assert store.installed() == []
    # what was compiled is kept where it was
    assert list(log.parent.rglob("libggml*"))
    (broken / "src" / "server.cpp").write_text(toy_llama.FILES["src/server.cpp"])
    assert make(source=broken).lib.is_dir()


def test_a_configuration_error_is_shown(cache: Path, tmp_path: Path) -> None:
    broken = toy_llama.FILES["CMakeLists.txt"] + 'message(FATAL_ERROR "no such package: unobtainium")\n'
    with pytest.raises(EngineTrouble, match="does not configure") as caught:
        make(source=toy_llama.tree(tmp_path / "tree", **{"CMakeLists.txt": broken}))
    assert "unobtainium" in caught.value.why


def test_more_options_for_cmake(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = toy_llama.FILES["CMakeLists.txt"] + 'if(MORE)\n    message(FATAL_ERROR "told ${MORE}")\nendif()\n'
    tree = toy_llama.tree(tmp_path / "tree", **{"CMakeLists.txt": told})
    make(source=tree)
    monkeypatch.setenv("CMAKE_ARGS", "'-DMORE=two words'")
    with pytest.raises(EngineTrouble, match="does not configure") as caught:
        make(source=tree)
    assert "told two words" in caught.value.why


def test_a_library_without_the_patch_is_not_kept(cache: Path, tmp_path: Path) -> None:
    toy_llama.use(tmp_path / "patches", patch=toy_llama.PATCH.replace("llama_rope_table_set", "some_other_name"))
    with pytest.raises(EngineTrouble, match="without the patch"):
        make(source=toy_llama.tree(tmp_path / "tree"))
    assert store.installed() == []


def test_two_builds_at_once(cache: Path, tmp_path: Path) -> None:
    """One compiles; the other waits, says so, and finds it done."""
    slow = toy_llama.FILES["CMakeLists.txt"] + "execute_process(COMMAND ${CMAKE_COMMAND} -E sleep 2)\n"
    source = toy_llama.tree(tmp_path / "tree", **{"CMakeLists.txt": slow})
    both = [toy_llama.build_apart(tmp_path / "patches", source, cache) for _ in range(2)]
    told = sorted((process.communicate(timeout=120)[0].splitlines() for process in both), key=len)
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][-1] == told[1][-1]
    assert sum("is building" in line for lines in told for line in lines) == 1
    assert sum(line.startswith("built in") for lines in told for line in lines) == 1


def test_a_build_that_is_stopped_stops_its_compilers(cache: Path, tmp_path: Path) -> None:
    slow = toy_llama.FILES["CMakeLists.txt"] + "execute_process(COMMAND ${CMAKE_COMMAND} -E sleep 97.5)\n"
    source = toy_llama.tree(tmp_path / "tree", **{"CMakeLists.txt": slow})
    process = toy_llama.build_apart(tmp_path / "patches", source, cache)
    deadline = time.monotonic() + 60
    while not sleepers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sleepers()
    process.terminate()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while sleepers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not sleepers()
    assert store.installed() == []


def sleepers() -> list[str]:
    """Command lines of this machine's processes that sleep as the test above has them do."""
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no /proc on this system")
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return [line for line in lines if "-E sleep 97.5" in line]


def test_tools_that_are_missing_are_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if sys.platform != "win32":
        with pytest.raises(EngineTrouble, match=r"no C\+\+ compiler"):
            make()
        (tmp_path / "c++").write_text("#!/bin/sh\n")
        (tmp_path / "c++").chmod(0o755)
    with pytest.raises(EngineTrouble, match="CMake is not installed") as caught:
        make()
    assert "pip install cmake ninja" in caught.value.fix


def test_a_backend_without_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "available", lambda backend: backend == "cpu")
    for backend, word in (("cuda", "nvcc"), ("vulkan", "glslc"), ("rocm", "hipcc"), ("metal", "macOS")):
        with pytest.raises(EngineTrouble, match=backend) as caught:
            toolchain.choose(backend)
        assert word in caught.value.why
    assert toolchain.choose("auto") == "cpu"


def test_auto_wants_a_compiler_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "available", lambda backend: backend in ("cpu", "vulkan", "cuda"))
    monkeypatch.setattr(toolchain, "_has_device", lambda backend: backend == "vulkan")
    assert toolchain.choose("auto") == "vulkan"
    monkeypatch.setattr(toolchain, "_has_device", lambda backend: True)
    assert toolchain.choose("auto") == "cuda"


@pytest.mark.parametrize(
    ("line", "position"),
    [("[12/238] Building C object x.o", (12, 238)), ("[ 7%] Building", (7, 100)), ("/x/y.cpp:1: warning: [3/4]", None)],
)
def test_progress_is_read_off_ninja_and_make(line: str, position: tuple[int, int] | None) -> None:
    assert _position(line) == position


def test_the_reason_of_a_failure() -> None:
    """Memory, disk and the backend's tools each have a fix of their own."""
    killed = ["[3/9] Building x.o", "c++: fatal error: Killed signal terminated program cc1plus"]
    cases = [
        (killed, "cpu", "-j 1"),
        (["x.cpp: error: No space left on device"], "cpu", "MRROPE_CACHE"),
        (["nvcc error : unsupported gpu"], "cuda", "--backend cpu"),
        (["x.cpp:1: error: what"], "cpu", "mrrope doctor"),
    ]
    for tail, backend, word in cases:
        assert word in _fix(tail, Recipe(backend)), tail  # type: ignore[arg-type]


def test_the_flags_of_each_backend() -> None:
    assert "-DGGML_CUDA=ON" in Recipe("cuda").flags()
    assert "-DGGML_HIP=ON" in Recipe("rocm").flags()
    assert "-DGGML_METAL=ON" in Recipe("metal").flags()
    assert "-DGGML_VULKAN=ON" in Recipe("vulkan").flags()
    assert {"-DGGML_RPC=ON", "-DGGML_NATIVE=ON"} <= set(Recipe("cpu").flags())
    assert {"-DGGML_RPC=OFF", "-DGGML_NATIVE=OFF"} <= set(Recipe("cpu", rpc=False, native=False).flags())
    assert "ggml-rpc-server" not in Recipe("cpu", rpc=False).targets()
    assert {"llama-server", "llama-cli", "llama-bench", "llama-quantize", "llama-perplexity"} <= set(
        Recipe("cpu").targets()
    )


def test_the_command_lists_and_removes(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--list"]) == 0
    assert "nothing is built" in capsys.readouterr().err
    command = ["build", "--backend", "cpu", "--no-server", "--pin", toy_llama.RELEASE, "-j", "1"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    folder = Path(out.strip())
    assert (folder / "lib").is_dir()
    assert "compiling llama.cpp c0ffee" in err
    assert main(["build", "--list"]) == 0
    assert folder.name in capsys.readouterr().out
    assert main(["build", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["lib"] == str(folder / "lib")
    assert main(["build", "--remove", "no-such"]) == 1
    assert "names no build" in capsys.readouterr().err
    assert main(["build", "--remove", folder.name[:9]]) == 0
    assert not folder.exists()
    assert (cache / "sources").is_dir()
    assert main(["build", "--remove", "all"]) == 0
    assert not (cache / "sources").exists()


def test_what_is_being_built_is_not_removed(cache: Path) -> None:
    engine = make()
    with store.lock(engine.key), pytest.raises(Refused, match="is being built"):
        store.remove([engine.key])
    assert store.installed() == [engine]
    assert store.remove([engine.key]) == [engine]
    assert store.installed() == []


def test_an_unfinished_or_foreign_folder_is_not_an_engine(cache: Path) -> None:
    engine = make()
    (store.engines_dir() / "half").mkdir()
    (store.engines_dir() / "odd").mkdir()
    (store.engines_dir() / "odd" / "engine.json").write_text('{"key": 3}')
    assert store.installed() == [engine]
    (engine.path / "engine.json").unlink()
    assert store.installed() == []
    assert make().path == engine.path  # made again in its place


@pytest.mark.parametrize("words", [["--backend", "tpu"], ["-j", "0"], ["-j", "two"], ["--list", "--remove", "x"]])
def test_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", *words])
    assert caught.value.code == 2


def test_a_release_without_a_patch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--pin", "0.1.1"]) == 1
    assert "no patch for the llama.cpp of llama-cpp-python 0.1.1" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file(), reason="not a checkout")
def test_for_people_who_live_in_cmake(tmp_path: Path) -> None:
    """-DMRROPE_BUILD_LLAMA=ON adds a target that runs this very command, with the arguments given."""
    cmake, folder = toolchain.find("cmake"), str(tmp_path / "build")
    assert cmake is not None
    options = ["-DMRROPE_BUILD_LLAMA=ON", "-DMRROPE_LLAMA_ARGS=--pin;0.1.1;--backend;cpu"]
    found = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    subprocess.run([cmake, "-S", str(ROOT), "-B", folder, *options, *found], check=True, capture_output=True)
    command = [cmake, "--build", folder, "--target", "mrrope_llama"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no patch for the llama.cpp of llama-cpp-python 0.1.1" in done.stdout + done.stderr
    subprocess.run([cmake, folder, "-DMRROPE_LLAMA_ARGS=--list"], check=True, capture_output=True)
    subprocess.run(command, check=True, capture_output=True)
