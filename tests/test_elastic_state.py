"""Saved states of an elastic context: the stage travels with them, and turns into another context's."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine import get_table, set_elastic
from tests import tiny
from tests.elastic import (
    FULL,
    PRECISION,
    Held,
    Policy,
    elastic,
    grow_file,
    scale_of,
    scratch,
)
from tests.engine_session import HEAD, RECORD, record_size, rel_rms, session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS, OTHERS = tiny.tokens(300), tiny.tokens(300, seed=1)
BROAD: dict[str, Any] = {"head_dim": 32, "n_embd": 128}
POLICY = Policy()
WHOLE = pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])


def told(
    path: Path, n: int, seq: int | None, policy: Policy = POLICY, **params: Any
) -> tuple[bytes, Floats, list[float]]:
    """The state after n tokens, and what follows without it ever being read: logits, and S after each piece."""
    with elastic(path, policy, **params) as s:
        s.feed(TOKENS[:n])
        state = s.state(seq)
        return state, *_go_on(s, n)


def _go_on(s: Any, n: int) -> tuple[Floats, list[float]]:
    rows, found = [], [scale_of(s)]
    for at in range(n, n + 60, 12):
        rows.append(s.feed(TOKENS[at : at + 12]))
        found.append(scale_of(s))
    return np.concatenate(rows), found


def resumed(
    path: Path, state: bytes, n: int, seq: int | None, policy: Policy = POLICY, used: int = 0, **params: Any
) -> tuple[Floats, list[float]]:
    """What follows in another context, which had grown with `used` tokens of something else and was emptied."""
    with elastic(path, policy, **params) as s:
        if used:
            s.feed(OTHERS[:used])
            s.clear()
        assert s.restore(state, seq) == len(state)
        return _go_on(s, n)


@pytest.fixture(scope="module")
def other(patched: Path) -> Iterator[Worker]:
    """A second process on the patched library."""
    worker = Worker(patched)
    yield worker
    worker.close()


@WHOLE
@pytest.mark.parametrize("n", [30, 60, 64, 100, 210])
@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0", "q4_0"])
def test_another_process_goes_on_bit_for_bit(
    engine: Worker, other: Worker, tmp_path: Path, cache: str, n: int, seq: int | None
) -> None:
    path, policy = grow_file(tmp_path, "llama", n_layer=2, **BROAD).path, Policy(cache=cache)
    state, wanted, scales = engine.call(told, path, n, seq, policy)
    found, seen = other.call(resumed, path, state, n, seq, policy)
    assert (found == wanted).all()
    assert seen == scales
    assert scales[0] == np.float32(policy.scale_at(n))
    assert scales[-1] > 1.0


@WHOLE
@pytest.mark.parametrize("used", [0, 20, 250])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama", {}),
        ("llama", {"unified": False, "n_seq": 2, "n_ctx": 1024}),
        ("llama", {"flash_attn_type": 1}),
        ("rope_freqs", {}),
        ("stablelm", {}),
        ("smollm3", {}),
        ("gemma2", {}),
        ("gemma3", {"swa_full": False}),
    ],
    ids=["llama", "streams", "flash", "rope_freqs", "stablelm", "smollm3", "gemma2", "gemma3"],
)
def test_a_used_context_does_too(
    engine: Worker, tmp_path: Path, name: str, params: dict[str, Any], used: int, seq: int | None
) -> None:
    path = grow_file(tmp_path, name, n_layer=tiny.ARCHS.get(name, tiny.ARCHS["llama"]).n_layer).path
    for n in (60, 150):
        state, wanted, scales = engine.call(told, path, n, seq, **params)
        found, seen = engine.call(resumed, path, state, n, seq, used=used, **params)
        assert seen == scales
        if name.startswith("gemma"):
            # a saved window leaves out what slid out of it, and sums round otherwise; stock does no better
            np.testing.assert_allclose(found, wanted, atol=5e-3)
        else:
            assert (found == wanted).all()


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_a_state_holds_the_stage_it_was_made_at(engine: Worker, tmp_path: Path, rendering: Any) -> None:
    path = grow_file(tmp_path, "llama", rendering).path
    for n in (60, 150, 300):
        state = engine.call(saved, path, n)
        assert record_size(state, HEAD) == 16 + 4 * 8
        attn, *factors = struct.unpack_from("<f8f", state, HEAD + 12)
        table = engine.call(table_at, path, n)
        assert (attn, tuple(factors)) == table


def saved(
    path: Path,
    n: int,
    policy: Policy = POLICY,
    seq: int | None = 0,
    static: bool = False,
    tokens: list[int] = TOKENS,
    **params: Any,
) -> bytes:
    with elastic(path, policy, **params) as s:
        if static:
            set_elastic(s.ctx, False)
        s.feed(TOKENS[:n])
        return s.state(seq)


def table_at(path: Path, n: int) -> tuple[float, tuple[float, ...]]:
    with elastic(path) as s:
        s.feed(TOKENS[:n])
        table = get_table(s.ctx)
        return (table.attn_factor, table.factors) if table else (1.0, (1.0,) * 8)


def reread(
    path: Path,
    state: bytes,
    n: int,
    policy: Policy | None,
    seq: int | None = 0,
    cache: str = "f32",
    before: int = 0,
    **params: Any,
) -> tuple[float, float, float, float]:
    """S and the error of layer 0's keys right after reading a state of n tokens, and after one more token."""
    with elastic(path, policy or Policy(cache=cache), **params) as s:
        if policy is None:
            set_elastic(s.ctx, False)
        if before:
            s.feed(OTHERS[:before], seq=1)
        assert s.restore(state, seq) == len(state)
        held: Held = dict(enumerate(TOKENS[:n]))
        found = []
        for _ in range(2):
            keys = s.keys()[0]
            assert keys.pos.tolist() == sorted(held)
            found += [scale_of(s), rel_rms(keys.values, scratch(path, get_table(s.ctx), held, cache))]
            s.feed([TOKENS[n]])
            held[n] = TOKENS[n]
        return found[0], found[1], found[2], found[3]


