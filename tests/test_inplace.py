"""A model file changed in place: by which way, with what left alone, and whole again wherever it is cut short."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import revert
from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.gguf import inplace, journal, ranges
from mrrope_gguf.gguf.edit import Edit, Plan
from mrrope_gguf.gguf.inplace import recover
from mrrope_gguf.gguf.journal import Journal
from mrrope_gguf.gguf.names import journal_path
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.write import WriteReport, write_in_place, write_new
from tests import edits
from tests.edits import left_in, model, sha256, write
from tests.filesystems import NEEDED, mounted
from tests.needs import cannot


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("fs")) as place:
        yield place


@pytest.fixture
def file(ext4: Path) -> Iterator[Path]:
    """A model on ext4, alone in its directory."""
    directory = ext4 / "models"
    directory.mkdir()
    yield write(directory / "m.gguf", model())
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def extend(path: Path, **how: Any) -> WriteReport:
    with Source.open(path) as source:
        return write_in_place(edits.extended(Edit(source), **how))


def as_new(path: Path, directory: Path, **how: Any) -> str:
    """The sha256 of what extending into a new file makes."""
    with Source.open(path) as source:
        return sha256(write_new(edits.extended(Edit(source), **how), directory / "new.gguf", force=True).path)


@pytest.mark.parametrize("permute", [False, True])
def test_ext4_inserts_blocks_and_takes_them_away(file: Path, tmp_path: Path, permute: bool) -> None:
    before, expected = sha256(file), as_new(file, tmp_path, permute=permute)
    inode = file.stat().st_ino
    assert extend(file, permute=permute).how == "in-place insert"
    assert sha256(file) == expected
    assert file.stat().st_ino == inode
    assert revert(file).how == "in-place insert"
    assert sha256(file) == before
    assert left_in(file.parent) == {"m.gguf"}


def test_padding_is_enough_for_a_second_extension(file: Path) -> None:
    before = sha256(file)
    extend(file)
    size = file.stat().st_size
    assert extend(file, n_ctx=4096, tensor=False).how == "in-place padding"
    assert file.stat().st_size == size
    assert extend(file, n_ctx=512, permute=True).how == "in-place padding"
    revert(file)
    assert sha256(file) == before


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_where_blocks_can_be_shared_a_new_file_replaces_the_old(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path) as place:
        file = write(place / "m.gguf", model())
        before, inode = sha256(file), file.stat().st_ino
        with open(file, "rb") as held:  # who has the old one open keeps it
            assert extend(file, permute=True).how == "in-place replace"
            assert len(held.read()) != file.stat().st_size
        assert file.stat().st_ino != inode
        assert revert(file).how == "in-place replace"
        assert sha256(file) == before
        assert left_in(place) - {"lost+found"} == {"m.gguf"}


@pytest.mark.parametrize("number", ["EOPNOTSUPP", "EINVAL", "ENOSYS"])
def test_where_data_cannot_be_moved_it_is_copied(file: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    def refuse(*args: object) -> None:
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(journal, "shift_range", refuse)
    before = sha256(file)
    assert extend(file).how == "in-place replace"
    revert(file)
    assert sha256(file) == before
    assert left_in(file.parent) == {"m.gguf"}


def test_tmpfs_can_do_neither(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, megabytes=8) as place:
        file = write(place / "m.gguf", model())
        before = sha256(file)
        assert extend(file).how == "in-place replace"
        assert extend(file, n_ctx=512).how == "in-place padding"
        revert(file)
        assert sha256(file) == before


def test_where_there_are_no_leases_it_is_copied(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "lease", lambda fd: None)
    assert extend(file).how == "in-place replace"


def test_replaced_data_changes_in_place_too(file: Path) -> None:
    before = sha256(file)
    with Source.open(file) as source:
        edit = edits.extended(Edit(source))
        edit.replace_tensor("token_embd.weight", bytes(96 * 33 * 4))  # the first data: one piece with the header
        edit.replace_tensor("blk.1.attn_q.bias", bytes(128))
        assert write_in_place(edit).how == "in-place insert"
    with Source.open(file) as source:
        assert not any(source.current.tensor_bytes("token_embd.weight"))
        assert not any(source.current.tensor_bytes("blk.1.attn_q.bias"))
    revert(file)
    assert sha256(file) == before


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_file_in_use_is_refused(file: Path, how: str) -> None:
    before = sha256(file)
    with open(file, "rb") as held:
        view = mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ)
        if how == "open":
            view.close()
        else:
            held.close()
        with pytest.raises(FileTrouble, match="open or mapped in another program"):
            extend(file)
        view.close()
    assert sha256(file) == before
    assert left_in(file.parent) == {"m.gguf"}
    assert extend(file).how == "in-place insert"


def test_whoever_opens_the_file_meanwhile_waits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that is asked back sends a signal, which must not end us."""
    reader: list[subprocess.Popen[bytes]] = []
    real = ranges.shift_range

    def slow(fd: int, shift: int) -> None:
        command = "import sys; print(open(sys.argv[1], 'rb').read(8))"
        reader.append(subprocess.Popen([sys.executable, "-c", command, str(file)], stdout=subprocess.PIPE))
        with pytest.raises(subprocess.TimeoutExpired):
            reader[0].wait(0.5)
        real(fd, shift)

    monkeypatch.setattr(journal, "shift_range", slow)
    assert extend(file).how == "in-place insert"
    assert reader[0].communicate(timeout=20)[0].startswith(b"b'GGUF")


