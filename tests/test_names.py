"""Names at the limits: as long as a file system takes them, of many bytes a character, and none at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mrrope_gguf import FileTrouble, extend, fit, inspect, revert
from mrrope_gguf.gguf import journal, ranges
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.journal import Journal
from mrrope_gguf.gguf.names import LONGEST, journal_path, temp_path, unfinished_path
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.write import write_in_place
from tests import edits, tiny
from tests.edits import left_in, model, sha256, write, write_extension
from tests.filesystems import mounted

LONG = [
    "x" * 250 + ".gguf",
    "é" * 125 + ".gguf",
    "\U0001f600" * 62 + ".gguf",
    "a" + "日" * 83 + ".gguf",
    "x" * 231 + ".gguf",
]


def again(path: str | Path) -> object:
    return extend(path, scale=4)


@pytest.mark.parametrize("name", ["", ".", "..", "folder", "folder/"])
@pytest.mark.parametrize("verb", [inspect, fit, again, revert])
def test_a_directory_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Callable[[str], object], name: str
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileTrouble, match="a directory, not a GGUF file"):
        verb(name)


@pytest.mark.parametrize("name", ["m.gguf", *LONG, "not utf-8 \udcff.gguf", "\udcff" * 255])
def test_what_lies_beside_a_file_fits(name: str) -> None:
    path = Path("folder") / name
    for beside in (temp_path(path), journal_path(path), unfinished_path(journal_path(path))):
        assert beside.parent == path.parent
        assert len(os.fsencode(beside.name)) <= LONGEST
        beside.name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def test_long_names_that_begin_alike_have_journals_of_their_own() -> None:
    names = ["x" * 250 + end for end in ("a", "b", "bc")] + ["x" * 250]
    assert len({journal_path(Path(name)) for name in names}) == len(names)
    assert journal_path(Path("m.gguf")).name == "m.gguf.mrrope-journal"


@pytest.mark.skipif(sys.platform == "win32", reason="a whole path has at most 260 characters there")
@pytest.mark.parametrize("name", LONG)
def test_long_names_are_extended_inspected_and_reverted(tmp_path: Path, name: str) -> None:
    source = tiny.make(tmp_path / "source.gguf")
    before = sha256(source)
    done = extend(source, tmp_path / name, scale=4)
    assert inspect(done.path).stored is not None
    assert extend(done.path, scale=8, in_place=True).replaced
    revert(done.path, tmp_path / "back.gguf")
    revert(done.path)
    assert sha256(done.path) == sha256(tmp_path / "back.gguf") == before
    assert left_in(tmp_path) == {"source.gguf", name, "back.gguf"}


@pytest.mark.parametrize("name", LONG)
def test_a_long_name_cut_short_is_noticed_and_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def stop(fd: int, shift: int) -> None:
        ranges.shift_range(fd, shift)
        raise SystemExit

    with mounted("ext4", tmp_path) as place:
        path = write(place / name, model())
        before = sha256(path)
        monkeypatch.setattr(journal, "shift_range", stop)
        monkeypatch.setattr(Journal, "roll_back", lambda self, fd: None)
        with Source.open(path) as source, pytest.raises(SystemExit):
            write_in_place(edits.extended(Edit(source)))
        monkeypatch.undo()
        with pytest.raises(FileTrouble, match="cut short"):
            inspect(path)
        assert revert(path).how == "in-place recovery"
        assert sha256(path) == before


def test_a_file_system_of_short_names_has_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As eCryptfs, whose names end at 143 bytes: the journal's is then too long, and is not there."""
    too_long = tmp_path / ("x" * 300)
    for module in ("source", "inplace", "stage"):
        monkeypatch.setattr(f"mrrope_gguf.gguf.{module}.journal_path", lambda path: too_long)
    source = write(tmp_path / "m.gguf", model())
    done = write_extension(source, tmp_path / "new.gguf")
    revert(done.path)
    assert sha256(done.path) == sha256(source)


def test_a_journal_that_cannot_be_named_leaves_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted("ext4", tmp_path) as place:
        path = write(place / "m.gguf", model())
        before = sha256(path)
        monkeypatch.setattr(journal, "journal_path", lambda path: path.with_name("x" * 300))
        with Source.open(path) as source, pytest.raises(FileTrouble, match="cannot be changed") as error:
            write_in_place(edits.extended(Edit(source)))
        assert "shorter name" in error.value.fix
        assert sha256(path) == before
