"""A context shift turns keys and does nothing else. On stock each multiplies the temperature into all keys again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf import fetch
from mrrope_gguf.extend import extend
from mrrope_gguf.tables import RopeTable, rope_table
from tests import tiny
from tests.engine_models import model
from tests.engine_session import Keys, Table, kl, rel_rms, requantise, session
from tests.engine_worker import Died, Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

# of mrrope-pro at S = 4: 0.1 ln 4 + 1
ATTN = 1.1386

# what one more rounding costs a key, times three: relative RMS
PRECISION = {"f32": 1e-5, "f16": 6e-4, "bf16": 5e-3, "q8_0": 0.015, "q4_0": 0.25}


def table(n_rot: int = 16, scale: float = 4.0, method: str = "mrrope-pro") -> RopeTable:
    return rope_table(method, n_rot=n_rot, freq_base=1e4, n_ctx_orig=64, scale=scale)


def net_zero(path: Path, n: int = 200, text: str = "", rounds: int = 5, delta: int = 64, **settings: Any) -> float:
    """KL of the next token's logits after shifts by +delta and -delta, `rounds` of each, from those before.

    After n tokens of `text`, or n random ones.
    """
    with session(path, n_ctx=n + 2, **settings) as s:
        *tokens, last = s.tokenize(text)[: n + 1] if text else tiny.tokens(n + 1)
        s.feed(tokens)
        before = s.peek(last)
        for _ in range(rounds):
            s.shift(delta)
            s.shift(-delta)
        return kl(before, s.peek(last))


def shifted(path: Path, delta: int, at: int = 0, **settings: Any) -> tuple[list[Keys], Floats]:
    """Keys and next logits of 40 tokens that were decoded at `at` and moved by `delta`."""
    with session(path, **settings) as s:
        s.feed(tiny.tokens(40), first=at)
        if delta:
            s.shift(delta)
        return s.keys(), s.peek()


@pytest.mark.parametrize("name", ["llama", "yarn", "linear", "rope_freqs", "qwen2", "stablelm"])
def test_shifts_there_and_back_change_nothing(engine: Worker, tmp_path: Path, name: str) -> None:
    path = model(tmp_path, name, n_layer=2)
    assert engine.call(net_zero, path) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "stablelm", "smollm3", "gemma3"])
def test_nor_do_they_under_a_table(engine: Worker, tmp_path: Path, name: str) -> None:
    wanted = table(8 if name == "stablelm" else 16)
    assert wanted.attn_factor == pytest.approx(ATTN, abs=1e-4)
    assert engine.call(net_zero, model(tmp_path, name), table=wanted) < 1e-4


def test_nor_in_a_portable_file(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    path = extend(model(tmp_path, "llama", n_layer=2), tmp_path / "out.gguf", scale=4, elastic=False).path
    assert stock.call(net_zero, path) > 0.05
    assert engine.call(net_zero, path) < 1e-4


def test_the_bug_of_stock_that_this_is_about(stock: Worker, tmp_path: Path) -> None:
    assert stock.call(net_zero, model(tmp_path, "yarn", n_layer=2)) > 0.05
    assert stock.call(net_zero, model(tmp_path, "llama", n_layer=2)) < 1e-4


@pytest.fixture(scope="module")
def smooth(stock: Worker, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with f16 weights: q4_1 rounds activations to 8 bits, and a KL of 1e-6 becomes 1e-3."""
    path = tmp_path_factory.mktemp("smollm2") / "f16.gguf"
    stock.call(requantise, smollm2, path, 1)
    return path


@pytest.mark.real
def test_shifts_of_smollm2_at_its_temperature(engine: Worker, stock: Worker, smooth: Path, tmp_path: Path) -> None:
    extended = extend(smooth, tmp_path / "out.gguf", scale=4, elastic=False).path
    text = fetch.article(fetch.fetch(fetch.BRITANNICA))
    assert stock.call(net_zero, extended, text=text) > 0.1
    assert engine.call(net_zero, extended, text=text) < 1e-4


@pytest.mark.real
def test_shifts_of_smollm2_under_stock_yarn(engine: Worker, stock: Worker, smooth: Path) -> None:
    # -1 takes what the type asks for
    yarn: Any = {"rope_scaling_type": 2, "rope_freq_scale": 0.25, "yarn_orig_ctx": 8192}
    yarn["text"] = fetch.article(fetch.fetch(fetch.BRITANNICA))
    assert stock.call(net_zero, smooth, **yarn) > 0.1
    assert engine.call(net_zero, smooth, **yarn) < 1e-4


@pytest.mark.parametrize("cache", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "yarn"])
@pytest.mark.parametrize("tabled", [False, True], ids=["no table", "table"])
def test_a_shift_is_decoding_at_the_new_positions(
    engine: Worker, tmp_path: Path, name: str, cache: str, tabled: bool
) -> None:
    path = model(tmp_path, name, head_dim=32, n_embd=128)
    at_once: Table = table(32) if tabled else None
    moved, after = engine.call(shifted, path, 64, cache=cache, table=at_once)
    fresh, wanted = engine.call(shifted, path, 0, at=64, cache=cache, table=at_once)
    stale, _ = engine.call(shifted, path, 0, cache=cache, table=at_once)
    assert (moved[0].pos == fresh[0].pos).all()
    assert rel_rms(moved[0].values, fresh[0].values) < PRECISION[cache]
    assert rel_rms(stale[0].values, fresh[0].values) > 0.3  # doing nothing does not pass
    assert kl(wanted, after) < (1e-6 if cache == "f32" else 1e-3)


