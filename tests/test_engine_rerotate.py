"""A table set in a running context: cached keys become, exactly, what they would have been under it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf import engine as mrrope_engine
from mrrope_gguf.engine import ActiveTable
from mrrope_gguf.errors import EngineTrouble
from mrrope_gguf.tables import RopeTable, rope_table, stored_factors
from tests import tiny
from tests.engine_models import MODELS, model
from tests.engine_session import Keys, Table, kl, rel_rms, session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

# what one more rounding costs a key, times three: relative RMS
PRECISION = {"f32": 1e-5, "f16": 6e-4, "bf16": 5e-3, "q8_0": 0.015, "q5_1": 0.12, "q4_0": 0.25, "iq4_nl": 0.25}
CLOSE = {"f32": 1e-7, "f16": 1e-4, "bf16": 1e-3, "q8_0": 5e-3, "q5_1": 0.2, "q4_0": 1.0, "iq4_nl": 1.0}


def table(method: str = "mrrope-pro", scale: float = 4.0, n_rot: int = 16) -> RopeTable:
    return rope_table(method, n_rot=n_rot, freq_base=1e4, n_ctx_orig=64, scale=scale)


def pair(n_rot: int = 16) -> tuple[RopeTable, RopeTable]:
    """Two tables that differ in most factors and in the temperature."""
    return table("mrrope-pro", 4.0, n_rot), table("mrrope-uni", 16.0, n_rot)


def rerotated(path: Path, *tables: Table, first: int = 0, **settings: Any) -> tuple[list[Keys], Floats]:
    """Keys and next logits of 100 tokens decoded under the first table, then moved through the others."""
    with session(path, **settings) as s:
        for i, wanted in enumerate(tables):
            if i or wanted is not None:
                s.set(wanted)
            if not i:
                s.feed(tiny.tokens(100), first=first)
        return s.keys(), s.peek()


@pytest.mark.parametrize("cache", PRECISION)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_keys_under_a_become_keys_under_b(engine: Worker, tmp_path: Path, name: str, cache: str) -> None:
    a, b = pair(32)
    path = model(tmp_path, name, head_dim=32, n_embd=128)
    under_a, _ = engine.call(rerotated, path, a, cache=cache)
    under_b, wanted = engine.call(rerotated, path, b, cache=cache)
    moved, after = engine.call(rerotated, path, a, b, cache=cache)
    assert rel_rms(under_a[0].values, under_b[0].values) > 0.3  # doing nothing does not pass
    assert rel_rms(moved[0].values, under_b[0].values) < PRECISION[cache]
    assert kl(wanted, after) < CLOSE[cache]
    if cache == "f32":
        np.testing.assert_allclose(after, wanted, atol=1e-3)


@pytest.mark.parametrize("cache", PRECISION)
def test_there_and_back_restores(engine: Worker, tmp_path: Path, cache: str) -> None:
    a, b = pair(32)
    path = model(tmp_path, "llama", head_dim=32, n_embd=128)
    before, logits = engine.call(rerotated, path, a, cache=cache)
    after, again = engine.call(rerotated, path, a, b, a, cache=cache)
    assert rel_rms(after[0].values, before[0].values) < 1.5 * PRECISION[cache]
    assert kl(logits, again) < CLOSE[cache]


@pytest.mark.parametrize("cache", ["f32", "q8_0"])
def test_the_table_that_is_set_already_moves_no_byte(engine: Worker, tmp_path: Path, cache: str) -> None:
    path, a = model(tmp_path, "llama", head_dim=32, n_embd=128), table(n_rot=32)
    once, logits = engine.call(rerotated, path, a, cache=cache)
    twice, again = engine.call(rerotated, path, a, a, cache=cache)
    assert (once[0].raw == twice[0].raw).all()
    assert (logits == again).all()


@pytest.mark.parametrize("first", [0, 100_000])
def test_far_positions(engine: Worker, tmp_path: Path, first: int) -> None:
    a, b = pair()
    path = model(tmp_path, "llama")
    fresh, _ = engine.call(rerotated, path, b, first=first)
    moved, _ = engine.call(rerotated, path, a, b, first=first)
    # ggml multiplies angles up pair by pair in float32: at 1e5 that alone is worth 1e-2 rad
    assert rel_rms(moved[0].values, fresh[0].values) < (1e-5 if not first else 0.02)


@pytest.mark.parametrize("name", ["llama", "yarn", "linear", "rope_freqs", "qwen2", "stablelm"])
def test_back_to_the_scaling_of_the_model(engine: Worker, tmp_path: Path, name: str) -> None:
    path, a = model(tmp_path, name), table(n_rot=8 if name == "stablelm" else 16)
    own, logits = engine.call(rerotated, path, None)
    under_a, _ = engine.call(rerotated, path, a)
    back, again = engine.call(rerotated, path, a, None)
    there, elsewhere = engine.call(rerotated, path, None, a)
    assert rel_rms(under_a[0].values, own[0].values) > 0.1
    assert rel_rms(back[0].values, own[0].values) < PRECISION["f32"]
    assert rel_rms(there[0].values, under_a[0].values) < PRECISION["f32"]
    assert kl(logits, again) < 1e-7
    assert kl(logits, elsewhere) > 1e-3


def after_a_clear(path: Path, *tables: Table) -> Floats:
    """Logits of 40 tokens after tables came and went and the memory was emptied."""
    with session(path) as s:
        for wanted in tables:
            s.set(wanted)
            s.feed(tiny.tokens(10))
        s.clear()
        return s.feed(tiny.tokens(40))


@pytest.mark.parametrize("name", ["llama", "yarn", "linear", "rope_freqs", "gemma3", "smollm3"])
def test_without_a_table_again_it_is_the_model_bit_for_bit(
    engine: Worker, stock: Worker, tmp_path: Path, name: str
) -> None:
    path, (a, b) = model(tmp_path, name), pair()
    wanted = stock.call(after_a_clear, path)
    assert (engine.call(after_a_clear, path) == wanted).all()
    assert (engine.call(after_a_clear, path, a, b, None) == wanted).all()
    assert (engine.call(after_a_clear, path, a, b) != wanted).any()


def many_cells(path: Path, a: Table, b: Table, **settings: Any) -> list[tuple[Keys, Keys]]:
    """Keys of sequences with gaps, shared cells and shifted cells, moved from a to b and decoded under b."""
    tokens = tiny.tokens(90)
    with session(path, n_seq=4, n_ctx=1024, **settings) as s:
        found = []
        for wanted in (a, b):
            s.clear()
            s.set(wanted)
            s.feed(tokens[:50])
            s.feed(tokens[50:], seq=1, first=300)
            s.remove(0, 10, 20)
            s.feed(tokens[:20], seq=3)
            s.shift(64, seq=3)
            # left pending, both
            s.copy(1, 2)
            s.api.llama_memory_seq_add(s.memory, 3, -1, -1, 5)
            if wanted is a:
                s.set(b)
            s.peek(seq=3)
            found.append([s.keys(seq)[0] for seq in range(4)])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0"])
def test_every_cell_turns_at_its_own_position(engine: Worker, tmp_path: Path, unified: bool, cache: str) -> None:
    path = model(tmp_path, "llama", head_dim=32, n_embd=128)
    pairs = engine.call(many_cells, path, *pair(32), cache=cache, unified=unified)
    positions = [p.pos.tolist() for p, _ in pairs]
    assert positions == [[*range(10), *range(20, 50)], [*range(300, 340)], [*range(300, 340)], [*range(69, 89)]]
    for moved, fresh in pairs:
        assert (moved.pos == fresh.pos).all()
        assert rel_rms(moved.values, fresh.values) < 1.5 * PRECISION[cache]


def kept_elsewhere(path: Path, a: Table, b: Table) -> Floats:
    """Layer 0's keys moved from a to b while only a sequence past n_seq_max has them, as a unified cache allows."""
    with session(path) as s:
        s.set(a)
        s.feed(tiny.tokens(40))
        s.copy(0, 7)
        s.remove(0)
        s.set(b)
        s.copy(7, 0)
        return s.keys()[0].values


