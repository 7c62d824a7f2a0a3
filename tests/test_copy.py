"""Bytes by every way a file system allows: shared, copied by the kernel, read and written; in little memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mrrope_gguf import revert
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf import copy, stage
from mrrope_gguf.gguf.copy import Copier
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.pieces import Piece, Rows, Span
from mrrope_gguf.gguf.source import Source
from tests import edits
from tests.edits import Raw, model, sha256, write, write_extension
from tests.filesystems import mounted


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.gguf", model())


@pytest.fixture(params=["xfs", "btrfs"], scope="module")
def reflinking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(request.param, tmp_path_factory.mktemp("fs")) as place:
        yield place


def shared_blocks(path: Path) -> bool:
    return "shared" in subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True).stdout


def test_reflinks_share_vocabulary_and_tensors(reflinking: Path) -> None:
    source = write(reflinking / "source.gguf", model(n_vocab=100_000, n_layer=40))
    report = write_extension(source, reflinking / "out.gguf", permute=False)
    assert report.how == "reflink"
    assert report.bytes_copied < 40_000 < 2_000_000 < source.stat().st_size
    assert shared_blocks(reflinking / "out.gguf")
    back = revert(reflinking / "out.gguf", reflinking / "back.gguf")
    assert back.how == "reflink"
    assert sha256(reflinking / "back.gguf") == sha256(source)
    for path in reflinking.glob("*.gguf"):
        path.unlink()


def test_reflinks_with_reordered_rows(reflinking: Path) -> None:
    source = write(reflinking / "source.gguf", model(n_layer=12))
    assert write_extension(source, reflinking / "out.gguf", permute=True).how == "reflink"
    assert revert(reflinking / "out.gguf").how == "in-place replace"
    assert sha256(reflinking / "out.gguf") == sha256(source)
    for path in reflinking.glob("*.gguf"):
        path.unlink()


@pytest.fixture
def results(source: Path) -> dict[str, str]:
    """What a plain copy gives, to compare with."""
    copied = write_extension(source, source.with_name("expected.gguf"), permute=True)
    return {"how": copied.how, "sha256": sha256(copied.path)}


@pytest.mark.parametrize("name", ["EOPNOTSUPP", "EXDEV", "EINVAL", "ENOSYS"])
def test_falls_back_to_reading_and_writing(
    source: Path, results: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    report = write_extension(source, source.with_name("out.gguf"), permute=True)
    assert report.how == "copy"
    assert sha256(report.path) == results["sha256"]


def test_falls_back_where_the_kernel_copies_nothing(
    source: Path, results: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0, raising=False)
    assert write_extension(source, source.with_name("out.gguf"), permute=True).how == "copy"
    assert sha256(source.with_name("out.gguf")) == results["sha256"]


def test_without_pread_pwrite_or_linux(source: Path, results: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, or on macOS where its clone does not fit."""
    for name in ("pread", "pwrite", "copy_file_range", "statvfs"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(copy, "clone_range", lambda *args: False)
    monkeypatch.setattr(stage, "clone_range", lambda *args: False)
    assert write_extension(source, source.with_name("out.gguf"), permute=True).how == "copy"
    assert sha256(source.with_name("out.gguf")) == results["sha256"]


def test_a_whole_file_clone_is_used_only_where_the_data_keeps_its_place(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloned: list[Path] = []

    def clone(src: Path, dst: Path) -> bool:
        shutil.copyfile(src, dst)
        cloned.append(dst)
        return True

    monkeypatch.setattr(stage, "clonefile", clone)
    out = source.with_name("out.gguf")
    write_extension(source, out)
    assert cloned == []
    with Source.open(out) as opened:
        edit = edits.extended(Edit(opened), n_ctx=512)
        pieces = edit.plan(opened.current_prefix).pieces
        made = stage.stage(out, pieces, out.with_name("again.gguf"), check=edit.plan().check)
        assert made is not None
        stage.publish(made, force=False)
    assert len(cloned) == 1
    assert made.how == "reflink"
    revert(out.with_name("again.gguf"), out.with_name("back.gguf"))
    assert sha256(out.with_name("back.gguf")) == sha256(source)


def test_progress_counts_to_the_end_when_bytes_are_copied(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = write_extension(source, source.with_name("out.gguf"), progress=lambda *step: seen.append(step))
    size = report.path.stat().st_size
    assert report.bytes_copied == size
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_copies_of_every_kind_of_piece(tmp_path: Path) -> None:
    below = os.urandom(3 << 20)
    (tmp_path / "below").write_bytes(below)
    pieces: list[Piece] = [b"head", Span(5, 2_000_000), Rows(0, 3 << 20, 1 << 18, (2, 0, 1)), b"tail"]
    with open(tmp_path / "below", "rb") as src, open(tmp_path / "above", "w+b") as dst:
        Copier(src.fileno(), dst.fileno()).write(pieces)
    rows = [below[i << 18 : (i + 1) << 18] for i in range(12)]
    moved = b"".join(rows[g + i] for g in range(0, 12, 3) for i in (2, 0, 1))
    assert (tmp_path / "above").read_bytes() == b"head" + below[5:2_000_000] + moved + b"tail"


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "below").write_bytes(b"short")
    with (
        open(tmp_path / "below", "rb") as src,
        open(tmp_path / "above", "w+b") as dst,
        pytest.raises(FileTrouble, match="ended while it was being read"),
    ):
        Copier(src.fileno(), dst.fileno()).write([Span(0, 100)])


# -- bounds ------------------------------------------------------------------------------------------------------------

MEASURE = """
import os, sys
from pathlib import Path
del os.copy_file_range
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.rows import RowPermutation
from mrrope_gguf.gguf.types import ValueType
from mrrope_gguf.gguf.write import write_new
from mrrope_gguf import revert
src, out = map(Path, sys.argv[1:])
with Source.open(src) as source:
    edit = Edit(source)
    edit.set("llama.context_length", ValueType.UINT32, 256)
    edit.permute_rows("blk.0.attn_q.weight", RowPermutation(16, 128, 128))
    assert write_new(edit, out).how == "copy"
revert(out, out.with_suffix(".back"))
heavy = {"numpy", "llama_cpp", "matplotlib", "ctypes", "gguf"} & sys.modules.keys()
# of this very process; ru_maxrss would count the parent it was forked from
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, *heavy)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_stays_small_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    room = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    directory = room / f"mrrope-{os.getpid()}"
    directory.mkdir()
    try:
        raw = Raw(model().kvs, [("big", (64 << 10, 512), "F32"), ("blk.0.attn_q.weight", (8192, 2048), "F16")])
        source = write(directory / "a.gguf", raw)
        command = [sys.executable, "-c", MEASURE, str(source), str(directory / "b.gguf")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (directory / "b.back").read_bytes() == source.read_bytes()
    finally:
        shutil.rmtree(directory)
    peak, *heavy = done.stdout.split()
    assert heavy == []
    assert int(peak) < 64 << 10, peak
