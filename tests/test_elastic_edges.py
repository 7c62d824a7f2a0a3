"""Corners: aborted batches, attention without a mask, sequences past the count, heads of broken blocks, odd states."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine import get_table, set_elastic_policy
from tests import tiny
from tests.elastic import FINE, FULL, ORIG, PRECISION, Held, Policy, elastic, grow_file, scale_of, scratch
from tests.engine_session import Session, rel_rms
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS, OTHERS = tiny.tokens(300), tiny.tokens(300, seed=1)
BROAD: dict[str, Any] = {"head_dim": 32, "n_embd": 128}
ON_DEVICE = 2  # LLAMA_STATE_SEQ_FLAGS_ON_DEVICE


def error(path: Path, s: Session, held: Held, seq: int = 0, cache: str = "f32") -> float:
    """Relative RMS error of layer 0's keys, against those of the table in effect."""
    keys = s.keys(seq)[0]
    assert keys.pos.tolist() == sorted(held)
    return rel_rms(keys.values, scratch(path, get_table(s.ctx), held, cache))


def aborted(path: Path, after: int) -> tuple[int, int, float, float, float]:
    """llama_decode's status where it is stopped after so many calls; what is left, its S, and errors then and later."""
    left = [after]
    with elastic(path, FINE) as s:
        s.feed(TOKENS[:40])

        def stop(_data: Any) -> bool:
            left[0] -= 1
            return left[0] < 0

        callback = s.api.ggml_abort_callback(stop)
        s.api.llama_set_abort_callback(s.ctx, callback, None)
        batch = s.api.llama_batch_init(160, 0, 1)
        batch.n_tokens = 160
        for i in range(160):
            batch.token[i], batch.pos[i], batch.logits[i] = TOKENS[40 + i], 40 + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = int(s.api.llama_decode(s.ctx, batch))
        s.api.llama_batch_free(batch)
        never = s.api.ggml_abort_callback(lambda _data: False)
        s.api.llama_set_abort_callback(s.ctx, never, None)
        n = s.next()
        now = error(path, s, dict(enumerate(TOKENS[:n]))) if n else 1.0
        s.feed(TOKENS[n : n + 1])
        scale = scale_of(s)
        later = error(path, s, dict(enumerate(TOKENS[: n + 1])))
        return status, n, scale, now, later


def test_an_aborted_batch(engine: Worker, tmp_path: Path) -> None:
    path = grow_file(tmp_path, "llama", **BROAD).path
    seen = set()
    for after in (0, 1, 2, 3, 5, 8, 13, *range(20, 60), 80, 1000):
        status, n, scale, now, later = engine.call(aborted, path, after)
        seen.add(status)
        # whole pieces between bounds are kept; an abort while keys turn must not lose them
        assert n in (40, *(b for b in FINE.bounds() if 40 < b < 200), 200), (after, status, n)
        assert status in (0, 2)
        assert scale == np.float32(FINE.scale_at(n + 1))
        assert max(now, later) < 1e-4, (after, status, n)
    assert 0 in seen
    assert seen - {0}


def unmasked(path: Path) -> list[tuple[float, int]]:
    """S and length after batches whose tokens see each other, which must not be cut."""
    found = []
    with elastic(path, FINE) as s:
        s.api.llama_set_causal_attn(s.ctx, False)
        for n in (40, 100, 60):
            s.feed(TOKENS[:n])
            found.append((scale_of(s), s.next()))
    return found


def test_attention_that_is_not_causal(engine: Worker, tmp_path: Path) -> None:
    found = engine.call(unmasked, grow_file(tmp_path, "llama", n_layer=2).path)
    assert found == [(np.float32(FINE.scale_at(n)), n) for n in (40, 140, 200)]


def kept_elsewhere(path: Path) -> list[tuple[float, float]]:
    """S and errors while only a sequence past n_seq_max holds a long text, as a unified cache allows, and after."""
    found = []
    with elastic(path, FINE) as s:
        s.feed(TOKENS[:200])
        s.copy(0, 7)
        s.remove(0)
        s.feed(OTHERS[:21])
        found.append((scale_of(s), error(path, s, dict(enumerate(OTHERS[:21])))))
        s.remove(7, 150)
        s.feed(OTHERS[21:22])
        s.remove(0)
        s.copy(7, 0)
        found.append((scale_of(s), error(path, s, dict(enumerate(TOKENS[:150])))))
        s.remove(7)
        s.remove(0, 20)
        s.feed(TOKENS[20:21])
        found.append((scale_of(s), error(path, s, dict(enumerate(TOKENS[:21])))))
    return found


def test_sequences_past_the_count(engine: Worker, tmp_path: Path) -> None:
    found = engine.call(kept_elsewhere, grow_file(tmp_path, "llama", **BROAD).path)
    assert [scale for scale, _ in found] == [np.float32(FINE.scale_at(n)) for n in (200, 150, 21)]
    assert max(error for _, error in found) < 1e-4


@pytest.mark.parametrize("head_dim", [16, 80])
def test_heads_of_broken_blocks(engine: Worker, tmp_path: Path, head_dim: int) -> None:
    path = grow_file(tmp_path, "llama", head_dim=head_dim, n_embd=4 * head_dim).path
    policy = Policy(cache="q8_0")
    scale, wrong = engine.call(simply, path, policy, 200)
    assert scale == np.float32(policy.scale_at(200))
    assert wrong < PRECISION["q8_0"] * len(policy.stages()) ** 0.5