def test_sequences_past_the_count_turn_too(engine: Worker, tmp_path: Path) -> None:
    (a, b), path = pair(32), model(tmp_path, "llama", head_dim=32, n_embd=128)
    moved, fresh = (engine.call(kept_elsewhere, path, first, b) for first in (a, b))
    assert rel_rms(moved, fresh) < PRECISION["f16"]


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0"])
def test_sliding_windows_stay_as_they_are(engine: Worker, tmp_path: Path, swa_full: bool, cache: str) -> None:
    path, (a, b) = model(tmp_path, "gemma3", head_dim=32), pair(32)
    start, _ = engine.call(rerotated, path, None, cache=cache, swa_full=swa_full)
    moved, after = engine.call(rerotated, path, None, a, b, cache=cache, swa_full=swa_full)
    fresh, wanted = engine.call(rerotated, path, b, cache=cache, swa_full=swa_full)
    # the global layer, the sixth, is saved first
    assert [bool((x.raw != y.raw).any()) for x, y in zip(start, moved, strict=True)] == [True] + 5 * [False]
    assert rel_rms(moved[0].values, fresh[0].values) < 2 * PRECISION[cache]
    assert kl(wanted, after) < (1e-7 if cache == "f32" else 1e-3)


def test_layers_without_rope_stay_as_they_are(engine: Worker, tmp_path: Path) -> None:
    path, (a, b) = model(tmp_path, "smollm3"), pair()
    start, _ = engine.call(rerotated, path, a)
    moved, _ = engine.call(rerotated, path, a, b)
    assert [bool((x.raw != y.raw).any()) for x, y in zip(start, moved, strict=True)] == [True, True, True, False]


