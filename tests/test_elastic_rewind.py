"""Removed tokens take their scale with them, and several sequences share the largest need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine import get_table
from tests import tiny
from tests.elastic import FINE, PRECISION, Policy, elastic, feed, grow_file, scale_of, scratch
from tests.engine_session import Keys, Session, kl, rel_rms
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS, OTHERS = tiny.tokens(300), tiny.tokens(300, seed=1)
BROAD: dict[str, Any] = {"head_dim": 32, "n_embd": 128}
# KL of the next token's logits where keys were rounded a few times more
CLOSE = {"f32": 1e-6, "f16": 1e-3, "q8_0": 0.02, "q4_0": 3.0}


def rewound(path: Path, policy: Policy, keep: int, **params: Any) -> tuple[Floats, Floats, list[float], list[Keys]]:
    """Next tokens' logits after keep tokens: of a fresh context, and of one that had grown to 250; S on the way."""
    with elastic(path, policy, **params) as s:
        s.feed(TOKENS[:keep])
        fresh, kept = s.feed(OTHERS[:4]), s.keys()[0]
        s.clear()
        s.feed(TOKENS[:250])
        found = [scale_of(s)]
        s.remove(0, keep)
        found.append(scale_of(s))
        again = s.feed(OTHERS[:4])
        found.append(scale_of(s))
        assert (get_table(s.ctx) is None) == (scale_of(s) == 1.0)
        return fresh, again, found, [kept, s.keys()[0]]


@pytest.mark.parametrize("keep", [20, 60, 64, 100])
@pytest.mark.parametrize("cache", CLOSE)
def test_back_inside_the_window(engine: Worker, tmp_path: Path, cache: str, keep: int) -> None:
    path, policy = grow_file(tmp_path, "llama", **BROAD).path, Policy(cache=cache)
    fresh, again, found, (wanted, keys) = engine.call(rewound, path, policy, keep)
    assert found == [policy.scale, policy.scale, np.float32(policy.scale_at(keep + 4))]
    # the engine moves at the next decode; then it is as if the longer text had never been
    assert rel_rms(keys.values, wanted.values) < PRECISION[cache] * 2 * len(policy.stages()) ** 0.5
    if keep <= 60:
        # one layer: values do not depend on the table, so rounding is all
        assert max(kl(a, b) for a, b in zip(fresh, again, strict=True)) < CLOSE[cache]


@pytest.mark.parametrize("params", [{"flash_attn_type": 1}, {"unified": False}, {"n_ubatch": 16}], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "stablelm", "rope_freqs"])
def test_other_models_and_settings(engine: Worker, tmp_path: Path, name: str, params: dict[str, Any]) -> None:
    path = grow_file(tmp_path, name).path
    fresh, again, found, _ = engine.call(rewound, path, FINE, 60, **params)
    assert found[-1] == 1.0
    np.testing.assert_allclose(again, fresh, atol=2e-3)


@pytest.mark.parametrize("name", ["llama", "smollm3", "gemma2", "gemma3"])
def test_deeper_layers_keep_what_they_saw_in_the_window(engine: Worker, tmp_path: Path, name: str) -> None:
    # what was cached under the first table is all that is left: so it is a fresh context's, layer by layer
    layers = tiny.ARCHS[name].n_layer
    path = grow_file(tmp_path, name, n_layer=layers).path
    fresh, again, _, _ = engine.call(rewound_after_growth, path, Policy())
    np.testing.assert_allclose(again, fresh, atol=5e-3)


def rewound_after_growth(path: Path, policy: Policy) -> tuple[Floats, Floats, list[float], list[Keys]]:
    """As `rewound`, but the first tokens came in a batch of their own, as the fresh context's did."""
    with elastic(path, policy) as s:
        s.feed(TOKENS[:50])
        fresh = s.feed(OTHERS[:4])
        s.remove(0, 50)
        s.feed(TOKENS[50:250])
        s.remove(0, 50)
        return fresh, s.feed(OTHERS[:4]), [], []


def regrown(path: Path, policy: Policy) -> tuple[Floats, Floats, list[float], list[float]]:
    """Logits and S of a text's second half: after its first alone, and after a longer one was wound back to it."""
    rows: list[Floats] = []
    seen: list[list[float]] = []
    with elastic(path, policy) as s:
        for longer in (False, True):
            s.clear()
            s.feed(TOKENS[:60])
            if longer:
                s.feed(OTHERS[:230])
                s.remove(0, 60)
            rows.append(feed(s, TOKENS[60:260], 10))
            seen.append([])
            s.remove(0, 60)
            for token in TOKENS[60:260]:
                s.feed([token])
                seen[-1].append(scale_of(s))
    return rows[0], rows[1], seen[0], seen[1]