@WHOLE
@pytest.mark.parametrize("n", [40, 100, 250])
@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0"])
def test_into_a_context_of_another_kind(engine: Worker, tmp_path: Path, cache: str, n: int, seq: int | None) -> None:
    path = grow_file(tmp_path, "llama", **BROAD).path
    kinds = [Policy(step, head_room, cache=cache) for step, head_room in ((1.25, 1.25), (1.06, 1.0), (2.0, 1.0))]
    for made in ("elastic", "static"):
        state = engine.call(saved, path, n, Policy(cache=cache), seq, made == "static")
        for policy in (*kinds, None):
            scale, error, next_scale, next_error = engine.call(reread, path, state, n, policy, seq, cache)
            if policy is None:
                assert scale == next_scale == FULL
            else:
                assert scale == np.float32(policy.scale_at(n))
                assert next_scale == np.float32(policy.scale_at(n + 1))
            bound = 2 * PRECISION[cache] * (2 + len(POLICY.stages())) ** 0.5
            assert max(error, next_error) < bound


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize(("n", "before"), [(40, 30), (40, 150), (150, 30), (200, 100)])
def test_beside_another_sequence(engine: Worker, tmp_path: Path, unified: bool, n: int, before: int) -> None:
    path = grow_file(tmp_path, "llama", **BROAD).path
    params: dict[str, Any] = {"unified": unified, "n_seq": 2, "n_ctx": 1024}
    for static in (False, True):
        state = engine.call(saved, path, n, POLICY, 0, static, **params)
        found = engine.call(reread, path, state, n, POLICY, before=before, **params)
        assert found[2] == np.float32(POLICY.scale_at(max(n + 1, before)))
        assert max(found[1], found[3]) < 1e-4


