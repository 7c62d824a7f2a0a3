"""The tests that reach the C++ core, with that core compiled under sanitizers: `python -m tests.sanitized asan|tsan`.

`asan-engine` is the patched llama.cpp itself, kept in build/asan-engine, on the tests of tiny architectures.

The core is built into build/asan or build/tsan, where no environment finds it; a sitecustomize there puts it
in the place of the installed one, in this process's children too. The interpreter itself is not instrumented, so the
sanitizer's runtime is preloaded. Arguments after the first go to pytest; without any, TESTS.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = {
    "asan": "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all",
    "tsan": "-fsanitize=thread",
}
# libstdc++ too: a runtime that is there before it would not find the function that throws exceptions
RUNTIMES = {"asan": ("libasan.so", "libstdc++.so"), "tsan": ("libtsan.so", "libstdc++.so")}
# The interpreter and numpy keep what they allocate until the process ends, so leaks are not looked for here; the
# fuzzers, which have no interpreter, do, and hand over buffers of the exact size, which Python's allocator hides.
OPTIONS = {
    "asan": {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "tsan": {"TSAN_OPTIONS": "exitcode=66:halt_on_error=1:second_deadlock_stack=1"},
}
TESTS = [
    "bad_files", "bound", "copy", "edit", "extend", "facts", "fit", "forward", "gguf_index", "inplace", "inspect",
    "kernels", "mrrope_header", "native_threads", "open_split", "radix_file", "reexpress", "revert", "split", "tables",
    "write",
]  # fmt: skip
ENGINE_TESTS = ["engine_archs", "engine_bad", "engine_rerotate", "engine_shift", "elastic_archs", "elastic_edges"]
# Answered one by one:
_MEMORY = "counts bytes, which shadow memory and red zones add to"
_LONG = "minutes of arithmetic in tables of one size, which shorter tests fill too"
SKIPPED = {
    "tests/test_bound.py::test_golden_bounds": _LONG,
    "tests/test_bound.py::test_min_base": _LONG,
    "tests/test_bound.py::test_every_smaller_base_of_so_many_digits_fails": _LONG,
    "tests/test_bad_files.py::test_bad_files_take_no_memory": _MEMORY,
    "tests/test_copy.py::test_memory_stays_small_and_nothing_heavy_is_imported": _MEMORY,
    "tests/test_bad_files.py::test_scan_is_clean_under_sanitizers": "compiles a sanitized program of its own",
}
_ODD = (
    "ggml's own mul_mat makes q8_0 blocks at odd addresses where a head is no whole number of blocks (x86 takes them): "
    "UBSan stops there, with a table or without one"
)
ENGINE_SKIPPED = {
    "tests/test_engine_rerotate.py::test_heads_of_broken_blocks[80]": _ODD,
    "tests/test_elastic_edges.py::test_heads_of_broken_blocks[80]": _ODD,
    "tests/test_engine_shift.py::test_stock_mixes_up_partial_rotary_in_a_quantised_cache": "of stock's library alone, "
    "which is not instrumented, and of what lies in its memory",
}
_SITE = """import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec

NAME, PATH = "mrrope_gguf._native", {path!r}


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return ModuleSpec(name, ExtensionFileLoader(name, PATH), origin=PATH) if name == NAME else None


sys.meta_path.insert(0, Finder)
"""


def build(kind: str) -> Path:
    """Compile the core; the folder with sitecustomize.py."""
    folder = ROOT / "build" / kind
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    tools = Path(sysconfig.get_path("scripts"))
    flags = f"{FLAGS[kind]} -fno-omit-frame-pointer -O1 -g"
    subprocess.run(
        [tools / "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", "-DMRROPE_WERROR=ON",
         f"-DCMAKE_CXX_COMPILER={compiler()}", f"-DCMAKE_CXX_FLAGS={flags}", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-Dpybind11_DIR={pybind11}", "--log-level=WARNING"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run([tools / "cmake", "--build", folder], check=True)
    site = folder / "site"
    site.mkdir(exist_ok=True)
    module = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    (site / "sitecustomize.py").write_text(_SITE.format(path=str(module)))
    return site


def compiler() -> str:
    """GCC, whose runtimes are shared libraries; clang's are part of the program unless one asks otherwise."""
    found = shutil.which("g++")
    if found is None:
        raise SystemExit("no g++: `apt-get install g++`")
    return found


def environment(kind: str, site: Path) -> dict[str, str]:
    """What a Python must run in to use the sanitized core."""
    libraries = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES[kind]
    ]
    if missing := [path for path in libraries if not os.path.isabs(path)]:
        raise SystemExit(f"this g++ comes without {', '.join(missing)}")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    preload = {"LD_PRELOAD": " ".join(libraries), "PYTHONPATH": path, "MRROPE_SANITIZED": kind}
    return {**os.environ, **OPTIONS[kind], **preload}


def _file_name(library: str) -> str:
    command = [compiler(), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def on_engine(arguments: list[str]) -> int:
    """Compile the patched llama.cpp with sanitizers (20 minutes on 2 cores) and run its tests that need no weights.

    In a cache of its own: the key of a build does not know these flags, and the user's must not be replaced.
    """
    cache = ROOT / "build" / "asan-engine"
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
    names = ("C_FLAGS", "CXX_FLAGS", "SHARED_LINKER_FLAGS", "EXE_LINKER_FLAGS")
    options = [f"-DCMAKE_{name}={flags}" for name in names] + ["-DCMAKE_CXX_COMPILER=g++", "-DCMAKE_C_COMPILER=gcc"]
    # programs that generate code run while compiling, and may leak
    made = {**os.environ, **OPTIONS["asan"], "MRROPE_CACHE": str(cache), "CMAKE_ARGS": shlex.join(options)}
    command = [sys.executable, "-m", "mrrope_gguf", "build", "--backend", "cpu", "--no-server", "--tests", "--json"]
    found = subprocess.run(command, cwd=ROOT, env=made, check=True, stdout=subprocess.PIPE, text=True).stdout
    # without the core's sitecustomize: it is libllama in the tests' workers that is looked at here
    run = {**environment("asan", ROOT), "MRROPE_TEST_ENGINE": json.loads(found)["lib"]}
    run.pop("MRROPE_SANITIZED")
    run["MRROPE_TEST_SANITIZED"] = "asan"  # other sums than stock's in recurrent layers (tests/arch_models.py)
    skipped = [f"--deselect={test}" for test in ENGINE_SKIPPED]
    tests = [f"tests/test_{name}.py" for name in ENGINE_TESTS]
    arguments = arguments or ["-q", "--hypothesis-profile=ci", *skipped, *tests]
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=run, check=False).returncode


def main() -> int:
    kind, *arguments = sys.argv[1:]
    if kind == "asan-engine":
        return on_engine(arguments)
    site = build(kind)
    if not arguments:
        skipped = [f"--deselect={test}" for test in SKIPPED]
        # libllama and the real files' weights are not what this is about, and neither is instrumented
        arguments = [
            "-q",
            "-m",
            "not engine and not real and not slow",
            *skipped,
            *(f"tests/test_{name}.py" for name in TESTS),
        ]
    # Hypothesis's profile without deadlines: everything takes several times as long
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--hypothesis-profile=ci", *arguments]
    if setarch := shutil.which("setarch"):  # ThreadSanitizer's shadow wants the old, narrower layout of addresses
        command = [setarch, "-R", *command]
    return subprocess.run(command, cwd=ROOT, env=environment(kind, site), check=False).returncode


if __name__ == "__main__":
    assert importlib.util.find_spec("pybind11"), "run it in the environment that `make test` makes"
    sys.exit(main())
