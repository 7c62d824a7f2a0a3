"""Shards that get their names together: the journal of it, who may follow it, and what a sweep leaves alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrrope_gguf import extend, revert
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf import stage, together
from mrrope_gguf.gguf.inplace import recover
from mrrope_gguf.gguf.leftover import sweep
from mrrope_gguf.gguf.names import journal_path, temp_path
from mrrope_gguf.gguf.together import MAGIC, recover_set
from tests import tiny
from tests.faults.operation import contents, sha256

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and modes of POSIX")
FIRST, SECOND, OTHERS = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n-00001-of-00002.gguf"


def journal(folder: Path, moves: list[list[object]], name: str = FIRST) -> Path:
    text = json.dumps(moves).encode()
    path = journal_path(folder / name)
    path.write_bytes(MAGIC + hashlib.sha256(text).digest() + text)
    path.chmod(0o600)
    return path


def test_a_set_that_was_cut_short_is_put_back(tmp_path: Path) -> None:
    """Shard 1 was named already, what it replaced is aside; shard 2 was not; shard 3 is new."""
    names = [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    moves = [[f".{name}.0000000{i}.tmp", f".{name}.0000000{i}.old", name, i < 2] for i, name in enumerate(names)]
    for name, data in {names[0]: "new 1", names[1]: "old 2", names[2]: "new 3"}.items():
        (tmp_path / name).write_text(data)
    (tmp_path / str(moves[0][1])).write_text("old 1")
    (tmp_path / str(moves[1][0])).write_text("new 2")
    text = json.dumps(moves).encode()
    path = journal_path(tmp_path / names[0])
    path.write_bytes(MAGIC + hashlib.sha256(text).digest() + text)
    path.chmod(0o600)
    assert recover_set(tmp_path / names[0])
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {names[0]: "old 1", names[1]: "old 2"}


@pytest.mark.parametrize(
    "move",
    [
        [".m-00001-of-00002.gguf.01234567.tmp", "../../etc/passwd", FIRST, True],
        [".bashrc", ".m-00001-of-00002.gguf.01234567.old", FIRST, True],
        [".m-00001-of-00002.gguf.01234567.tmp", ".m-00001-of-00002.gguf.01234567.old", "precious", True],
        [".m-00001-of-00002.gguf.01234567.tmp", ".m-00001-of-00002.gguf.01234567.old", FIRST, "yes"],
        [1, 2, 3, True],
        [FIRST],
        [".thesis.odt.01234567.tmp", ".thesis.odt.01234567.old", "thesis.odt", False],
        [".thesis.odt.01234567.tmp", ".thesis.odt.01234567.old", "thesis.odt", True],
        [f".{FIRST}.01234567.tmp", f".{FIRST}.89abcdef.old", FIRST, True],
        [f".{FIRST}.01234567.tmp", f".{FIRST}.01234567.tmp", FIRST, True],
        [f".{FIRST}.01234567.old", f".{FIRST}.01234567.old", FIRST, True],
        [f".{SECOND}.01234567.tmp", f".{SECOND}.01234567.old", FIRST, True],
        [f".{OTHERS}.01234567.tmp", f".{OTHERS}.01234567.old", OTHERS, False],
        [f".{SECOND}.01234567.tmp", f".{SECOND}.01234567.old", [SECOND], False],
        [f".{SECOND}.01234567.tmp", f".{SECOND}.01234567.old", SECOND, False],
    ],
)
def test_a_journal_that_names_other_files_is_not_followed(tmp_path: Path, move: list[object]) -> None:
    """Nor is one that names a file twice."""
    for name in (FIRST, SECOND, OTHERS, ".bashrc", "precious", "thesis.odt", ".thesis.odt.01234567.old"):
        (tmp_path / name).write_text(name)
    journal(tmp_path, [[f".{SECOND}.01234567.tmp", f".{SECOND}.01234567.old", SECOND, True], move])
    before = contents(tmp_path)
    with pytest.raises(FileTrouble, match="damaged, so it is not followed"):
        recover_set(tmp_path / FIRST)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["m.gguf", SECOND, "m-00001-of-00001.gguf", FIRST])
def test_only_the_first_of_several_shards_has_such_a_journal(tmp_path: Path, name: str) -> None:
    """Of the right name it lists all shards, or at least two."""
    (tmp_path / name).write_text("precious")
    journal(tmp_path, [[f".{name}.01234567.tmp", f".{name}.01234567.old", name, False]], name)
    before = contents(tmp_path)
    with pytest.raises(FileTrouble, match="damaged, so it is not followed"):
        recover(tmp_path / name)
    assert contents(tmp_path) == before


def test_a_new_split_model_deletes_nothing_for_a_forged_journal(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    first = tiny.make(tmp_path / "src" / "m.gguf", split=2)
    (tmp_path / "thesis.odt").write_text("precious")
    new = [f".{FIRST}.01234567.tmp", f".{FIRST}.01234567.old", FIRST, False]
    journal(tmp_path, [new, [".thesis.odt.01234567.tmp", ".thesis.odt.01234567.old", "thesis.odt", False]])
    with pytest.raises(FileTrouble, match="damaged, so it is not followed"):
        extend(first, tmp_path / "m.gguf", scale=4.0)
    assert (tmp_path / "thesis.odt").read_text() == "precious"


@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_links_under_a_sets_names_are_put_back_as_links(tmp_path: Path, target: str) -> None:
    """They are names like others: what they lead to is neither read nor changed."""
    (tmp_path / "victim").write_text("mine")
    moves: list[list[object]] = [
        [f".{name}.01234567.tmp", f".{name}.01234567.old", name, name == FIRST] for name in (FIRST, SECOND)
    ]
    for name in (f".{FIRST}.01234567.old", FIRST, f".{SECOND}.01234567.tmp", SECOND):
        (tmp_path / name).symlink_to(target)
    journal(tmp_path, moves)
    assert recover_set(tmp_path / FIRST)
    assert contents(tmp_path) == {"victim": sha256(tmp_path / "victim")} | (
        {FIRST: sha256(tmp_path / "victim"), SECOND: sha256(tmp_path / "victim")} if target == "victim" else {}
    )
    assert sorted(os.listdir(tmp_path)) == [FIRST, SECOND, "victim"]  # shard 2 is another's: its temp has not that name
    assert os.readlink(tmp_path / FIRST) == target


def test_a_damaged_journal_is_not_followed(tmp_path: Path) -> None:
    path = journal(tmp_path, [[f".{FIRST}.01234567.tmp", f".{FIRST}.01234567.old", FIRST, True]])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileTrouble, match="damaged"):
        recover_set(tmp_path / FIRST)


def test_a_journal_that_others_may_write_is_not_followed(tmp_path: Path) -> None:
    path = journal(tmp_path, [[f".{FIRST}.01234567.tmp", f".{FIRST}.01234567.old", FIRST, True]])
    path.chmod(0o666)
    with pytest.raises(FileTrouble, match="not ours"):
        recover_set(tmp_path / FIRST)


def test_the_journal_of_a_living_process_is_waited_for(tmp_path: Path) -> None:
    first = tiny.make(tmp_path / "m.gguf", split=2)
    path = journal(tmp_path, [[f".{FIRST}.01234567.tmp", f".{FIRST}.01234567.old", FIRST, True]])
    (tmp_path / f".{FIRST}.01234567.old").write_text("what it replaces")
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = contents(tmp_path)
        for again in (lambda: revert(first), lambda: extend(first, scale=4.0, in_place=True)):
            with pytest.raises(FileTrouble, match="another process is writing this model"):
                again()
        with pytest.raises(FileTrouble, match="cut short"):
            extend(first, tmp_path / "new.gguf", scale=4.0)
        assert contents(tmp_path) == before
        holder.communicate("\n")


def test_without_hard_links_too_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT: what is replaced is renamed, and comes back."""
    first = tiny.make(tmp_path / "m.gguf", "qwen2", split=3)
    before, named = contents(tmp_path), list[str]()
    real = stage.publish

    def no_links(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def fail_at_the_last(one: stage.Staged, *, force: bool) -> None:
        named.append(one.dst.name)
        if len(named) == 3:
            raise FileTrouble("the disk broke", why="it did", fix="none")
        real(one, force=force)

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as broken:
        broken.setattr(together, "publish", fail_at_the_last)
        with pytest.raises(FileTrouble, match="the disk broke"):
            extend(first, scale=4.0, rendering="portable", in_place=True)
    assert contents(tmp_path) == before
    extend(first, scale=4.0, rendering="portable", in_place=True)
    assert contents(tmp_path) != before
    revert(first)
    assert contents(tmp_path) == before


def test_a_sweep_leaves_what_is_in_use(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    dst = tmp_path / "new.gguf"
    dead, living, other = temp_path(dst), temp_path(dst), temp_path(tmp_path / "other.gguf")
    replaced = dead.with_suffix(".old")
    for path in (dead, living, other, replaced, tmp_path / ".new.gguf.tmp"):
        path.write_text(path.name)
    with open(living) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep(dst)
        assert {path.name for path in tmp_path.iterdir()} == {living.name, other.name, replaced.name, ".new.gguf.tmp"}
        sweep(dst, replaced=True)
        assert not replaced.exists()
        assert living.exists()
    os.symlink(other, dead)  # a link of somebody's is no file of ours
    sweep(dst)
    assert other.exists()
    assert dead.is_symlink()
