"""Disks that are full, read-only or another one: model files, sessions and results on small real file systems."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import extend, revert
from mrrope_gguf.errors import FileTrouble, MrropeError
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.gguf.index import open_split
from mrrope_gguf.hand_over import link_or_copy
from mrrope_gguf.sessions.named import Named
from tests import tiny
from tests.edits import sha256
from tests.faults.injector import MODES
from tests.faults.operation import DONE, REFUSED, Met, contents
from tests.faults.operations import OPERATIONS
from tests.filesystems import NEEDED, mounted
from tests.needs import cannot

KINDS = ["ext4", "xfs", "btrfs"]
FULL = MODES["full disk"]
# bytes that are left
ROOMS = (0, 4096, 20_000, 60_000, 120_000, 250_000, 400_000)


@pytest.fixture(scope="module", params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of each kind."""
    kind: str = request.param
    with mounted(kind, tmp_path_factory.mktemp("disk"), megabytes={"ext4": 16}.get(kind)) as place:
        yield place


@contextmanager
def nearly_full(place: Path, room: int) -> Iterator[None]:
    """While it lasts, about `room` bytes can be written there."""
    filler = place / "filler"
    try:
        with open(filler, "wb", buffering=0) as file:
            block = bytes(1 << 20)
            while len(block) >= 4096:
                try:
                    while file.write(block) == len(block):
                        pass
                except OSError:
                    pass
                block = block[: len(block) // 2]
            with suppress(OSError):
                os.fsync(file.fileno())
            file.truncate(max(0, file.tell() - room))
        yield
    finally:
        filler.unlink(missing_ok=True)
        os.sync()


@pytest.mark.parametrize("name", ["extend", "extend-split", "in-place", "in-place-split", "revert"])
def test_a_full_disk(name: str, disk: Path) -> None:
    """At every size of what is left: refused and as it was, or done; the next run, with room, is done."""
    operation = OPERATIONS[name](disk / name)
    operation.prepare()
    operation.act()
    operation.finished()
    refused = 0
    for room in ROOMS:
        operation.prepare()
        with nearly_full(disk, room):
            try:
                operation.act()
                met = Met(DONE)
            except MrropeError as error:
                met, refused = Met(REFUSED, error.why), refused + 1
            assert met.how == DONE or "bytes" in met.said or "space" in met.said, met
            assert operation.look(met, FULL) == [], (room, met)
            assert [left for left in contents(operation.place) if left.startswith(".")] == [], (room, met)
        operation.again()
        assert operation.recovered() == [], (room, met)
    # an empty disk's worth of shared blocks or a header in place may need none
    assert refused >= (0 if name == "revert" else 1)
    shutil.rmtree(operation.place)


def again_and_again(write: Callable[[int], None]) -> None:
    for i in range(1, 2000):
        write(i)


def test_results_and_conversations_on_a_full_disk(disk: Path) -> None:
    """What was written stays, what could not be is one error, and with room it goes on."""
    place = disk / "saved"
    place.mkdir()
    log, words = RunLog(place / "results.jsonl"), ["x" * 900, "y" * 900]
    talk: dict[str, Any] = {"system": None, "created": 1.0, "tokens": 1, "documents": [], "pieces": []}
    talk.update(sampling={}, parts={}, messages=[{"role": "user", "content": "one " * 5000}])
    named = Named(place / "sessions" / "named", "talk")
    named.save(talk)
    log.add("0", {"words": words})
    with nearly_full(disk, 8192):
        with pytest.raises(FileTrouble, match="cannot be written"):
            again_and_again(lambda i: log.add(str(i), {"words": words}))
        with pytest.raises(FileTrouble, match="cannot be written"):
            again_and_again(lambda i: named.save({**talk, "pieces": ["z" * 100_000 * i]}))
        there = named.load()
        assert there is not None
        assert there["messages"] == talk["messages"]
    finished = log.runs()
    assert finished["0"] == {"words": words}
    log.add("last", {"words": words})
    named.save({**talk, "tokens": 7})
    named.close()
    assert list(log.runs()) == [*finished, "last"]
    assert not [name for name in contents(place) if Path(name).name.startswith(".")]
    shutil.rmtree(place)


def test_a_file_system_that_is_read_only(disk: Path) -> None:
    place = disk / "models"
    place.mkdir()
    path = tiny.make(place / "m.gguf")
    before = contents(place)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        for what in ({"dst": place / "new.gguf"}, {"in_place": True}):
            with pytest.raises(FileTrouble, match=r"cannot be (written|changed)") as error:
                extend(path, scale=4.0, **what)
            assert "Read-only" in error.value.why
        with pytest.raises(MrropeError):
            revert(path)
        assert contents(place) == before
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert extend(path, place / "new.gguf", scale=4.0).path.exists()
    shutil.rmtree(place)


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    place = tmp_path / "models"
    place.mkdir()
    path = tiny.make(place / "m.gguf")
    before = contents(place)
    place.chmod(0o555)
    if not os.geteuid() and subprocess.run(["chattr", "+i", str(place)], capture_output=True).returncode:
        cannot("root, and chattr +i does not work here", NEEDED)
    try:
        for what in ({"dst": place / "new.gguf"}, {"in_place": True}):
            with pytest.raises(FileTrouble, match="cannot be written") as error:
                extend(path, scale=4.0, **what)
            assert "permissions" in error.value.fix
        assert contents(place) == before
    finally:
        subprocess.run(["chattr", "-i", str(place)], check=False, capture_output=True)
        place.chmod(0o755)
    extend(path, scale=4.0, in_place=True)
    revert(path)
    assert contents(place) == before


@contextmanager
def bound(place: Path, elsewhere: Path) -> Iterator[Path]:
    """The same file system mounted a second time: st_dev is the same, and yet no name crosses over."""
    elsewhere.mkdir()
    if subprocess.run(["mount", "--bind", str(place), str(elsewhere)], capture_output=True).returncode:
        pytest.skip("mount --bind is not allowed here")
    try:
        yield elsewhere
    finally:
        subprocess.run(["umount", str(elsewhere)], check=True)


@pytest.mark.parametrize("to", [*KINDS, "tmpfs", "bind"])
def test_from_one_mount_to_another(to: str, tmp_path: Path) -> None:
    """No file is renamed or linked across: temp files lie beside what they become."""
    with ExitStack() as stack:
        here = stack.enter_context(mounted("ext4", tmp_path, megabytes=64))
        if to == "bind":
            (here / "inner").mkdir()
            there = stack.enter_context(bound(here / "inner", tmp_path / "bound"))
        else:
            (tmp_path / "to").mkdir()
            there = stack.enter_context(mounted(to, tmp_path / "to", megabytes=320 if to != "tmpfs" else 16))
        path, first = tiny.make(here / "m.gguf"), tiny.make(here / "s.gguf", split=3)
        before = contents(here)
        local = extend(path, here / "local.gguf", scale=4.0).path
        assert sha256(extend(path, there / "new.gguf", scale=4.0).path) == sha256(local)
        new = extend(first, there / "split.gguf", scale=4.0).path
        assert [sha256(one) for one in open_split(new)[1:]] == [sha256(one) for one in open_split(first)[1:]]
        back = revert(new, here / "back.gguf").path
        assert [sha256(one) for one in open_split(back)] == [sha256(one) for one in open_split(first)]
        copies, how = link_or_copy(first, there / "copies")
        assert how != "hardlink"
        assert [sha256(one) for one in copies] == [sha256(one) for one in open_split(first)]
        assert {name: digest for name, digest in contents(here).items() if name in before} == before
        assert not [name for name in (*contents(here), *contents(there)) if Path(name).name.startswith(".")]
