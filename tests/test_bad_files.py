"""Malformed GGUF files are refused, quickly, in little memory, naming byte and field; odd but sound ones are read."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mrrope_gguf.errors import BadFile, FileTrouble
from mrrope_gguf.gguf.index import GGUFIndex, index_bytes, open_gguf
from tests import bad_gguf, ggml_oracle
from tests.bad_gguf import CASES, ODD
from tests.gguf_bytes import head

needs_ggml = pytest.mark.skipif(ggml_oracle.libggml() is None, reason="llama-cpp-python is not installed")


def use_everything(index: GGUFIndex) -> None:
    """Decode every value and touch every byte that an index points to."""
    for key in index.kvs:
        index.get(key)
    for name, tensor in index.tensors.items():
        assert len(index.tensor_bytes(name)) == tensor.nbytes


def accepts(data: bytes) -> bool:
    try:
        use_everything(index_bytes(data, "x.gguf"))
    except BadFile:
        return False
    return True


@pytest.mark.parametrize("case", CASES)
def test_bad_file_is_refused(case: str, tmp_path: Path) -> None:
    bad = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(bad.data)
    began = time.perf_counter()
    with pytest.raises(BadFile) as caught:
        open_gguf(path)
    assert time.perf_counter() - began < 1
    error = caught.value
    assert (error.offset, error.field) == (bad.offset, bad.field)
    assert error.what.startswith("bad.gguf: ")
    assert error.why.startswith(f"{bad.field} at byte {bad.offset}: ")
    assert error.fix
    assert str(error).replace("\n", "").isprintable()


@pytest.mark.parametrize("case", ODD)
def test_odd_file_is_read(case: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(ODD[case])
    with open_gguf(path) as index:
        use_everything(index)


MEMORY = """
import resource
from pathlib import Path
from mrrope_gguf.errors import BadFile
from mrrope_gguf.gguf.index import index_bytes
from tests.bad_gguf import CASES

def status(name):  # KiB; the peak is this program's own, while ru_maxrss may be its parent's
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

resource.setrlimit(resource.RLIMIT_AS, ((status("VmSize") + 65536) * 1024,) * 2)
before = status("VmHWM")
for case in CASES.values():
    try:
        index_bytes(case.data, "x.gguf")
    except BadFile:
        continue
    raise SystemExit("not refused")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bad_files_take_no_memory() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2048, "KiB for all cases together"


def test_claims_of_gigabytes_in_a_sparse_file_are_refused(tmp_path: Path) -> None:
    """Here the lengths and counts could be true: the file is as long as they say."""
    path = tmp_path / "sparse.gguf"
    for case in ("array-str-count-1GiB", "key-length-1GiB+1", "n_kv-2^40", "tensor-name-length-1GiB", "alignment-2^31"):
        path.write_bytes(CASES[case].data)
        os.truncate(path, 3 * 2**30)
        began = time.perf_counter()
        if case == "alignment-2^31":
            with open_gguf(path) as index:  # true now, so it is a sound file
                assert index.data_start == 2**31
        else:
            with pytest.raises(BadFile):
                open_gguf(path)
        assert time.perf_counter() - began < 1, case


@pytest.mark.parametrize(("path", "what"), [("/dev/zero", "not a regular file"), ("/dev/null", "not a regular file")])
def test_device_is_refused(path: str, what: str) -> None:
    if not Path(path).exists():
        pytest.skip("no such device on this system")
    with pytest.raises(FileTrouble, match=what):
        open_gguf(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FileTrouble, match="not a regular file"):
        open_gguf(tmp_path / "pipe.gguf")


