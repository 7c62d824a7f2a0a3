"""Split models: shard 1 is rewritten, the others are linked, and there are all shards of a new model or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mrrope_gguf import revert
from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.gguf import stage, together
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.index import open_gguf, open_split
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.stage import Staged
from mrrope_gguf.gguf.write import write_in_place, write_new
from tests import edits
from tests.edits import HEADS, hashes, left_in, sha256, split_model, tensors, write_extension
from tests.filesystems import mounted


def test_only_shard_1_is_rewritten(tmp_path: Path) -> None:
    shards = split_model(tmp_path)
    report = write_extension(shards[1], tmp_path / "new-00001-of-00003.gguf")  # named by any shard
    new = open_split(report.path)
    assert report.size == sum(path.stat().st_size for path in new)
    assert [path.name for path in new] == [f"new-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert all(os.path.samefile(a, b) for a, b in zip(shards[1:], new[1:], strict=True))
    with open_gguf(new[0]) as index:
        assert index.get("split.tensors.count") == 14
    revert(new[2], tmp_path / "back.gguf")
    back = [tmp_path / f"back-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert hashes(back) == hashes(shards)


def test_rows_are_reordered_in_every_shard(tmp_path: Path) -> None:
    shards = split_model(tmp_path)
    before = hashes(shards)
    with Source.open(shards[0]) as opened:
        edit = edits.extended(Edit(opened))
        for i in range(3):
            edit.permute_rows(f"blk.{i}.attn_q.weight", HEADS)
        report = write_new(edit, tmp_path / "new.gguf")
    new = open_split(report.path)
    assert not any(os.path.samefile(a, b) for a, b in zip(shards, new, strict=True))
    for old_shard, new_shard in zip(shards[1:], new[1:], strict=True):
        old, now = tensors(old_shard), tensors(new_shard)
        assert {name for name in old if old[name] != now[name]} == {n for n in old if "attn_q.weight" in n}
    with Source.open(new[0]) as opened:  # extended again, without moving rows: as if from the original
        again = open_split(write_new(edits.extended(Edit(opened)), tmp_path / "again.gguf").path)
    assert hashes(again[1:]) == before[1:]
    assert hashes([revert(new[0]).path, *new[1:]]) == before


def test_shards_that_cannot_be_linked_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = split_model(tmp_path)

    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    new = open_split(write_extension(shards[0], tmp_path / "new.gguf").path)
    assert hashes(new[1:]) == hashes(shards[1:])
    assert not os.path.samefile(new[1], shards[1])


@pytest.mark.parametrize("force", [True, False])
def test_all_shards_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    shards = split_model(tmp_path)
    if force:
        for i in (1, 2, 3):
            (tmp_path / f"new-{i:05d}-of-00003.gguf").write_text(f"precious {i}")
    before = {path.name: sha256(path) for path in tmp_path.iterdir()}
    calls: list[Path] = []
    real = stage.publish

    def fail_at_the_last(one: Staged, *, force: bool) -> None:
        calls.append(one.dst)
        if len(calls) == 3:
            raise FileTrouble(f"{one.dst}: the file cannot be written", why="the disk broke")
        real(one, force=force)

    monkeypatch.setattr(together, "publish", fail_at_the_last)
    with pytest.raises(FileTrouble, match="cannot be written"):
        write_extension(shards[0], tmp_path / "new.gguf", force=force)
    assert len(calls) == 3
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == before


def test_one_existing_shard_is_enough_to_refuse(tmp_path: Path) -> None:
    shards = split_model(tmp_path)
    (tmp_path / "new-00003-of-00003.gguf").write_text("precious")
    with pytest.raises(FileTrouble, match=r"new-00003-of-00003\.gguf: the file exists"):
        write_extension(shards[0], tmp_path / "new.gguf")
    assert len(left_in(tmp_path)) == 4


def test_shards_linked_once_are_linked_again_under_force(tmp_path: Path) -> None:
    """The untouched shards of the result are the source's own, which is no reason to refuse."""
    shards = split_model(tmp_path)
    before = hashes(shards)
    write_extension(shards[0], tmp_path / "new.gguf")
    with pytest.raises(FileTrouble, match="exists"):
        write_extension(shards[0], tmp_path / "new.gguf")
    again = open_split(write_extension(shards[0], tmp_path / "new.gguf", force=True, tensor=False).path)
    revert(again[0], tmp_path / "back.gguf")
    back = open_split(revert(again[0], tmp_path / "back.gguf", force=True).path)
    assert hashes(back) == hashes(shards) == before
    assert left_in(tmp_path) == {path.name for path in [*shards, *again, *back]}
    with pytest.raises(FileTrouble, match="the same file"):
        write_extension(shards[0], shards[0], force=True)


@pytest.mark.parametrize("name", [".", "folder"])
def test_a_directory_is_no_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shards = split_model(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileTrouble, match="this is a directory"):
        write_extension(shards[0], Path(name))
    assert len(left_in(tmp_path)) == 4


def test_a_name_too_long_is_one_error(tmp_path: Path) -> None:
    shards = split_model(tmp_path)
    for name in ("x" * 300, "x" * 250):  # the second is too long with its ending alone
        with pytest.raises(FileTrouble, match="cannot be written"):
            write_extension(shards[0], tmp_path / name)
    assert len(left_in(tmp_path)) == 3


def test_a_change_in_place_counts_every_shard(tmp_path: Path) -> None:
    shards = split_model(tmp_path)
    with Source.open(shards[0]) as source:
        report = write_in_place(edits.extended(Edit(source)))
    assert report.size == sum(path.stat().st_size for path in shards)
    assert revert(shards[0]).size == sum(path.stat().st_size for path in shards)


def test_an_untouched_original_has_nothing_to_revert(tmp_path: Path) -> None:
    with pytest.raises(Refused):
        revert(split_model(tmp_path)[1])


@pytest.mark.parametrize("rows", [False, True])
def test_split_models_change_in_place(tmp_path: Path, rows: bool) -> None:
    with mounted("ext4", tmp_path) as place:
        directory = place / "split"
        directory.mkdir()
        shards = split_model(directory)
        before, inode = hashes(shards), shards[1].stat().st_ino
        with Source.open(shards[1]) as source:
            edit = edits.extended(Edit(source))
            if rows:
                edit.permute_rows("blk.2.attn_q.weight", edits.HEADS)
            report = write_in_place(edit)
        assert report.path == shards[0]
        assert report.how == ("in-place replace" if rows else "in-place insert")
        assert [a == b for a, b in zip(hashes(shards), before, strict=True)] == [False, True, not rows]
        revert(shards[2])
        assert hashes(shards) == before
        assert shards[1].stat().st_ino == inode
        assert left_in(directory) == {path.name for path in shards}