@pytest.mark.parametrize("name", ["rope_freqs", "linear", "stablelm"])
@pytest.mark.parametrize("tabled", [False, True], ids=["no table", "table"])
def test_a_shift_under_other_scalings(engine: Worker, tmp_path: Path, name: str, tabled: bool) -> None:
    path = model(tmp_path, name)
    at_once = table(8 if name == "stablelm" else 16) if tabled else None
    moved, after = engine.call(shifted, path, 64, table=at_once)
    fresh, wanted = engine.call(shifted, path, 0, at=64, table=at_once)
    assert rel_rms(moved[0].values, fresh[0].values) < PRECISION["f32"]
    assert kl(wanted, after) < 1e-6


def some_shifted(path: Path, **settings: Any) -> tuple[Keys, Keys, Keys, Keys]:
    """Keys of a sequence before and after its positions from 10 on moved by 7, those that decoding there gives, and
    those of another sequence after the move."""
    tokens = tiny.tokens(40)
    with session(path, n_seq=3, **settings) as s:
        s.feed(tokens)
        s.feed(tokens, seq=1)
        before = s.keys()
        s.shift(7, first=10)
        s.feed(tokens[10:], seq=2, first=17)
        return before[0], s.keys()[0], s.keys(2)[0], s.keys(1)[0]


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("tabled", [False, True], ids=["no table", "table"])
def test_cells_that_do_not_move_keep_their_bytes(engine: Worker, tmp_path: Path, unified: bool, tabled: bool) -> None:
    at_once = table(32) if tabled else None
    path = model(tmp_path, "llama", head_dim=32)
    before, after, fresh, other = engine.call(some_shifted, path, cache="f16", unified=unified, table=at_once)
    assert after.pos.tolist() == [*range(10), *range(17, 47)]
    assert (after.raw[:10] == before.raw[:10]).all()
    assert (other.raw == before.raw).all()
    assert rel_rms(after.values[10:], fresh.values) < PRECISION["f16"]


def before_and_after(path: Path, delta: int = 64, **settings: Any) -> tuple[list[Keys], list[Keys], float]:
    """Keys before and after all positions move, and the KL of the next logits: only distances count, so none."""
    with session(path, n_ctx=512, **settings) as s:
        s.feed(tiny.tokens(120))
        before, logits = s.keys(), s.peek()
        s.shift(delta)
        return before, s.keys(), kl(logits, s.peek())


def changed(before: list[Keys], after: list[Keys]) -> list[bool]:
    return [bool((a.raw != b.raw).any()) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("tabled", [False, True], ids=["no table", "table"])
def test_layers_without_rope_are_left_alone(engine: Worker, stock: Worker, tmp_path: Path, tabled: bool) -> None:
    path = model(tmp_path, "smollm3", n_layer=8)
    at_once = table() if tabled else None
    before, after, distance = engine.call(before_and_after, path, table=at_once)
    assert changed(before, after) == [True, True, True, False] * 2
    assert distance < 1e-6
    if not tabled:
        assert stock.call(before_and_after, path)[2] > 0.01


def test_rope_on_sliding_windows_alone(engine: Worker, tmp_path: Path) -> None:
    # the global layer comes first: the cache of those is saved before that of the windows
    before, after, distance = engine.call(before_and_after, model(tmp_path, "cohere2"))
    assert changed(before, after) == [False, True, True, True]
    assert distance < 1e-6


@pytest.mark.parametrize("swa_full", [True, False])
def test_sliding_windows_turn_by_their_own_angles(engine: Worker, tmp_path: Path, swa_full: bool) -> None:
    before, after, distance = engine.call(before_and_after, model(tmp_path, "gemma3"), table=table(), swa_full=swa_full)
    assert changed(before, after) == [True] * 6
    assert distance < 1e-6


@pytest.mark.parametrize(("head_dim", "n_rot"), [(128, 32), (64, 64), (32, 32), (96, 96), (96, 32)])
@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
def test_whole_heads_of_a_quantised_cache(
    engine: Worker, tmp_path: Path, head_dim: int, n_rot: int, cache: str
) -> None:
    # llama.cpp turns the heads of a quantised cache by a Hadamard matrix where their size is a multiple of 64
    path = model(tmp_path, "stablelm", head_dim=head_dim, n_rot=n_rot, n_embd=2 * head_dim, n_head=2, n_head_kv=2)
    moved, _ = engine.call(shifted, path, 64, cache=cache)
    fresh, _ = engine.call(shifted, path, 0, at=64, cache=cache)
    assert rel_rms(moved[0].values, fresh[0].values) < PRECISION[cache]


def test_stock_mixes_up_partial_rotary_in_a_quantised_cache(stock: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "stablelm", head_dim=128, n_rot=32, n_embd=256, n_head=2, n_head_kv=2)
    try:
        moved, _ = stock.call(shifted, path, 64, cache="q8_0")
    except Died:
        return
    fresh, _ = stock.call(shifted, path, 0, at=64, cache="q8_0")
    assert rel_rms(moved[0].values, fresh[0].values) > 10 * PRECISION["q8_0"]


def two_shifts(path: Path) -> tuple[Floats, Floats]:
    """Next logits after two pending shifts applied at once, and after decoding there."""
    tokens = tiny.tokens(40)
    with session(path, table=table()) as s:
        s.feed(tokens)
        s.api.llama_memory_seq_add(s.memory, 0, -1, -1, 30)
        s.api.llama_memory_seq_add(s.memory, 0, -1, -1, -11)
        pending = s.peek()
        s.clear()
        s.feed(tokens, first=19)
        return pending, s.peek()


def test_shifts_add_up(engine: Worker, tmp_path: Path) -> None:
    pending, fresh = engine.call(two_shifts, model(tmp_path, "llama"))
    np.testing.assert_allclose(pending, fresh, atol=2e-4)