def test_a_file_with_two_names_is_refused(file: Path) -> None:
    file.with_name("other.gguf").hardlink_to(file)
    before = sha256(file)
    with pytest.raises(Refused, match="2 names"):
        extend(file)
    assert sha256(file) == before


def test_a_hub_cache_file_is_refused(file: Path, tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    write(blob, model())
    link = tmp_path / "model.gguf"
    link.symlink_to(blob)
    for path in (link, blob):
        with pytest.raises(Refused, match="Hugging Face cache"):
            extend(path)
    file.with_name("link.gguf").symlink_to(file)
    with pytest.raises(Refused, match="symbolic link"):
        extend(file.with_name("link.gguf"))


def test_a_file_we_may_not_write_is_refused(file: Path) -> None:
    if os.geteuid():
        file.chmod(0o444)
    elif subprocess.run(["chattr", "+i", str(file)], capture_output=True).returncode:
        cannot("root, and chattr +i does not work here", NEEDED)
    try:
        with pytest.raises(FileTrouble, match="cannot be changed"):
            extend(file)
    finally:
        subprocess.run(["chattr", "-i", str(file)], check=False, capture_output=True)
    assert left_in(file.parent) == {"m.gguf"}


def test_no_room_for_a_copy_is_said(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, megabytes=1) as place:
        file = write(place / "m.gguf", model(n_vocab=40000))
        before = sha256(file)
        with pytest.raises(FileTrouble, match=r"no room|cannot be changed") as error:
            extend(file)
        assert "available" in error.value.why
        assert sha256(file) == before
        assert left_in(place) == {"m.gguf"}


@pytest.mark.parametrize("foreseen", [True, False])
def test_no_room_for_a_journal_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool) -> None:
    if not foreseen:
        monkeypatch.setattr(journal, "require_room", lambda *args: None)
    with mounted("ext4", tmp_path, megabytes=4) as place:
        file = write(place / "m.gguf", model(n_vocab=40000))
        before = sha256(file)
        with open(place / "fill", "wb", buffering=0) as fill, suppress(OSError):
            while fill.write(bytes(4096)):
                pass
        with pytest.raises(FileTrouble, match="no room" if foreseen else "cannot be changed") as error:
            extend(file)
        assert ("0 available" if foreseen else "No space left") in error.value.why
        assert sha256(file) == before
        assert left_in(place) == {"m.gguf", "fill", "lost+found"}