def simply(path: Path, policy: Policy, n: int) -> tuple[float, float]:
    with elastic(path, policy) as s:
        s.feed(TOKENS[:n])
        return scale_of(s), error(path, s, dict(enumerate(TOKENS[:n])), cache=policy.cache)


def side_by_side(path: Path) -> tuple[list[float], list[Floats], list[Floats]]:
    """S of two contexts of one model, turn and turn about, their logits, and those of each alone."""
    alone, together, scales = [], [], []
    for lengths in ((60, 40), (150, 120)):
        with elastic(path) as s:
            alone.append(np.concatenate([s.feed(TOKENS[: lengths[0]]), s.feed(OTHERS[: lengths[1]])]))
    with elastic(path) as first:
        params = first.api.llama_context_default_params()
        params.n_ctx, params.type_k, params.type_v, params.flash_attn_type = 512, 0, 0, 0
        params.n_threads = params.n_threads_batch = 1
        params.n_batch = params.n_ubatch = 512
        other = Session(first.model, first.api.llama_init_from_model(first.model, params))
        set_elastic_policy(other.ctx, step=Policy().step, head_room=Policy().head_room)
        halves: list[list[Floats]] = [[], []]
        for k, tokens in enumerate((TOKENS, OTHERS)):
            halves[0].append(first.feed(tokens[: (60, 40)[k]]))
            halves[1].append(other.feed(tokens[: (150, 120)[k]]))
            scales += [scale_of(first), scale_of(other)]
        together = [np.concatenate(half) for half in halves]
        first.api.llama_free(other.ctx)
    return scales, together, alone


def test_contexts_of_one_model_grow_on_their_own(engine: Worker, tmp_path: Path) -> None:
    scales, together, alone = engine.call(side_by_side, grow_file(tmp_path, "llama", n_layer=2).path)
    assert scales == [np.float32(Policy().scale_at(n)) for n in (60, 150, 100, 270)]
    for a, b in zip(together, alone, strict=True):
        assert (a == b).all()


def restored_over(path: Path, n: int, used: int) -> tuple[list[float], Floats, Floats]:
    """S and logits where a state replaces a longer or shorter text of the same sequence, which was not removed."""
    with elastic(path) as s:
        s.feed(TOKENS[:n])
        state, wanted = s.state(0), s.feed(TOKENS[n : n + 20])
        s.clear()
        s.feed(OTHERS[:used])
        assert s.restore(state, 0) == len(state)
        found = [scale_of(s)]
        rows = s.feed(TOKENS[n : n + 20])
        return [*found, scale_of(s)], wanted, rows


@pytest.mark.parametrize(("n", "used"), [(30, 250), (150, 20), (100, 250), (250, 100)])
def test_a_state_takes_the_place_of_another_text(engine: Worker, tmp_path: Path, n: int, used: int) -> None:
    scales, wanted, rows = engine.call(restored_over, grow_file(tmp_path, "llama", n_layer=2).path, n, used)
    assert scales == [np.float32(Policy().scale_at(k)) for k in (n, n + 20)]
    assert (rows == wanted).all()


def on_device(path: Path, n: int, cleared: bool) -> list[float]:
    """Errors of a state that stays in the device's memory while the context grows, or is emptied, and comes back."""
    with elastic(path) as s:
        s.feed(TOKENS[:n])
        size = s.api.llama_state_seq_get_size_ext(s.ctx, 0, ON_DEVICE)
        buffer = (ctypes.c_uint8 * size)()
        assert s.api.llama_state_seq_get_data_ext(s.ctx, buffer, size, 0, ON_DEVICE) == size
        if cleared:
            s.clear()
        else:
            s.feed(TOKENS[n:280])
        assert s.api.llama_state_seq_set_data_ext(s.ctx, buffer, size, 0, ON_DEVICE) == size
        found = [error(path, s, dict(enumerate(TOKENS[:n])))]
        s.feed(TOKENS[n : n + 1])
        assert scale_of(s) == np.float32(Policy().scale_at(n + 1))
        return [*found, error(path, s, dict(enumerate(TOKENS[: n + 1])))]


@pytest.mark.parametrize("cleared", [True, False])
@pytest.mark.parametrize("n", [40, 150])
def test_a_state_on_the_device(engine: Worker, tmp_path: Path, n: int, cleared: bool) -> None:
    assert max(engine.call(on_device, grow_file(tmp_path, "llama", **BROAD).path, n, cleared)) < 1e-4


def test_a_file_of_little_more(engine: Worker, tmp_path: Path) -> None:
    # one stage beyond the original, whatever the policy
    for scale in (1.05, 1.5):
        (folder := tmp_path / str(scale)).mkdir()
        path = grow_file(folder, "llama", scale=scale).path
        policy = Policy(2.0, 1.0, scale)
        found = engine.call(ends, path, policy)
        assert found == [1.0, np.float32(scale), np.float32(scale)]
    assert scale < FULL


def ends(path: Path, policy: Policy) -> list[float]:
    found = []
    with elastic(path, policy) as s:
        for n in (ORIG, ORIG + 1, 2 * ORIG):
            s.feed(TOKENS[s.next() : n])
            found.append(scale_of(s))
    return found
