"""Saved states: the longest beginning is found, nothing damaged or foreign is used, the oldest goes."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.extend import extend
from mrrope_gguf.sessions.entry import CHUNK, read_head
from mrrope_gguf.sessions.fingerprint import Fingerprint, fingerprint
from mrrope_gguf.sessions.memory import Memory
from mrrope_gguf.sessions.store import DEFAULT_LIMIT, LIMIT, Store, limit_in_bytes
from tests.session_chat import open_small, small, states
from tests.session_states import TEXT, fresh, keep, next_token, reader, refused

pytestmark = pytest.mark.engine


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
    # what was missing above it too
    deep = folder / "data" / "sessions"
    keep(llm, deep, TEXT[:20])
    assert stat.S_IMODE(deep.parent.stat().st_mode) == 0o700
    folder.chmod(0o755)
    keep(llm, folder, TEXT[:60])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_listed_is_no_reason_not_to_save(
    llm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where opendir is interrupted, which nobody tries again."""
    keep(llm, folder, TEXT[:50])

    def refuse(self: Path, pattern: str) -> list[Path]:
        raise InterruptedError(errno.EINTR, "Interrupted system call")

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Path, "glob", refuse)
        path = keep(llm, folder, TEXT[:60])
    assert path in states(folder)


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
    other = Fingerprint({**fingerprint(llm).parts, "type_k": "q8_0"})
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
    assert "its type_k was f16 and is f32" in marks[7].differences(marks[0].parts)
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
