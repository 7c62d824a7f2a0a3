"""Saved states: stock's own bytes where no table is active; where one is, they say which, and turn into another's."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.extend import extend
from mrrope_gguf.tables import RopeTable, rope_table
from tests import tiny
from tests.engine_models import model
from tests.engine_session import HEAD, RECORD, Keys, Session, Table, record_size, rel_rms, session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

PRECISION = {"f32": 1e-5, "f16": 6e-4, "q8_0": 0.015}
TOKENS = tiny.tokens(60)
# LLAMA_STATE_SEQ_FLAGS_: what a rollback needs, sliding windows alone; keys that stay where they are computed
PARTIAL_ONLY, ON_DEVICE = 1, 2
A = rope_table("mrrope-pro", n_rot=16, freq_base=1e4, n_ctx_orig=64, scale=4)
B = rope_table("mrrope-uni", n_rot=16, freq_base=1e4, n_ctx_orig=64, scale=16)
A32 = rope_table("mrrope-pro", n_rot=32, freq_base=1e4, n_ctx_orig=64, scale=4)
B32 = rope_table("mrrope-uni", n_rot=32, freq_base=1e4, n_ctx_orig=64, scale=16)


def saved(path: Path, table: Table = None, *after: Table, seq: int | None = 0, **settings: Any) -> bytes:
    """The state after 60 tokens of sequence 0 and some of 1, under a table, and then under others."""
    with session(path, table=table, n_seq=2, **settings) as s:
        s.feed(TOKENS)
        s.feed(TOKENS[:9], seq=1)
        for wanted in after:
            s.set(wanted)
        return s.state(seq)


def restored(
    path: Path, state: bytes, table: Table = None, seq: int | None = 0, reread: int = 0, **settings: Any
) -> tuple[int, list[Keys], Floats]:
    """What restoring returns in a context under `table`, and then sequence `reread`'s keys and next logits.

    Where it is refused the context is emptied and fed the tokens instead: it must be as good as new.
    """
    with session(path, table=table, n_seq=2, **settings) as s:
        n = s.restore(state, seq)
        if not n:
            s.clear()
            s.feed(TOKENS)
        return n, s.keys(reread), s.peek(seq=reread)


def fresh(path: Path, table: Table = None, **settings: Any) -> tuple[list[Keys], Floats]:
    """Keys and next logits of the 60 tokens decoded under `table`."""
    with session(path, table=table, n_seq=2, **settings) as s:
        s.feed(TOKENS)
        return s.keys(), s.peek()


def round_trip(path: Path, state: bytes, seq: int | None, **settings: Any) -> bytes:
    with session(path, n_seq=2, **settings) as s:
        assert s.restore(state, seq) == len(state)
        return s.state(seq)


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", ["llama", "yarn", "rope_freqs", "gemma3", "smollm3"])
def test_without_a_table_the_bytes_are_those_of_stock(
    engine: Worker, stock: Worker, tmp_path: Path, name: str, unified: bool, seq: int | None
) -> None:
    settings: dict[str, Any] = {"seq": seq, "unified": unified, "cache": "f16"}
    path = model(tmp_path, name)
    theirs = stock.call(saved, path, **settings)
    assert engine.call(saved, path, **settings) == theirs
    assert engine.call(round_trip, path, theirs, **settings) == theirs


def test_a_table_that_came_and_went_leaves_no_record(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    under_a, after = engine.call(saved, path, A), engine.call(saved, path, A, None)
    theirs = stock.call(saved, path)
    assert len(after) == len(theirs)
    assert record_size(after, HEAD) == 0
    assert len(under_a) == len(theirs) + record_size(under_a, HEAD)


def test_a_record_holds_the_table(engine: Worker, tmp_path: Path) -> None:
    state = engine.call(saved, model(tmp_path, "llama"), A)
    magic, version, n, attn_factor, *factors = struct.unpack_from("<4sIIf8f", state, HEAD)
    assert (magic, version, n) == (RECORD, 1, 8)
    assert attn_factor == np.float32(A.attn_factor)
    assert factors == [float(f) for f in A.factors.astype(np.float32)]


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize(("made", "read"), [(A32, A32), (A32, B32), (A32, None), (None, B32)])
@pytest.mark.parametrize("cache", PRECISION)
def test_a_state_turns_into_one_of_the_table_it_is_read_under(
    engine: Worker, tmp_path: Path, made: RopeTable | None, read: RopeTable | None, seq: int | None, cache: str
) -> None:
    path = model(tmp_path, "llama", head_dim=32, n_embd=128)
    state = engine.call(saved, path, made, seq=seq, cache=cache)
    n, keys, logits = engine.call(restored, path, state, read, seq=seq, cache=cache)
    wanted, expected = engine.call(fresh, path, read, cache=cache)
    assert n == len(state)
    assert (keys[0].pos == wanted[0].pos).all()
    assert rel_rms(keys[0].values, wanted[0].values) < (1e-12 if made is read else PRECISION[cache])
    if cache == "f32":
        np.testing.assert_allclose(logits, expected, atol=1e-3)
    if made is not read:
        other, _ = engine.call(fresh, path, made, cache=cache)
        assert rel_rms(other[0].values, wanted[0].values) > 0.3  # leaving it as it is would not pass


def turned(engine: Worker, path: Path, state: bytes, table: Table = None) -> tuple[Floats, Floats]:
    """Assert that a state comes back whole with the keys of `table`; the next logits, and those of a fresh context."""
    n, keys, logits = engine.call(restored, path, state, table)
    wanted, expected = engine.call(fresh, path, table)
    assert n == len(state)
    assert rel_rms(keys[0].values, wanted[0].values) < PRECISION["f32"]
    return logits, expected


@pytest.mark.parametrize("name", ["yarn", "rope_freqs", "linear"])
def test_a_state_of_stock_turns_from_the_scaling_of_the_model(
    engine: Worker, stock: Worker, tmp_path: Path, name: str
) -> None:
    path = model(tmp_path, name)
    turned(engine, path, stock.call(saved, path), A)


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_a_state_of_stock_on_an_extended_file(engine: Worker, stock: Worker, tmp_path: Path, rendering: Any) -> None:
    # under stock the portable file turns by the table, and the other by YaRN of the same scale
    path = extend(model(tmp_path, "llama"), tmp_path / "out.gguf", scale=4, rendering=rendering, elastic=False).path
    logits, expected = turned(engine, path, stock.call(saved, path))
    np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_an_extended_file_with_its_table_off(engine: Worker, tmp_path: Path, rendering: Any) -> None:
    path = extend(model(tmp_path, "llama"), tmp_path / "out.gguf", scale=4, rendering=rendering, elastic=False).path
    turned(engine, path, engine.call(switched_off, path))


def switched_off(path: Path) -> bytes:
    with session(path, n_seq=2) as s:
        s.set(None)
        s.feed(TOKENS)
        return s.state(0)


def beside(path: Path, state: bytes, **settings: Any) -> tuple[Keys, Keys, Keys]:
    """Sequence 0 of a context under B before and after sequence 1 is restored beside it, and that one."""
    with session(path, table=B, n_seq=2, **settings) as s:
        s.feed(TOKENS[::-1], first=100)
        before = s.keys(0)[0]
        assert s.restore(state, 1) == len(state)
        return before, s.keys(0)[0], s.keys(1)[0]


@pytest.mark.parametrize("unified", [True, False])
def test_only_the_restored_sequence_turns(engine: Worker, tmp_path: Path, unified: bool) -> None:
    path = model(tmp_path, "llama")
    state = engine.call(saved, path, A, unified=unified)
    before, after, new = engine.call(beside, path, state, unified=unified)
    wanted, _ = engine.call(fresh, path, B)
    assert (before.raw == after.raw).all()
    assert rel_rms(new.values, wanted[0].values) < PRECISION["f32"]


def copied(path: Path, **settings: Any) -> list[Keys]:
    """A sequence, its copy, and its copy's copy by a state, after the table changed in between."""
    with session(path, table=A, n_seq=3, **settings) as s:
        s.feed(TOKENS)
        s.copy(0, 1)
        s.peek()  # a copy between streams is done by the next decode
        state = s.state(1)
        s.set(B)
        assert s.restore(state, 2)
        s.peek()
        return [s.keys(seq)[0] for seq in range(3)]