def one_key(path: Path, a: Table, b: Table, **settings: Any) -> tuple[Floats, Floats, Floats]:
    """Logits of a second token: under b, after its forerunner's keys were turned from a to b, and under a.

    A first token attends to itself alone: what it leaves in every layer depends on no table, but for its keys' turn.
    """
    found = []
    with session(path, **settings) as s:
        for before, after in ((b, b), (a, b), (a, a)):
            s.clear()
            s.set(before)
            s.feed([9], first=37)
            s.set(after)
            found.append(s.feed([200])[0])
    return found[0], found[1], found[2]


@pytest.mark.parametrize("name", ["llama", "qwen2", "stablelm", "smollm3", "gemma3", "gemma2", "yarn", "rope_freqs"])
def test_every_layer_turns(engine: Worker, tmp_path: Path, name: str) -> None:
    path = model(tmp_path, name, n_layer=tiny.ARCHS[MODELS[name]["arch"]].n_layer)
    a, b = pair(8 if name == "stablelm" else 16)
    for before in (a, None):
        wanted, moved, stale = engine.call(one_key, path, before, b)
        assert kl(wanted, moved) < 1e-4 * kl(wanted, stale)


def test_whole_heads_of_a_quantised_cache(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "stablelm", head_dim=128, n_rot=32, n_embd=256, n_head=2, n_head_kv=2)
    a, b = pair(32)
    fresh, _ = engine.call(rerotated, path, b, cache="q8_0")
    moved, _ = engine.call(rerotated, path, a, b, cache="q8_0")
    assert rel_rms(moved[0].values, fresh[0].values) < PRECISION["q8_0"]


def test_generation_goes_on_under_the_new_table(engine: Worker, tmp_path: Path) -> None:
    a, b = pair()
    path = model(tmp_path, "llama")
    assert np.abs(np.subtract(*engine.call(going_on, path, a, b))).max() < 2e-3