@pytest.mark.parametrize("policy", [Policy(), FINE], ids=["1.25", "fine"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_growth_goes_on_as_before(engine: Worker, tmp_path: Path, name: str, policy: Policy) -> None:
    path = grow_file(tmp_path, name, n_layer=tiny.ARCHS[name].n_layer).path
    once, again, seen, seen_again = engine.call(regrown, path, policy)
    np.testing.assert_allclose(again, once, atol=1e-2)
    assert seen == seen_again == [np.float32(policy.scale_at(n)) for n in range(61, 261)]


def emptied(path: Path, policy: Policy, how: str) -> tuple[bool, list[float]]:
    """Whether a text in an emptied context has the bits of a first one, growth and all; S while it grows."""
    with elastic(path, policy, n_seq=2) as s:
        first = feed(s, TOKENS, 50)
        s.feed(OTHERS[:90], seq=1)
        if how == "clear":
            s.clear()
        elif how == "remove all":
            s.remove(-1)
        else:
            s.remove(1)
            s.remove(0, 0)
        found = []
        rows = []
        for at in range(0, 300, 50):
            rows.append(s.feed(TOKENS[at : at + 50]))
            found.append(scale_of(s))
        return bool((np.concatenate(rows) == first).all()), found


@pytest.mark.parametrize("cache", ["f32", "q8_0"])
@pytest.mark.parametrize("how", ["clear", "remove all", "remove each"])
def test_an_emptied_context_is_a_new_one(engine: Worker, tmp_path: Path, how: str, cache: str) -> None:
    path, policy = grow_file(tmp_path, "llama", n_layer=2, **BROAD).path, Policy(cache=cache)
    same, found = engine.call(emptied, path, policy, how)
    assert same
    assert found == [np.float32(policy.scale_at(n)) for n in range(50, 301, 50)]


def cut_out(path: Path, policy: Policy) -> list[float]:
    """S after tokens in the middle go, then after those behind them move up, then after they move back."""
    with elastic(path, policy) as s:
        s.feed(TOKENS[:150])
        found = [scale_of(s)]
        s.remove(0, 10, 100)
        s.peek()
        found.append(scale_of(s))
        s.shift(-90, first=100)
        found.append(scale_of(s))
        s.shift(90, first=10)
        found.append(scale_of(s))
        return found


def test_what_counts_is_the_last_position(engine: Worker, tmp_path: Path) -> None:
    policy = FINE
    found = engine.call(cut_out, grow_file(tmp_path, "llama").path, policy)
    assert found == [np.float32(policy.scale_at(n)) for n in (150, 151, 61, 151)]


def slid(path: Path, policy: Policy) -> list[float]:
    """S in a context that is full, drops its older half and moves the rest up, as chat programs do."""
    found = []
    with elastic(path, policy, n_ctx=256) as s:
        for token in (TOKENS * 3)[:700]:
            if s.next() == 200:
                s.remove(0, 4, 102)
                s.api.llama_memory_seq_add(s.memory, 0, 102, -1, -98)
            s.feed([token])
            found.append((s.next(), scale_of(s)))
    assert [scale for _, scale in found] == [np.float32(policy.scale_at(n)) for n, _ in found]
    return [scale for _, scale in found]


@pytest.mark.parametrize("cache", ["f32", "q8_0"])
def test_a_context_that_shifts(engine: Worker, tmp_path: Path, cache: str) -> None:
    found = engine.call(slid, grow_file(tmp_path, "llama", **BROAD).path, Policy(cache=cache))
    assert len(set(found)) > 3


def beside(path: Path, policy: Policy, unified: bool) -> list[tuple[float, list[float]]]:
    """S, and the errors of the keys, of a short and a long sequence while the long one grows, shrinks and goes."""
    found = []
    with elastic(path, policy, n_seq=3, unified=unified, n_ctx=2048) as s:
        s.feed(OTHERS[:30], seq=1)

        def look() -> None:
            s.feed([OTHERS[s.next(1)]], seq=1)
            found.append((scale_of(s), [_error(path, s, seq) for seq in (0, 1) if s.next(seq)]))

        look()
        s.feed(TOKENS[:90])
        look()
        s.feed(TOKENS[90:280])
        look()
        s.copy(0, 2)
        s.remove(0, 120)
        look()
        s.remove(2)
        look()
        s.remove(0)
        look()
        return found


def _error(path: Path, s: Session, seq: int) -> float:
    tokens = OTHERS if seq == 1 else TOKENS
    held = dict(enumerate(tokens[: s.next(seq)]))
    return rel_rms(s.keys(seq)[0].values, scratch(path, get_table(s.ctx), held, "f32"))


@pytest.mark.parametrize("unified", [True, False])
def test_a_short_sequence_beside_a_long_one(engine: Worker, tmp_path: Path, unified: bool) -> None:
    policy = FINE
    found = engine.call(beside, grow_file(tmp_path, "llama", **BROAD).path, policy, unified)
    assert [s for s, _ in found] == [np.float32(policy.scale_at(n)) for n in (31, 90, 280, 280, 120, 36)]
    assert max(error for _, errors in found for error in errors) < 1e-4