@pytest.mark.parametrize("unified", [True, False])
def test_copies_of_a_sequence(engine: Worker, tmp_path: Path, unified: bool) -> None:
    path = model(tmp_path, "llama")
    wanted, _ = engine.call(fresh, path, B)
    for keys in engine.call(copied, path, unified=unified):
        assert rel_rms(keys.values, wanted[0].values) < PRECISION["f32"]


def flagged(s: Session, flags: int) -> tuple[Any, int]:
    """The state of sequence 0 with some flags, and its size."""
    size = s.api.llama_state_seq_get_size_ext(s.ctx, 0, flags)
    buffer = (ctypes.c_uint8 * size)()
    assert s.api.llama_state_seq_get_data_ext(s.ctx, buffer, size, 0, flags) == size
    return buffer, size


def on_device(path: Path) -> list[Keys]:
    """Keys under B of a state that was made under A in the same context and kept in its device's memory."""
    with session(path, table=A) as s:
        s.feed(TOKENS)
        buffer, size = flagged(s, ON_DEVICE)
        s.clear()
        s.set(B)
        assert s.api.llama_state_seq_set_data_ext(s.ctx, buffer, size, 0, ON_DEVICE) == size
        return s.keys()


def test_a_state_kept_on_the_device(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    wanted, _ = engine.call(fresh, path, B)
    assert rel_rms(engine.call(on_device, path)[0].values, wanted[0].values) < PRECISION["f32"]


def rolled_back(path: Path) -> tuple[list[Keys], list[Keys]]:
    """Keys under B before and after the windows alone are restored from a state made under A."""
    with session(path, table=A) as s:
        s.feed(TOKENS)
        buffer, size = flagged(s, PARTIAL_ONLY)
        s.set(B)
        before = s.keys()
        assert s.api.llama_state_seq_set_data_ext(s.ctx, buffer, size, 0, PARTIAL_ONLY) == size
        s.peek()
        return before, s.keys()


def test_a_state_of_sliding_windows_turns_no_global_layer(engine: Worker, tmp_path: Path) -> None:
    before, after = engine.call(rolled_back, model(tmp_path, "gemma3"))
    for old, new in zip(before, after, strict=True):
        assert (old.raw == new.raw).all()


def through_files(path: Path, folder: Path) -> tuple[Keys, Keys, bytes]:
    """A sequence and a whole state saved under A by file and loaded under B; the sequence's file."""
    out, n_out = (ctypes.c_int32 * 100)(), ctypes.c_size_t()
    names = [str(folder / name).encode() for name in ("one", "all")]
    tokens = (ctypes.c_int32 * len(TOKENS))(*TOKENS)
    with session(path, table=A) as s:
        s.feed(TOKENS)
        assert s.api.llama_state_seq_save_file(s.ctx, names[0], 0, tokens, len(TOKENS))
        assert s.api.llama_state_save_file(s.ctx, names[1], tokens, len(TOKENS))
    with session(path, table=B) as s:
        assert s.api.llama_state_seq_load_file(s.ctx, names[0], 0, out, 100, ctypes.byref(n_out))
        one = s.keys()[0]
        s.clear()
        assert s.api.llama_state_load_file(s.ctx, names[1], out, 100, ctypes.byref(n_out))
        assert list(out[: n_out.value]) == TOKENS
        return one, s.keys()[0], (folder / "one").read_bytes()


def test_state_files(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    one, whole, _ = engine.call(through_files, path, tmp_path)
    wanted, _ = engine.call(fresh, path, B)
    assert rel_rms(one.values, wanted[0].values) < PRECISION["f32"]
    assert rel_rms(whole.values, wanted[0].values) < PRECISION["f32"]


def record(n: int = 8, attn: float = 1.0, factor: float = 2.0, version: int = 1) -> bytes:
    return struct.pack(f"<4sIIf{n}f", RECORD, version, n, attn, *[factor] * n)


DAMAGE = {
    "another n": record(4),
    "no factors": record(0),
    "many factors": struct.pack("<4sIIf", RECORD, 1, 2**31, 1.0),
    "nan": record(factor=float("nan")),
    "negative": record(factor=-1.0),
    "zero temperature": record(attn=0.0),
    "infinite temperature": record(attn=float("inf")),
    "a version from the future": record(version=2),
    "twice": record() * 2,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("table", [A, None], ids=["table", "no table"])
def test_a_damaged_record_is_refused(engine: Worker, tmp_path: Path, kind: str, table: RopeTable | None) -> None:
    path = model(tmp_path, "llama")
    state = engine.call(saved, path, A)
    rest = state[HEAD + record_size(state, HEAD) :]
    n, keys, logits = engine.call(restored, path, state[:HEAD] + DAMAGE[kind] + rest, table)
    wanted, expected = engine.call(fresh, path, table)
    assert n == 0
    assert (keys[0].raw == wanted[0].raw).all()
    assert (logits == expected).all()


def test_a_truncated_state_is_refused(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    state = engine.call(saved, path, A)
    wanted, expected = engine.call(fresh, path, B)
    for end in (HEAD + 3, HEAD + 10, HEAD + 20, HEAD + 60, len(state) // 2, len(state) - 1):
        n, keys, logits = engine.call(restored, path, state[:end], B)
        assert n == 0
        assert (keys[0].raw == wanted[0].raw).all()
        assert (logits == expected).all()


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize("name", ["maincoder", "hunyuan-dense"])
def test_keys_that_cannot_be_turned_are_refused(engine: Worker, tmp_path: Path, name: str, seq: int | None) -> None:
    path = model(tmp_path, name)
    state, plain = (engine.call(saved, path, table, seq=seq) for table in (A, None))
    assert engine.call(restored, path, state, A, seq=seq)[0] == len(state)
    for given, table in ((state, B), (state, None), (plain, A)):
        n, _, logits = engine.call(restored, path, given, table, seq=seq)
        assert n == 0
        assert (logits == engine.call(fresh, path, table)[1]).all()


def test_stock_refuses_a_state_with_a_record(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    assert stock.call(restored, path, engine.call(saved, path, A))[0] == 0
