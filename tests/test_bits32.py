"""The header scan compiled for 32 bits, where a size from a file does not fit size_t: the answers of 64 bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mrrope_gguf.bound import bound, bound_curve, min_base
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf.index import open_gguf
from tests.bad_gguf import SOUND
from tests.fuzz import native_targets as native
from tests.fuzz.native_targets import CORPUS, Engine
from tests.fuzz.seeds import seeds
from tests.needs import cannot
from tests.test_bad_files import TEMPLATES, accepts, mutate

pytestmark = pytest.mark.slow


def compiler() -> Engine:
    found = native.plain32() if sys.platform == "linux" else None
    if found is None:
        cannot("no compiler for 32-bit x86: `apt-get install g++-multilib`", "MRROPE_NEED_COMPILERS")
    return found


@pytest.fixture(scope="module")
def engine() -> Engine:
    return compiler()


def test_the_scan_answers_as_in_64_bits(engine: Engine, tmp_path: Path) -> None:
    program = tmp_path / "scan32"
    sources = [str(Path(__file__).with_name("scan_main.cpp")), str(native.NATIVE / "gguf_index.cpp")]
    subprocess.run([engine.compiler, *engine.flags, *sources, "-o", str(program)], check=True)
    rng = random.Random(4)
    files = [*TEMPLATES, *(mutate(rng) for _ in range(5000))]
    stream = b"".join(len(data).to_bytes(8, "little") + data for data in files)
    run = subprocess.run([str(program)], input=stream, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert [line == b"accept" for line in run.stdout.split()] == [accepts(data) for data in files]


def test_what_was_parsed_is_written_in_32_bits(engine: Engine, tmp_path: Path) -> None:
    """Offsets and sizes up to 2^62 in a header, held in 64 bits whatever a pointer has."""
    folder = tmp_path / "seeds"
    folder.mkdir()
    for name, data in seeds([]).items():
        (folder / name.replace("/", "_")).write_bytes(data)
    program = native.build("write", engine, tmp_path)
    outcome = native.run("write", program, 5, tmp_path, [CORPUS / "write", CORPUS / "scan", folder], seed=1)
    assert outcome.returncode == 0, outcome.log[-6000:]
    assert outcome.executions > 500


def test_a_file_that_cannot_be_mapped_is_file_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python says ValueError to a file beyond the address space; 64 bits meet it where a file is emptied meanwhile."""
    path = tmp_path / "emptied.gguf"
    path.write_bytes(SOUND)
    stat = os.fstat

    def emptied(fd: int) -> os.stat_result:
        found = stat(fd)
        os.truncate(path, 0)
        return found

    monkeypatch.setattr(os, "fstat", emptied)
    with pytest.raises(FileTrouble, match="cannot be read"):
        open_gguf(path)


def test_more_angles_than_the_scan_has_room_for_are_refused() -> None:
    """Its tables take 2 KiB an angle, and their size is reckoned in size_t; no head has more than 4096."""
    with pytest.raises(ValueError, match="65536 angles"):
        bound([0.1] * 65537)
    with pytest.raises(ValueError, match="65536 angles"):
        min_base(4096, 2 * 65537)
    with pytest.raises(ValueError, match="65536 angles"):
        bound_curve([0.1] * 65537, 10)
