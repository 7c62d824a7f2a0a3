"""New files: whole or not at all, nothing lost, and one clear error for everything else."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from mrrope_gguf import revert
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf import stage
from mrrope_gguf.gguf.copy import Copier
from mrrope_gguf.gguf.edit import Edit, Plan
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.gguf.names import journal_path
from mrrope_gguf.gguf.pieces import Piece
from mrrope_gguf.gguf.source import Source
from tests import edits
from tests.edits import left_in, model, sha256, tensors, write, write_extension
from tests.filesystems import NEEDED, mounted
from tests.needs import cannot


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.gguf", model())


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
    assert not source.with_name("out.gguf").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("name", ["pipe", "link"])
@pytest.mark.parametrize("force", [True, False])
def test_a_pipe_or_device_is_never_replaced(source: Path, name: str, force: bool) -> None:
    os.mkfifo(source.with_name("pipe"))
    source.with_name("link").symlink_to("pipe")  # as /dev/stdout may be
    with pytest.raises(FileTrouble, match=f"{name}: this is not a regular file"):
        write_extension(source, source.with_name(name), force=force)
    assert source.with_name("pipe").is_fifo()
    assert source.with_name("link").is_symlink()
    assert left_in(source.parent) == {"source.gguf", "pipe", "link"}


@pytest.mark.parametrize("force", [True, False])
def test_no_new_file_comes_to_lie_beside_a_journal(source: Path, force: bool) -> None:
    out = source.with_name("out.gguf")
    journal_path(out).write_text("of an earlier file of that name")
    with pytest.raises(FileTrouble, match="changed in part") as error:
        write_extension(source, out, force=force)
    assert "mrrope revert" in error.value.fix
    assert left_in(source.parent) == {"source.gguf", "out.gguf.mrrope-journal"}


def test_a_read_only_temp_file_is_deleted_on_windows_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.unlink

    def unlink(path: Path) -> None:
        if not os.stat(path).st_mode & 0o200:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(path)

    def refuse(self: Plan, index: object) -> None:
        raise FileTrouble("not what was meant")

    source.chmod(0o444)
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(Plan, "check", refuse)
    with pytest.raises(FileTrouble, match="not what was meant"):
        write_extension(source, source.with_name("out.gguf"))
    assert left_in(source.parent) == {"source.gguf"}
    source.with_name("second name").hardlink_to(source)
    stage.delete(source.with_name("second name"))
    assert source.stat().st_mode & 0o777 == 0o444  # a mode is that of every name


def test_a_full_disk_is_foreseen(source: Path, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, megabytes=1) as place:
        (place / "fill").write_bytes(bytes((1 << 20) - 40960))
        with pytest.raises(FileTrouble, match="no room") as error:
            write_extension(source, place / "out.gguf")
        assert "bytes needed" in error.value.why
        assert "available" in error.value.why
        assert left_in(place) == {"fill"}


def test_a_disk_that_fills_up_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "require_room", lambda *args, **how: None)
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
        cannot("root, and chattr +i does not work here", NEEDED)
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
