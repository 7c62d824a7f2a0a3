"""New files: by every way a file system allows, whole or not at all, and one clear error for everything else."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrrope_gguf import revert
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf import copy, stage
from mrrope_gguf.gguf.copy import Copier
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.gguf.pieces import Piece, Rows, Span
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.write import WriteReport, write_new
from tests import edits
from tests.edits import Raw, left_in, model, sha256, tensors, write
from tests.filesystems import mounted


def write_extension(source: Path, dst: Path, *, permute: bool = False, tensor: bool = True, **how: Any) -> WriteReport:
    with Source.open(source) as opened:
        return write_new(edits.extended(Edit(opened), permute=permute, tensor=tensor), dst, **how)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.gguf", model())


# -- ways --------------------------------------------------------------------------------------------------------------


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
from mrrope_gguf.gguf.undo import RowPermutation
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


# -- nothing lost ------------------------------------------------------------------------------------------------------


def test_keeps_the_mode_and_leaves_nothing_else(source: Path) -> None:
    source.chmod(0o640)
    write_extension(source, source.with_name("out.gguf"))
    assert source.with_name("out.gguf").stat().st_mode & 0o777 == 0o640
    assert left_in(source.parent) == {"source.gguf", "out.gguf"}


def test_a_read_only_source_is_no_trouble(source: Path) -> None:
    before = sha256(source)
    source.chmod(0o444)
    write_extension(source, source.with_name("out.gguf"))
    assert sha256(source) == before


def test_a_source_on_a_read_only_file_system_is_no_trouble(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, megabytes=8) as place:
        source = write(place / "source.gguf", model())
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        assert write_extension(source, tmp_path / "out.gguf").path.exists()
        with pytest.raises(FileTrouble, match="cannot be written") as error:
            write_extension(source, place / "out.gguf")
        assert "Read-only" in error.value.why
        assert left_in(place) == {"source.gguf"}


def test_an_existing_destination_is_kept_without_force(source: Path) -> None:
    out = source.with_name("out.gguf")
    out.write_text("precious")
    with pytest.raises(FileTrouble, match="the file exists") as error:
        write_extension(source, out)
    assert "--force" in error.value.fix
    assert out.read_text() == "precious"
    write_extension(source, out, force=True)
    assert tensors(out).keys() > tensors(source).keys()


@pytest.mark.parametrize("links", [True, False])
def test_a_destination_that_appears_meanwhile_is_kept(
    source: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    out = source.with_name("out.gguf")
    real = os.link

    def appear(src: Path, dst: Path) -> None:
        out.write_text("precious")
        if not links:
            raise OSError(errno.EPERM, "no hard links here")
        real(src, dst)

    monkeypatch.setattr(os, "link", appear)
    with pytest.raises(FileTrouble, match="the file exists"):
        write_extension(source, out)
    assert out.read_text() == "precious"
    assert left_in(source.parent) == {"source.gguf", "out.gguf"}


def test_publishes_where_there_are_no_hard_links(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    write_extension(source, source.with_name("out.gguf"))
    assert left_in(source.parent) == {"source.gguf", "out.gguf"}


@pytest.mark.parametrize("name", ["source.gguf", "link.gguf", "hard.gguf", "sub/../source.gguf"])
def test_the_source_is_no_destination(source: Path, name: str) -> None:
    source.with_name("sub").mkdir()
    source.with_name("link.gguf").symlink_to(source)
    source.with_name("hard.gguf").hardlink_to(source)
    before = sha256(source)
    with pytest.raises(FileTrouble, match="the same file"):
        write_extension(source, source.parent / name, force=True)
    assert sha256(source) == before


def test_a_hub_cache_symlink_is_followed(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    write(blob, model())
    link = tmp_path / "models--a--b" / "snapshots" / "x" / "model.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../blobs/0123")
    before = sha256(blob)
    report = write_extension(link, tmp_path / "out.gguf")
    assert not report.path.is_symlink()
    assert sha256(blob) == before
    revert(report.path, tmp_path / "back.gguf")
    assert sha256(tmp_path / "back.gguf") == before


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").symlink_to("nowhere.gguf")
    for path, what in (("broken.gguf", "no such file"), (".", "directory"), ("missing.gguf", "no such file")):
        with pytest.raises(FileTrouble, match=what):
            Source.open(tmp_path / path)


def test_bad_destinations(source: Path) -> None:
    tmp = source.parent
    (tmp / "dangling.gguf").symlink_to("nowhere")
    for path, what in (
        (tmp, "this is a directory"),
        (tmp / "no" / "such" / "out.gguf", "its directory does not exist"),
        (source / "out.gguf", "its directory does not exist"),
        (tmp / "dangling.gguf", "the file exists"),
        (tmp / ("x" * 300), "cannot be written"),
    ):
        with pytest.raises(FileTrouble, match=what):
            write_extension(source, path)
    assert left_in(tmp) == {"source.gguf", "dangling.gguf"}


def test_a_forced_write_replaces_a_symlink_not_its_target(source: Path) -> None:
    source.with_name("other").write_text("precious")
    source.with_name("out.gguf").symlink_to("other")
    write_extension(source, source.with_name("out.gguf"), force=True)
    assert source.with_name("other").read_text() == "precious"


def test_a_full_disk_is_foreseen(source: Path, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, megabytes=1) as place:
        (place / "fill").write_bytes(bytes((1 << 20) - 40960))
        with pytest.raises(FileTrouble, match="no room") as error:
            write_extension(source, place / "out.gguf")
        assert "bytes needed" in error.value.why
        assert "available" in error.value.why
        assert left_in(place) == {"fill"}


def test_a_disk_that_fills_up_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_require_space", lambda *args: None)
    with mounted("tmpfs", tmp_path, megabytes=1) as place:
        (place / "fill").write_bytes(bytes((1 << 20) - 40960))
        with pytest.raises(FileTrouble, match="cannot be written") as error:
            write_extension(source, place / "out.gguf")
        assert "No space left" in error.value.why
        assert "bytes available" in error.value.why
        assert left_in(place) == {"fill"}


def test_a_directory_we_may_not_write(source: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid():
        locked.chmod(0o555)
    elif subprocess.run(["chattr", "+i", str(locked)], capture_output=True).returncode:  # root ignores modes
        pytest.skip("root, and chattr +i does not work here")
    try:
        with pytest.raises(FileTrouble, match="cannot be written") as error:
            write_extension(source, locked / "out.gguf")
        assert "permissions" in error.value.fix
        assert left_in(locked) == set()
    finally:
        locked.chmod(0o755) if os.geteuid() else subprocess.run(["chattr", "-i", str(locked)], check=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_nothing(source: Path, error: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error):
        write_extension(source, source.with_name("out.gguf"), progress=stop)
    assert left_in(source.parent) == {"source.gguf"}


@pytest.mark.parametrize("step", ["fsync", "chmod", "link", "ftruncate"])
def test_an_error_at_any_step_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(KeyboardInterrupt):
        write_extension(source, source.with_name("out.gguf"))
    assert left_in(source.parent) <= {"source.gguf", "out.gguf"}
    monkeypatch.undo()
    if source.with_name("out.gguf").exists():  # it has its name only once it is whole
        revert(source.with_name("out.gguf"))
        assert sha256(source.with_name("out.gguf")) == sha256(source)


def test_what_does_not_read_back_is_not_published(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Copier.write

    def corrupt(self: Copier, pieces: list[Piece], at: int = 0) -> int:
        end = real(self, pieces, at)
        os.pwrite(self.dst, b"\7", 16)  # another number of records
        return end

    monkeypatch.setattr(Copier, "write", corrupt)
    with pytest.raises(Exception, match=r"source|out"):
        write_extension(source, source.with_name("out.gguf"))
    assert left_in(source.parent) == {"source.gguf"}


def test_a_plan_notices_every_difference(source: Path) -> None:
    with Source.open(source) as opened:
        plan = edits.extended(Edit(opened)).plan()
        with open_gguf(source) as index, pytest.raises(FileTrouble, match="does not read back"):
            plan.check(index)