def two(path: Path, state: bytes | None, unified: bool) -> tuple[bytes, Floats, Floats, float]:
    """A whole state of a short and a long sequence, and both's next logits, or those of a context that reads it."""
    with elastic(path, n_seq=2, unified=unified, n_ctx=1024) as s:
        if state is None:
            s.feed(TOKENS[:150])
            s.feed(OTHERS[:40], seq=1)
            state = s.state()
        else:
            assert s.restore(state) == len(state)
        return state, s.feed(TOKENS[150:160]), s.feed(OTHERS[40:50], seq=1), scale_of(s)


@pytest.mark.parametrize("unified", [True, False])
def test_a_whole_state_of_two_sequences(engine: Worker, tmp_path: Path, unified: bool) -> None:
    path = grow_file(tmp_path, "llama", n_layer=2).path
    state, long, short, scale = engine.call(two, path, None, unified)
    _, long_again, short_again, scale_again = engine.call(two, path, state, unified)
    assert (long == long_again).all()
    assert (short == short_again).all()
    assert scale == scale_again == np.float32(POLICY.scale_at(160))


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_a_state_of_stock(engine: Worker, stock: Worker, tmp_path: Path, rendering: Any) -> None:
    # stock decodes an extended file under its full table, or YaRN of its scale; no record says so
    path = grow_file(tmp_path, "llama", rendering).path
    for n in (40, 200):
        state = stock.call(plain, path, n)
        _, error, scale, next_error = engine.call(reread, path, state, n, POLICY)
        assert scale == np.float32(POLICY.scale_at(n + 1))
        assert max(error, next_error) < 1e-4


def plain(path: Path, n: int) -> bytes:
    with session(path, n_ctx=512) as s:
        s.feed(TOKENS[:n])
        return s.state(0)


def accepted(path: Path, state: bytes) -> int:
    with session(path, n_ctx=512) as s:
        return s.restore(state, 0)


@pytest.mark.parametrize("n", [40, 150])
def test_stock_refuses_what_it_would_misread(engine: Worker, stock: Worker, tmp_path: Path, n: int) -> None:
    # inside the window, too: there the keys are the original's, and stock turns this file by its full table
    path = grow_file(tmp_path, "llama", "portable").path
    assert stock.call(accepted, path, engine.call(saved, path, n)) == 0


DAMAGE: dict[str, bytes] = {
    "another n": struct.pack("<4sIIf4f", RECORD, 1, 4, 1.0, *[2.0] * 4),
    "nan": struct.pack("<4sIIf8f", RECORD, 1, 8, 1.0, *[float("nan")] * 8),
    "zero temperature": struct.pack("<4sIIf8f", RECORD, 1, 8, 0.0, *[2.0] * 8),
    "a version from the future": struct.pack("<4sIIf8f", RECORD, 2, 8, 1.0, *[2.0] * 8),
}


def refused(path: Path, state: bytes, seq: int | None) -> tuple[int, bool, list[float]]:
    """What reading returns in a grown context; whether it then is as good as new; S on the way."""
    with elastic(path) as s:
        wanted = s.feed(TOKENS[:100])
        n = s.restore(state, seq)
        found = [scale_of(s)]
        s.clear()
        again = s.feed(TOKENS[:100])
        return n, bool((again == wanted).all()), [*found, scale_of(s)]


@WHOLE
@pytest.mark.parametrize("kind", [*DAMAGE, "cut short"])
def test_a_damaged_state_is_refused(engine: Worker, tmp_path: Path, kind: str, seq: int | None) -> None:
    path = grow_file(tmp_path, "llama").path
    state = engine.call(saved, path, 150, POLICY, seq)
    at = state.index(RECORD)
    bad = (
        state[: len(state) // 2]
        if kind == "cut short"
        else state[:at] + DAMAGE[kind] + state[at + record_size(state, at) :]
    )
    n, as_new, scales = engine.call(refused, path, bad, seq)
    assert n == 0
    assert as_new
    assert scales[-1] == np.float32(POLICY.scale_at(100))
