"""A model of 400 GB: what is asked of it takes 64 MiB of memory and reads and writes what a model of 4 GB does.

The files are sparse, with a real header (5003 tensors, 250,000 tokens and as many merges, 13 MB). Costs are counted,
not timed: bytes through system calls, pages brought in. Times are in benchmarks/big.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mrrope_gguf.gguf.index import open_split
from tests import big_gguf
from tests.big_gguf import GB, MIB, Run, digest, measured
from tests.edits import left_in
from tests.filesystems import mounted

SMALL, BIG = 4 * GB, 400 * GB
MEMORY = 64 * MIB
KINDS = ("ext4", "xfs", "btrfs")


@cache
def idle() -> Run:
    """An interpreter that does nothing."""
    return measured()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with mounted(request.param, tmp_path, megabytes=512) as directory:
        yield directory


def done(*args: str | Path) -> Run:
    """A run that succeeds within the memory promised."""
    run = measured(*args)
    assert run.code == 0, run.err
    assert run.memory - idle().memory <= MEMORY, args
    return run


def life(path: Path) -> dict[str, Run]:
    """All that is done with a model, in place; it must be the same afterwards."""
    before = digest(path)
    runs = {
        "fit": done("fit", path),
        "extend": done("extend", path, "--in-place", "--scale", "4"),
        "inspect": done("inspect", path),
    }
    assert digest(path) != before
    runs["revert"] = done("revert", path)
    assert digest(path) == before
    assert left_in(path.parent) - {"lost+found"} == {path.name}
    return runs


def test_what_400_gb_cost_4_gb_cost_too(place: Path) -> None:
    costs = []
    for size in (SMALL, BIG):
        path = big_gguf.write(place / "m.gguf", size)
        costs.append(life(path))
        path.unlink()
    small, big = costs
    for what, run in big.items():
        assert run.read <= small[what].read * 1.01 + 4096, what
        assert run.written <= small[what].written * 1.01 + 4096, what
        assert run.faults <= small[what].faults * 1.1 + 100, what
        assert run.written < 64 * MIB, what


def test_a_new_file_shares_the_blocks_or_needs_the_room(place: Path) -> None:
    """Where blocks are shared, holes are too; elsewhere every byte counts, and nothing is written in vain."""
    path = big_gguf.write(place / "m.gguf", BIG)
    before = digest(path)
    run = measured("extend", path, place / "new.gguf", "--scale", "4")
    if place.name == "ext4":
        assert run.code == 1
        assert "no room" in run.err
        assert f"{path.stat().st_size / 1e6 // 1000:.0f}" in run.err
        assert run.written < 4096
        assert left_in(place) - {"lost+found"} == {"m.gguf"}
        return
    assert run.code == 0, run.err
    assert run.memory - idle().memory <= MEMORY
    assert run.written < MIB
    assert (place / "new.gguf").stat().st_blocks * 512 < 64 * MIB
    done("revert", place / "new.gguf", place / "back.gguf")
    assert digest(place / "back.gguf") == before


@pytest.mark.parametrize("place", ["ext4"], indirect=True)
def test_a_hundred_shards(place: Path) -> None:
    shards = big_gguf.write_split(place, 100, BIG)
    before, names = [digest(shard) for shard in shards], left_in(place)
    assert sum(shard.stat().st_size for shard in shards) > 0.99 * BIG
    done("fit", shards[0])
    done("extend", shards[99], "--in-place", "--scale", "512")
    done("inspect", shards[50])
    assert [digest(shard) == was for shard, was in zip(shards, before, strict=True)] == [False] + [True] * 99
    done("revert", shards[42])
    assert ([digest(shard) for shard in shards], left_in(place)) == (before, names)
    new = done("extend", shards[0], place / "new.gguf", "--scale", "4")
    assert new.written < 64 * MIB
    assert all(
        a.samefile(b) for a, b in zip(shards[1:], open_split(place / "new-00001-of-00100.gguf")[1:], strict=True)
    )
    done("revert", place / "new-00007-of-00100.gguf", place / "back.gguf")
    assert [digest(shard) for shard in open_split(place / "back-00001-of-00100.gguf")] == before


def test_more_shards_than_a_shell_lets_one_open(tmp_path: Path) -> None:
    """Each is mapped and locked: 300 of them need more descriptors than macOS gives (256), and one asks for more."""
    shards = big_gguf.write_split(tmp_path, 300, BIG)
    before = digest(shards[0])

    def run(limit: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", f'ulimit {limit} 128 && exec "$@"', "bash", sys.executable, "-m", "mrrope_gguf", *args]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    refused = run("-n", "extend", str(shards[7]), "--in-place", "--scale", "4")  # the hard limit too
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 3)
    assert "ulimit -n" in refused.stderr
    assert digest(shards[0]) == before
    assert run("-Sn", "extend", str(shards[7]), "--in-place", "--scale", "4").returncode == 0
    assert run("-Sn", "revert", str(shards[7])).returncode == 0
    assert digest(shards[0]) == before


def test_shards_that_do_not_all_fit_are_not_begun(tmp_path: Path) -> None:
    """The first ones would fit where the last does not: the room for all is asked for first."""
    shards = big_gguf.write_split(tmp_path, 100, BIG)
    with mounted("tmpfs", tmp_path, megabytes=64) as elsewhere:
        run = measured("extend", shards[0], elsewhere / "new.gguf", "--scale", "4")
        assert run.code == 1
        assert "no room for these files" in run.err
        assert run.written < 4096
        assert not left_in(elsewhere)


@pytest.mark.parametrize(("place", "where"), [("ext4", "in place"), ("btrfs", "beside")], indirect=["place"])
def test_rows_that_do_not_fit_are_not_begun(place: Path, where: str) -> None:
    """--portable moves the rows of q and k, 3 GB here on 512 MB: those are written anew where the rest is shared."""
    path = big_gguf.write(place / "m.gguf", SMALL, "qwen2", n_layer=20)
    before, names = digest(path), left_in(place)
    dst = ["--in-place"] if where == "in place" else [place / "new.gguf"]
    run = measured("extend", path, *dst, "--portable", "--scale", "4")
    assert run.code == 1
    assert "no room" in run.err
    assert run.written < 4096
    assert (digest(path), left_in(place)) == (before, names)


@pytest.mark.hard
@pytest.mark.parametrize("place", ["ext4", "xfs"], indirect=True)
def test_rows_move_within_the_same_memory(place: Path) -> None:
    """q and k of one layer, 151 MB, out of 400 GB."""
    path = big_gguf.write(place / "m.gguf", BIG, "qwen2", n_layer=1)
    before = digest(path)
    run = done("extend", path, "--in-place", "--portable", "--scale", "4")
    assert run.written < 450 * MIB  # a journal of them, and themselves
    done("inspect", path)
    done("revert", path)
    assert digest(path) == before


@pytest.mark.hard
def test_blocks_that_are_really_there(tmp_path: Path) -> None:
    """Every block of 400 GB allocated, in an image of 480 GB that is itself sparse: thousands of extents move."""
    with mounted("ext4", tmp_path, megabytes=480_000) as place:
        path = big_gguf.write(place / "m.gguf", BIG)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        assert path.stat().st_blocks * 512 >= 0.99 * BIG
        assert max(run.written for run in life(path).values()) < 64 * MIB