def test_directory_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="directory"):
        open_gguf(tmp_path)
    with pytest.raises(FileTrouble, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(FileTrouble, match="cannot be read"):
        open_gguf("nul\0byte.gguf")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file_is_file_trouble(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(bad_gguf.SOUND)
    path.chmod(0)
    with pytest.raises(FileTrouble, match="permissions"):
        open_gguf(path)


def test_fixes_fit_the_fault() -> None:
    fixes = {"git-lfs-pointer": "git lfs pull", "version-0x3000000": "gguf_convert_endian", "version-0x1": "newer"}
    for case, fix in fixes.items():
        with pytest.raises(BadFile) as caught:
            index_bytes(CASES[case].data, "x.gguf")
        assert fix in caught.value.fix


# --- against ggml itself ------------------------------------------------------------------------------------------


def write_all(folder: Path, files: list[bytes]) -> list[Path]:
    paths = [folder / f"{i}.gguf" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return paths


@needs_ggml
@pytest.mark.engine
def test_ggml_agrees_on_every_case(tmp_path: Path) -> None:
    answers = ggml_oracle.verdicts(write_all(tmp_path, [c.data for c in CASES.values()]))
    wrong = {n: a for (n, c), a in zip(CASES.items(), answers, strict=True) if (a == "accept") != c.ggml_reads}
    assert not wrong
    answers = ggml_oracle.verdicts(write_all(tmp_path, list(ODD.values())))
    assert not {n: a for n, a in zip(ODD, answers, strict=True) if a != "accept"}


TEMPLATES = [bad_gguf.SOUND, *ODD.values(), *(c.data for c in CASES.values())]
AGREED = [t for t in TEMPLATES if t not in {c.data for c in CASES.values() if c.ggml_reads}]
NASTY = [0, 1, 2, 7, 8, 9, 13, 31, 32, 33, 63, 64, 255, 2**16, 2**30, 2**31, 2**32 - 1, 2**61, 2**62, 2**63, 2**64 - 1]


def mutate(rng: random.Random, templates: list[bytes] = TEMPLATES) -> bytes:
    """A template with one to three bytes flipped, fields replaced, pieces cut out, doubled or cut off."""
    data = bytearray(rng.choice(templates if rng.random() < 0.5 else templates[: 1 + len(ODD)]))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, min(len(data), 400)))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 8] = rng.choice(NASTY).to_bytes(8, "little")
            case 2:
                data[at : at + 4] = (rng.choice(NASTY) % 2**32).to_bytes(4, "little")
            case 3:
                del data[at : at + rng.randint(1, 40)]
            case 4:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case _:
                del data[rng.randint(at, len(data)) :]
    return bytes(data)


@needs_ggml
@pytest.mark.engine
def test_ggml_agrees_on_random_mutations(tmp_path: Path) -> None:
    rng = random.Random(2)
    files = [mutate(rng, AGREED) for _ in range(1500)]
    answers = ggml_oracle.verdicts(write_all(tmp_path, files))
    ours = [accepts(data) for data in files]
    assert 100 < sum(ours) < 1400, "the mutations should try both sides"
    assert [i for i, (a, b) in enumerate(zip(answers, ours, strict=True)) if (a == "accept") != b] == []


@given(st.binary(max_size=400))
@example(b"GGUF")
def test_random_bytes_never_crash(data: bytes) -> None:
    accepts(data)
    accepts(head(1, 1) + data)
    accepts(head(0, 3) + bad_gguf.ARCH + data)


@given(st.data())
def test_every_cut_of_a_sound_file_is_refused_or_whole(data: st.DataObject) -> None:
    whole = bad_gguf.SOUND
    cut = data.draw(st.integers(0, len(whole)))
    assert accepts(whole[:cut]) == (cut == len(whole))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None or sys.platform == "win32", reason="no C++ compiler")
def test_scan_is_clean_under_sanitizers(tmp_path: Path) -> None:
    program, native = tmp_path / "scan", Path(__file__).parent.parent / "native"
    flags = ["-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(Path(__file__).with_name("scan_main.cpp")), str(native / "gguf_index.cpp")]
    probe = ["c++", *flags, "-shared", "-x", "c++", os.devnull, "-o", os.devnull]
    if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this compiler comes without sanitizers")
    subprocess.run(["c++", *flags, *sources, "-o", str(program)], check=True)
    rng = random.Random(3)
    files = [*TEMPLATES, *(mutate(rng) for _ in range(20000))]
    stream = b"".join(len(data).to_bytes(8, sys.byteorder) + data for data in files)
    run = subprocess.run([str(program)], input=stream, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert [line == b"accept" for line in run.stdout.split()] == [accepts(data) for data in files]