# -- cut short ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["extend", "again", "revert", "recover"])
def test_killed_at_any_step_it_comes_back_whole(file: Path, what: str) -> None:
    command = [sys.executable, "-m", "tests.kill_steps", str(file), what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    first, *steps = map(json.loads, done.stdout.splitlines())
    before = first["before"]
    assert steps[-1]["finished"]
    assert len(steps) > (5 if what == "recover" else 10)
    final = steps[-1]["sha256"]
    assert (final == before) == (what == "recover")
    for step in steps[:-1]:
        whole = step["sha256"] in (before, final)
        if step["opened"] == "opens":  # nothing pending: untouched, or done
            assert whole, step
            assert not step["recovered"], step
        else:
            assert "mrrope revert" in step["opened"]
            assert step["recovered"], step
        assert step["after"] == (before if step["recovered"] else step["sha256"]), step
        assert step["left"] == ["m.gguf"], step
    assert any(step["sha256"] not in (before, final) for step in steps)  # some were cut short in the middle


def test_what_is_needed_is_on_the_disk_before_it_is_relied_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killing a process shows the order of writes, not what a power cut would have lost."""
    events: list[str] = []

    def watch(owner: Any, name: str, told: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def watched(*args: Any) -> Any:
            events.append(told(*args))
            return real(*args)

        monkeypatch.setattr(owner, name, watched)

    def opened(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}").replace(str(file), "FILE")

    watch(os, "fsync", lambda fd: f"sync {opened(fd)}")
    watch(os, "replace", lambda a, b: f"name {b.name}")
    watch(os, "pwrite", lambda fd, data, at: f"write {opened(fd)}")
    watch(journal, "shift_range", lambda fd, shift: "move")
    watch(Journal, "remove", lambda self: "forget")

    def check(steps: list[str]) -> None:
        moved, forgotten = steps.index("move"), steps.index("forget")
        named = steps.index("name m.gguf.mrrope-journal") if "name m.gguf.mrrope-journal" in steps else -1
        written = [i for i, step in enumerate(steps) if step == "write FILE"]
        assert named < moved < written[0]
        assert written[-1] < len(steps) - 1 - steps[::-1].index("sync FILE") < forgotten
        if named >= 0:
            assert "sync FILE.mrrope-journal.new" in steps[:named]
            assert f"sync {file.parent}" in steps[named:moved]

    extend(file, permute=True)
    check(events)
    events.clear()
    monkeypatch.setattr(Plan, "check", refuse_plan)
    revert(file)  # the other way round
    check(events)
    events.clear()
    with pytest.raises(FileTrouble, match="not what was meant"):
        extend(file)
    check(events[len(events) - 1 - events[::-1].index("move") :])  # the way back


def refuse_plan(self: Plan, index: object) -> None:
    raise FileTrouble("not what was meant")


def cut_short(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An in-place change that ended between moving the data and writing the header."""
    real = ranges.shift_range

    def stop(fd: int, shift: int) -> None:
        real(fd, shift)
        raise SystemExit

    monkeypatch.setattr(journal, "shift_range", stop)
    monkeypatch.setattr(Journal, "roll_back", lambda self, fd: None)
    with pytest.raises(SystemExit):
        extend(file, permute=True)
    monkeypatch.undo()


def test_revert_recovers_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sha256(file)
    cut_short(file, monkeypatch)
    with pytest.raises(FileTrouble, match="cut short") as error:
        Source.open(file)
    assert f"mrrope revert {file}" in error.value.fix
    report = revert(file)
    assert (report.how, report.size) == ("in-place recovery", file.stat().st_size)
    assert sha256(file) == before
    assert not recover(file)


def test_an_error_on_the_way_is_undone_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sha256(file)

    monkeypatch.setattr(Plan, "check", refuse_plan)
    with pytest.raises(FileTrouble, match="not what was meant"):
        extend(file)
    assert sha256(file) == before
    assert left_in(file.parent) == {"m.gguf"}


def test_a_damaged_journal_is_not_followed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(file, monkeypatch)
    now = sha256(file)
    with open(journal_path(file), "r+b") as handle:
        handle.seek(5000)
        handle.write(b"?")
    with pytest.raises(FileTrouble, match="does not bring its file back"):
        revert(file)
    assert sha256(file) == now
    assert journal_path(file).exists()


@pytest.mark.parametrize("harm", ["data", "size"])
def test_a_file_changed_since_is_noticed(file: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    cut_short(file, monkeypatch)
    with open(file, "r+b") as handle:
        handle.seek(-1000 if harm == "data" else 0, os.SEEK_END)
        handle.write(b"not what was there")
    with pytest.raises(FileTrouble, match="does not bring its file back"):
        revert(file)
    assert journal_path(file).exists()


def test_recovery_waits_for_nobody(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(file, monkeypatch)
    with open(file, "rb"), pytest.raises(FileTrouble, match="open or mapped"):
        recover(file)
    assert recover(file)
