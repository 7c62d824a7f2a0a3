"""The C++ fuzz targets: compiled with libFuzzer where clang has it, else with a plain driver loop; both sanitized.

`python -m tests.fuzz` runs them for as long as wanted; tests/test_fuzz_native.py runs them in CI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / "native"
CORPUS = HERE / "corpus"
FINDS = HERE / "finds"  # what once broke a target, by the target's name
SOURCES = {
    "scan": ["scan_fuzz.cpp", "mutate.cpp", "mutator.cpp"],
    "write": ["write_fuzz.cpp", "mutate.cpp", "mutator.cpp"],
    "table": ["table_fuzz.cpp"],  # numbers, for which libFuzzer's own mutations do
}
MAX_LEN = {"scan": 4096, "write": 4096, "table": 256}
# an error ends the run; a float that does not fit an integer is no part of "undefined"
_FLAGS = ["-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-Wall", "-Wextra"]
_SANITIZERS = "address,undefined,float-cast-overflow"


@dataclass(frozen=True)
class Engine:
    """A compiler that can make the targets: `libfuzzer` with coverage, else in a loop; `bits32` for 32-bit x86."""

    compiler: str
    libfuzzer: bool
    bits32: bool = False

    @property
    def flags(self) -> list[str]:
        machine = ["-m32"] if self.bits32 else []
        return [*machine, *_FLAGS, f"-fsanitize={'fuzzer,' if self.libfuzzer else ''}{_SANITIZERS}"]


@dataclass(frozen=True)
class Outcome:
    """What a run came to. coverage: edges and features libFuzzer saw, 0 in a plain loop; log: what it printed."""

    executions: int
    coverage: int
    features: int
    returncode: int
    log: str


@cache
def libfuzzer() -> Engine | None:
    """A clang that comes with libFuzzer and the sanitizers, or None. MRROPE_FUZZ_CLANG names another than clang++."""
    names = [os.environ.get("MRROPE_FUZZ_CLANG", "clang++"), *(f"clang++-{n}" for n in range(21, 12, -1))]
    for name in filter(shutil.which, names):
        engine = Engine(name, True)
        if _links(engine, 'extern "C" int LLVMFuzzerTestOneInput(const char *, unsigned long) { return 0; }'):
            return engine
    return None


@cache
def plain() -> Engine | None:
    """Any compiler with the sanitizers, or None; GCC's if there is a choice, so that both compilers are tried."""
    for name in filter(shutil.which, ("g++", "c++", "clang++")):
        engine = Engine(name, False)
        if _links(engine, "int main() { return 0; }"):
            return engine
    return None


@cache
def plain32() -> Engine | None:
    """A compiler for 32-bit x86 with the sanitizers (`apt-get install g++-multilib`), or None."""
    for name in filter(shutil.which, ("g++", "clang++")):
        engine = Engine(name, False, bits32=True)
        if _links(engine, "#include <string>\nint main() { return sizeof(void *) - 4; }"):
            return engine
    return None


def _links(engine: Engine, source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = [engine.compiler, *engine.flags, "-x", "c++", "-", "-o", f"{folder}/probe"]
        return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def build(name: str, engine: Engine, folder: Path, native: Path = NATIVE) -> Path:
    """Compile a target into `folder`; `native` is where gguf_index.cpp is taken from."""
    program = folder / f"{name}-{'libfuzzer' if engine.libfuzzer else 'plain'}"
    sources = [str(HERE / source) for source in SOURCES[name]]
    if name != "table":
        sources.append(str(native / "gguf_index.cpp"))
    if not engine.libfuzzer:
        sources += [str(HERE / "driver.cpp"), *([str(HERE / "mutate.cpp")] if name == "table" else [])]
    subprocess.run([engine.compiler, *engine.flags, *sources, "-o", str(program)], check=True)
    return program


def mutator(folder: Path) -> Path | None:
    """The GGUF mutator as a shared library for the Python targets; None where nothing compiles it."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or os.name == "nt":
        return None
    library = folder / "libmutate.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(HERE / "mutate.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


# libFuzzer judges memory by ru_maxrss, which a process takes over from the one that started it: pytest's is gigabytes
FRESH = (sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")


def run(name: str, program: Path, seconds: int, scratch: Path, seeds: list[Path], seed: int = 0) -> Outcome:
    """Fuzz for `seconds`, from the files and folders `seeds`; what was found new lies in `scratch` afterwards.

    seed 0: another for each run, printed by libFuzzer. What broke the target is in `scratch` as crash-*.
    """
    found = scratch / f"{name}-found"
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_LEN[name]}", f"-artifact_prefix={scratch}/"]
    options += ["-timeout=5", "-rss_limit_mb=2048", "-malloc_limit_mb=64", "-print_final_stats=1", f"-seed={seed}"]
    command = [*FRESH, str(program), *options, str(found), *map(str, seeds)]
    # a scan leaves nothing behind that the interpreter could be blamed for: leaks count here
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, timeout=seconds + 120, check=False
    )
    return outcome(done.returncode, done.stderr)


def outcome(returncode: int, log: str) -> Outcome:
    """What libFuzzer's words, or those of a plain loop, say about a run."""
    runs = re.findall(r"number_of_executed_units: (\d+)", log)
    coverage = re.findall(r"cov: (\d+) ft: (\d+)", log)
    edges, features = map(int, coverage[-1]) if coverage else (0, 0)
    return Outcome(int(runs[-1]) if runs else 0, edges, features, returncode, log)