def going_on(path: Path, a: Table, b: Table) -> tuple[Floats, Floats]:
    """Logits of twenty single tokens after 60 others: b from the start, and b set after the 60."""
    tokens, found = tiny.tokens(80), []
    with session(path) as s:
        for before in (b, a):
            s.clear()
            s.set(before)
            s.feed(tokens[:60])
            s.set(b)
            # one at a time, so that the graph is reused
            found.append(np.concatenate([s.feed([token]) for token in tokens[60:]]))
    return found[0], found[1]


def read_back(path: Path, *tables: Table) -> tuple[int, list[ActiveTable | None]]:
    """table_size, and get_table after each table."""
    found = []
    with session(path) as s:
        for wanted in tables:
            s.set(wanted)
            found.append(mrrope_engine.get_table(s.ctx))
        return mrrope_engine.table_size(s.ctx), found


def test_the_table_reads_back(engine: Worker, tmp_path: Path) -> None:
    a, b = pair()
    n, (none, first, second, gone) = engine.call(read_back, model(tmp_path, "llama"), None, a, b, None)
    assert (n, none, gone) == (8, None, None)
    for wanted, held in ((a, first), (b, second)):
        assert held is not None
        assert held.factors == tuple(stored_factors(wanted.radix_values))
        assert held.attn_factor == float(np.float32(wanted.attn_factor))
        assert held.method == "custom"
        assert held.scale == pytest.approx(wanted.factor_values[-1], rel=1e-6)


@pytest.mark.parametrize("head_dim", [16, 80])
def test_heads_of_broken_blocks(engine: Worker, tmp_path: Path, head_dim: int) -> None:
    # llama.cpp takes such a cache without flash attention, and its context shift dies of it
    path, (a, b) = model(tmp_path, "llama", head_dim=head_dim, n_embd=4 * head_dim), pair(head_dim)
    fresh, moved = (engine.call(rerotated, path, *tables, cache="q8_0")[0] for tables in ((b,), (a, b)))
    assert rel_rms(moved[0].values, fresh[0].values) < PRECISION["q8_0"]


def scattered(path: Path, first: Table, second: Table, n: int, step: int, cache: str) -> Keys:
    """Keys of every token but each step-th, decoded under the first table and turned to the second."""
    with session(path, cache=cache, n_ctx=n + 8, table=first) as s:
        s.feed(tiny.tokens(n))
        for at in range(1, n - 1, step):
            s.remove(0, at, at + 1)
        s.set(second)
        return s.keys()[0]


@pytest.mark.parametrize(("n", "step", "cache"), [(700, 2, "f16"), (1500, 3, "q8_0"), (5000, 1000, "q8_0")])
def test_many_ranges_of_cells(engine: Worker, tmp_path: Path, n: int, step: int, cache: str) -> None:
    # more than one graph holds, and more than is dequantised at once
    path, (a, b) = model(tmp_path, "llama", head_dim=32, n_embd=128), pair(32)
    moved, fresh = (engine.call(scattered, path, first, b, n, step, cache) for first in (a, b))
    assert (moved.pos == fresh.pos).all()
    assert rel_rms(moved.values, fresh.values) < PRECISION[cache]


def through_llama(path: Path, a: RopeTable) -> tuple[ActiveTable | None, Floats]:
    """The same calls on a llama_cpp.Llama, and the logits of a prompt."""
    from mrrope_gguf.model import load

    llm = load(path)
    mrrope_engine.set_table(llm, a)
    llm.eval(tiny.tokens(20))
    held, logits = mrrope_engine.get_table(llm), np.array(llm._scores[-1] if llm._logits_all else llm.scores[19])
    llm.close()
    with pytest.raises(EngineTrouble, match="closed"):
        mrrope_engine.set_table(llm, None)
    return held, logits


def test_a_llama_takes_a_table(engine: Worker, tmp_path: Path) -> None:
    held, _ = engine.call(through_llama, model(tmp_path, "llama"), table())
    assert held is not None
    assert held.attn_factor == pytest.approx(table().attn_factor)
