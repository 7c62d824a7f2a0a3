"""Saved states: the longest beginning is found, nothing damaged or foreign is used, and a full disk costs time only."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.extend import extend
from mrrope_gguf.sessions.entry import CHUNK, Damaged, OtherVersion, check_state, read_head
from mrrope_gguf.sessions.fingerprint import Fingerprint, fingerprint
from mrrope_gguf.sessions.memory import Memory
from mrrope_gguf.sessions.reader import Reader
from mrrope_gguf.sessions.store import DEFAULT_LIMIT, LIMIT, Store, limit_in_bytes
from tests import tiny
from tests.filesystems import mounted
from tests.patched import ROOT
from tests.session_chat import left_over, open_small, small, states

pytestmark = pytest.mark.engine

TEXT = tiny.tokens(400)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[Any]:
    loaded = open_small(model)
    yield loaded
    loaded.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


def keep(llm: Any, folder: Path, tokens: list[int], **options: Any) -> Path:
    """Read these tokens and save them."""
    memory, store = Memory(llm), Store(folder, **options)
    memory.clear()
    memory.read(tokens)
    return store.save(
        fingerprint(llm), tokens, memory.save, size=memory.state_size(), whole=memory.whole, scale=memory.scale
    )


def reader(llm: Any, folder: Path, notes: list[str] | None = None) -> Reader:
    """An empty memory with a store."""
    note = notes.append if notes is not None else pytest.fail
    found = Reader(llm, Store(folder, note=note), note)
    found.memory.clear()
    return found


def next_token(llm: Any) -> tuple[int, list[float]]:
    """The likeliest token and the logits that made it."""
    import llama_cpp

    logits = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)[: llm.n_vocab()]
    return max(range(len(logits)), key=logits.__getitem__), logits


def fresh(llm: Any, tokens: list[int]) -> tuple[int, list[float]]:
    """The same of tokens that were all read now, the last one by itself as after a restore."""
    memory = Memory(llm)
    memory.clear()
    memory.read(tokens[:-1])
    memory.read(tokens[-1:])
    return next_token(llm)


def test_a_state_goes_on_bit_for_bit(llm: Any, folder: Path) -> None:
    wanted = fresh(llm, TEXT[:301])
    keep(llm, folder, TEXT[:300])
    again = reader(llm, folder)
    assert again.bring(TEXT[:301])
    assert (again.last.held, again.last.restored, again.last.read) == (0, 300, 1)
    assert next_token(llm) == wanted
    assert llm.input_ids[: llm.n_tokens].tolist() == TEXT[:301]


def test_the_longest_beginning_wins(llm: Any, folder: Path) -> None:
    keep(llm, folder, TEXT[:100])
    keep(llm, folder, [*TEXT[:240], *reversed(TEXT[:160])])
    keep(llm, folder, TEXT[:200])
    keep(llm, folder, list(reversed(TEXT)))
    found = Store(folder).find(fingerprint(llm), TEXT, more_than=0, n_ctx=2048)
    assert [one.usable for one in found] == [240, 200, 100]
    assert len(found[0].head.tokens) == 400
    wanted = fresh(llm, TEXT)
    again = reader(llm, folder)
    again.bring(TEXT)
    assert (again.last.restored, again.last.read) == (240, 160)
    assert next_token(llm)[0] == wanted[0]
    assert Store(folder).find(fingerprint(llm), TEXT, more_than=240, n_ctx=2048) == []
    # what would not fit is passed over
    assert [one.usable for one in Store(folder).find(fingerprint(llm), TEXT, more_than=0, n_ctx=300)] == [200, 100]


def test_the_same_tokens_are_kept_once(llm: Any, folder: Path) -> None:
    first = keep(llm, folder, TEXT[:50])
    os.utime(first, (0, 0))
    assert keep(llm, folder, TEXT[:50]) == first
    assert states(folder) == [first]
    assert first.stat().st_mtime > 1  # it counts as used


def test_only_the_user_may_look(llm: Any, folder: Path) -> None:
    before = os.umask(0)
    try:
        path = keep(llm, folder, TEXT[:50])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(place.stat().st_mode) for place in (folder, *path.parents[:2])} == {0o700}
    assert {stat.S_IMODE(place.stat().st_mode) for place in (path, folder / "key")} == {0o600}
    folder.chmod(0o755)
    keep(llm, folder, TEXT[:60])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def refused(path: Path, key: bytes) -> str:
    """Why a state would not be used; nothing if it would."""
    fd = os.open(path, os.O_RDONLY)
    try:
        check_state(fd, read_head(fd, key))
    except (Damaged, OtherVersion) as error:
        return error.why
    finally:
        os.close(fd)
    return ""


def test_no_byte_can_change(llm: Any, folder: Path) -> None:
    path = keep(llm, folder, TEXT[:40])
    key, size = (folder / "key").read_bytes(), path.stat().st_size
    fd = os.open(path, os.O_RDWR)
    assert refused(path, key) == ""
    head = read_head(fd, key)
    reasons = set()
    for at in [*range(0, head.length, 11), *range(head.length - 20, size)]:
        byte = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([byte[0] ^ 1 << at % 8]), at)
        why = refused(path, key)
        assert why, f"byte {at} of {size}"
        reasons.add(why.split(":")[0])
        os.pwrite(fd, byte, at)
    assert len(reasons) >= 5
    assert refused(path, key) == ""
    os.close(fd)
    whole = path.read_bytes()
    for changed in (whole[:-1], whole[: size // 2], whole[:30], b"", whole + b"\0", b"\0" + whole):
        path.write_bytes(changed)
        assert refused(path, key)


@pytest.mark.parametrize("at", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_a_damaged_state_never_reaches_llama(
    llm: Any, folder: Path, at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = fresh(llm, TEXT[:301])
    path = keep(llm, folder, TEXT[:300])
    data = bytearray(path.read_bytes())
    data[round(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)
    monkeypatch.setattr(Memory, "restore", lambda *_: pytest.fail("llama.cpp was given a damaged state"))
    notes = list[str]()
    again = reader(llm, folder, notes)
    assert again.bring(TEXT[:301])
    assert again.last.read == 301
    assert next_token(llm)[0] == wanted[0]
    assert len(notes) == 1
    assert "read again" in notes[0]
    assert not path.exists()


def test_a_large_state_is_checked_to_its_end(tmp_path: Path) -> None:
    llm = open_small(small(tmp_path, n_layer=4, n_embd=512, n_head=4, n_head_kv=4, n_ff=64), type_k="f32", type_v="f32")
    path = keep(llm, tmp_path / "s", [*TEXT, *TEXT[:300]])
    size = path.stat().st_size
    assert size > CHUNK
    key = (tmp_path / "s" / "key").read_bytes()
    assert refused(path, key) == ""
    with path.open("r+b") as file:
        file.seek(CHUNK + 5)
        file.write(b"\x5a\xa5")
    assert f"bytes {CHUNK} to" in refused(path, key)
    llm.close()


def test_another_users_state_is_refused(llm: Any, folder: Path, tmp_path: Path) -> None:
    path = keep(llm, tmp_path / "theirs", TEXT[:300])
    keep(llm, folder, TEXT[:40])  # a key of one's own
    shutil.copyfile(path, states(folder)[0].with_name(path.name))
    notes = list[str]()
    again = reader(llm, folder, notes)
    again.bring(TEXT[:301])
    assert again.last.restored < 50
    assert "another user" in notes[0]


def test_a_state_in_anothers_place_is_refused(llm: Any, folder: Path) -> None:
    path = keep(llm, folder, TEXT[:300])
    other = Fingerprint({**fingerprint(llm).parts, "keys": "q8_0"})
    shutil.copytree(path.parent, folder / "states" / other.key)
    notes = list[str]()
    assert Store(folder, note=notes.append).find(other, TEXT, more_than=0, n_ctx=2048) == []
    assert "another model, table, cache or engine" in notes[0]
    assert len(Store(folder).find(fingerprint(llm), TEXT, more_than=0, n_ctx=2048)) == 1


def test_what_changes_keys_changes_the_fingerprint(model: Path, tmp_path: Path) -> None:
    """Every model and setting here has keys of its own; n_ctx, threads and batches are not among them."""
    other = small(tmp_path, "other", seed=1)
    longer = extend(model, tmp_path / "longer.gguf", scale=2).path
    longest = extend(model, tmp_path / "longest.gguf", scale=4).path
    cases: list[tuple[Path, dict[str, Any]]] = [
        (model, {}), (other, {}), (longer, {"elastic": False}), (longest, {"elastic": False}),
        (model, {"flash_attn": False}), (model, {"rope_freq_base": 5e4}), (model, {"rope_freq_scale": 0.5}),
        (model, {"type_k": "f32"}), (model, {"type_v": "f32"}), (model, {"swa_full": True}),
        (model, {"kv_overrides": {"llama.rope.freq_base": 7e4}}),
    ]  # fmt: skip
    marks = []
    for path, options in cases:
        llm = open_small(path, **options)
        marks.append(fingerprint(llm))
        llm.close()
    assert len({mark.key for mark in marks}) == len(cases)
    same = open_small(model, n_ctx=512, n_batch=64)
    assert fingerprint(same).key == marks[0].key
    same.close()
    assert "its keys was f16 and is f32" in marks[7].differences(marks[0].parts)
    # the same file elsewhere is the same model
    moved = open_small(Path(shutil.copyfile(model, tmp_path / "moved.gguf")))
    assert fingerprint(moved).key == marks[0].key
    moved.close()


def test_the_least_recently_used_goes(llm: Any, folder: Path) -> None:
    paths = [keep(llm, folder, TEXT[n:]) for n in (0, 1, 2)]
    size = max(path.stat().st_size for path in paths)
    for age, path in zip((30, 10, 20), paths, strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    reader(llm, folder).bring([*TEXT, 5])  # the oldest is used, and is the newest now
    last = keep(llm, folder, TEXT[3:], limit=3 * size + 100)
    assert states(folder) == sorted([paths[0], paths[1], last])
    # what is being read stays, whatever the limit
    with pytest.raises(FileTrouble, match="not saved"):
        keep(llm, folder, TEXT[4:], limit=size // 2)
    found = Store(folder).find(fingerprint(llm), TEXT, more_than=300, n_ctx=2048)[0]
    seen = list[bool]()

    def read(_path: str) -> None:
        seen.append(Store(folder).discard(found.path))
        keep(llm, folder, TEXT[5:], limit=size + 100)
        seen.append(found.path.exists())

    Store(folder).load(found, read)
    assert seen == [False, True]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT, raising=False)
    assert limit_in_bytes() == DEFAULT_LIMIT
    monkeypatch.setenv(LIMIT, " 2.5 GB ")
    assert Store("x").limit == 2_500_000_000
    for wrong in ("much", "-1", "1e9", "5PB", "\x1b[31m1"):
        with pytest.raises(Refused, match="it is no size") as caught:
            limit_in_bytes(wrong)
        assert "\x1b" not in str(caught.value)


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
    import fcntl

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
    from tests.patched import run

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


@pytest.mark.parametrize("room", [100, 4096, 20_000, 60_000])
def test_a_disk_that_fills_while_writing(llm: Any, folder: Path, room: int) -> None:
    resource = pytest.importorskip("resource")
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
