"""The header scan and the rope tables under a fuzzer, with sanitizers; and that the fuzzers find what is planted."""

from __future__ import annotations

import os
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz import native_targets as native
from tests.fuzz.native_targets import CORPUS, SOURCES, Engine, Outcome
from tests.fuzz.seeds import seeds
from tests.needs import cannot

SECONDS = int(os.environ.get("MRROPE_FUZZ_SECONDS", 600))  # of the long runs
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C++ fuzzers were tried on Linux alone")


@pytest.fixture(scope="module")
def seed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every malformed and odd file of the other tests, beside the corpus."""
    folder = tmp_path_factory.mktemp("seeds")
    for name, data in seeds([]).items():
        (folder / name.replace("/", "_")).write_bytes(data)
    return folder


def engine(libfuzzer: bool) -> Engine:
    found = native.libfuzzer() if libfuzzer else native.plain()
    if found is None:
        lacking = "no clang with libFuzzer: `apt-get install clang`" if libfuzzer else "no compiler with sanitizers"
        cannot(lacking, "MRROPE_NEED_COMPILERS")
    return found


def fuzz(name: str, how: Engine, seconds: int, folder: Path, seed_folder: Path, seed: int = 0) -> Outcome:
    given = [CORPUS / name, *([seed_folder] if name != "table" else [])]
    return native.run(name, native.build(name, how, folder), seconds, folder, given, seed)


def require_clean(outcome: Outcome) -> None:
    assert outcome.returncode == 0, outcome.log[-6000:]


def fuzz_all(how: Engine, seconds: int, folder: Path, seed_folder: Path, seed: int = 0) -> dict[str, Outcome]:
    """All targets at once."""
    with ThreadPoolExecutor(len(SOURCES)) as pool:
        runs = {name: pool.submit(fuzz, name, how, seconds, folder, seed_folder, seed) for name in SOURCES}
    return {name: run.result() for name, run in runs.items()}


@pytest.mark.slow
def test_libfuzzer_finds_nothing_in_a_minute(tmp_path: Path, seed_folder: Path) -> None:
    for name, outcome in fuzz_all(engine(libfuzzer=True), 60, tmp_path, seed_folder).items():
        require_clean(outcome)
        print(f"{name}: {outcome.executions} executions, {outcome.coverage} edges, {outcome.features} features")
        assert outcome.executions > 1000
        assert outcome.coverage > 100


@pytest.mark.slow
def test_the_plain_loop_finds_nothing(tmp_path: Path, seed_folder: Path) -> None:
    """GCC's sanitizers see other things than clang's; and where there is no clang, this is the fuzzing there is."""
    seconds, seed = 5 if native.libfuzzer() else 60, random.getrandbits(30)
    for name, outcome in fuzz_all(engine(libfuzzer=False), seconds, tmp_path, seed_folder, seed).items():
        require_clean(outcome)
        assert outcome.executions > 500, name


@pytest.mark.hard
@pytest.mark.parametrize("name", SOURCES)
def test_libfuzzer_finds_nothing_in_ten_minutes(name: str, tmp_path: Path, seed_folder: Path) -> None:
    outcome = fuzz(name, engine(libfuzzer=True), SECONDS, tmp_path, seed_folder)
    require_clean(outcome)
    print(f"{name}: {outcome.executions} executions, {outcome.coverage} edges, {outcome.features} features")


# What a careless change could leave out, and which target notices
PLANTED = {
    "a-string-may-leave-the-file": ("scan", "length > room - 8 || ", ""),
    "offsets-are-believed": ("write", "if (t.offset != sum) {", "if (false) {"),
    "elements-may-overflow": ("scan", "uint64_t(INT64_MAX) / t.ne[i] <= product", "false && product == 0"),
    "n_dims-is-believed": ("scan", "if (t.n_dims > MAX_DIMS) {", "if (false) {"),
}
SHORT = ("a-string-may-leave-the-file", "offsets-are-believed")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f if f in SHORT else pytest.param(f, marks=pytest.mark.hard) for f in PLANTED])
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, seed_folder: Path) -> None:
    name, sound, faulty = PLANTED[fault]
    folder = shutil.copytree(native.NATIVE, tmp_path / "native")
    source = folder / "gguf_index.cpp"
    text = source.read_text()
    assert text.count(sound) == 1, "the line this test breaks has changed"
    source.write_text(text.replace(sound, faulty))
    how = engine(libfuzzer=False)
    program = native.build(name, how, tmp_path, folder)
    outcome = native.run(name, program, 20, tmp_path, [CORPUS / name, seed_folder], seed=1)
    assert outcome.returncode != 0
    assert list(tmp_path.glob("crash-*")), "the input that found it is kept"
