"""Saved states where processes die, meet, and disks are full or read-only: time may be lost, nothing else is."""

from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.sessions.fingerprint import fingerprint
from mrrope_gguf.sessions.memory import Memory
from mrrope_gguf.sessions.store import Store
from tests.filesystems import mounted
from tests.patched import ROOT, run
from tests.session_chat import left_over, open_small, states
from tests.session_states import TEXT, fresh, keep, next_token, reader, refused

pytestmark = pytest.mark.engine


def test_killed_at_any_moment_it_holds_what_it_held(llm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keep(llm, folder, TEXT[:200])
    memory = Memory(llm)
    memory.clear()
    memory.read(TEXT[:250])
    source = folder.parent / "llama.bin"
    memory.save(str(source))
    mark, wanted = fingerprint(llm), before.read_bytes()
    code = "import pickle, sys; from tests.session_chat import fuse; fuse(*pickle.load(sys.stdin.buffer))"
    steps = 0
    for n in range(1, 60):
        given = pickle.dumps((n, folder, source, TEXT[:250], dict(mark.parts)))
        done = subprocess.run([sys.executable, "-c", code], input=given, cwd=ROOT, capture_output=True, check=False)
        assert before.read_bytes() == wanted
        found = Store(folder, note=pytest.fail).find(mark, TEXT, more_than=0, n_ctx=2048)
        assert [one.usable for one in found] in ([200], [250, 200])
        if done.returncode == 7:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        steps += 1
        for path in states(folder):
            if path != before:
                assert refused(path, (folder / "key").read_bytes()) == ""
                path.unlink()
    assert steps >= 6
    assert len(left_over(folder)) >= 2
    monkeypatch.setattr("mrrope_gguf.sessions.store._STALE", -1.0)
    keep(llm, folder, TEXT[:30])
    assert left_over(folder) == []


def test_what_another_process_is_writing_stays(llm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    keep(llm, folder, TEXT[:30])
    monkeypatch.setattr("mrrope_gguf.sessions.store._STALE", -1.0)
    mine = folder / "states" / "x"
    mine.mkdir()
    with (mine / ".a.tmp").open("w") as busy, (mine / ".b.tmp").open("w"):
        fcntl.flock(busy, fcntl.LOCK_EX)
        keep(llm, folder, TEXT[:31])
    assert left_over(folder) == [".a.tmp"]


def work(model: Path, folder: Path, seed: int) -> list[tuple[int, int]]:
    """Save and restore in turns; (what was restored, the next token) each time."""
    llm, told = open_small(model), []
    for turn in range(6):
        tokens = [*TEXT[: 120 + 20 * ((turn + seed) % 4)], 7 + (turn + seed) % 3]
        one = reader(llm, folder)
        one.store = Store(folder, limit=90_000, note=one._note)
        one.bring(tokens)
        told.append((one.last.restored, next_token(llm)[0]))
        assert one.save()
    llm.close()
    return told


def test_two_processes_at_once(model: Path, llm: Any, folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        told = [job.result() for job in [pool.submit(run, work, model, folder, seed, lib=None) for seed in (0, 1)]]
    for seed, turns in enumerate(told):
        for turn, (_, token) in enumerate(turns):
            tokens = [*TEXT[: 120 + 20 * ((turn + seed) % 4)], 7 + (turn + seed) % 3]
            assert token == fresh(llm, tokens)[0]
    assert any(restored for turns in told for restored, _ in turns)
    assert left_over(folder) == []
    key = (folder / "key").read_bytes()
    assert {refused(path, key) for path in states(folder)} == {""}
    assert sum(path.stat().st_size for path in states(folder)) <= 90_000


def test_a_state_that_goes_between_finding_and_reading(llm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process needed the room: no word about it, the next best is taken."""
    keep(llm, folder, TEXT[:100])
    best = keep(llm, folder, TEXT[:200])
    find = Store.find

    def found_and_gone(self: Store, *args: Any, **kwargs: Any) -> Any:
        found = find(self, *args, **kwargs)
        best.unlink()
        return found

    monkeypatch.setattr(Store, "find", found_and_gone)
    one = reader(llm, folder)
    one.bring(TEXT[:300])
    assert (one.last.restored, one.last.read) == (100, 200)


def goes_on(llm: Any, folder: Path) -> str:
    """What a reader that cannot save says; what it reads is right all the same."""
    notes = list[str]()
    one = reader(llm, folder, notes)
    assert one.bring(TEXT[:300])
    assert not one.save()
    assert next_token(llm)[0] == fresh(llm, TEXT[:300])[0]
    assert len(set(notes)) == 1
    assert "the conversation goes on" in notes[0]
    return notes[0]


def test_a_place_that_cannot_be(llm: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in goes_on(llm, tmp_path / "file" / "sessions")


def test_a_read_only_disk_still_restores(llm: Any, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, megabytes=4) as disk:
        keep(llm, disk / "sessions", TEXT[:200])
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "Read-only file system" in goes_on(llm, disk / "sessions")
        again = reader(llm, disk / "sessions")
        again.bring(TEXT[:201])
        assert again.last.restored == 200


def test_a_full_disk(llm: Any, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, megabytes=1) as disk:
        before = keep(llm, disk / "sessions", TEXT[:100])
        with (disk / "rest").open("wb") as file:
            file.write(b"\0" * (shutil.disk_usage(disk).free - 20_000))
        assert "are free there" in goes_on(llm, disk / "sessions")
        assert states(disk / "sessions") == [before]
        assert left_over(disk / "sessions") == []


@pytest.mark.parametrize("room", [100, 4096, 20_000, 60_000, -1, -60])
def test_a_disk_that_fills_while_writing(llm: Any, folder: Path, room: int) -> None:
    """room: bytes that can be written; a negative number is so many less than llama.cpp's file has."""
    resource = pytest.importorskip("resource")
    if room < 0:
        Memory(llm).clear()
        Memory(llm).read(TEXT[:300])
        Memory(llm).save(str(folder.parent / "whole"))
        room += (folder.parent / "whole").stat().st_size
    keep(llm, folder, TEXT[:20])  # the key is there
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        goes_on(llm, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(states(folder)) == 1
    assert left_over(folder) == []
    one = reader(llm, folder)
    one.bring(TEXT[:300])
    assert one.save()
