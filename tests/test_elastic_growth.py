"""An elastic context grows at the lengths and to the tables that are promised, however the tokens come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrrope_gguf.engine import get_table
from mrrope_gguf.tables import RopeTable
from tests import tiny
from tests.elastic import (
    COARSE,
    FINE,
    FULL,
    ORIG,
    Policy,
    assert_table,
    by_hand,
    elastic,
    grow_file,
    grown,
    pieces,
    scale_of,
)
from tests.engine_session import session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.engine

TOKENS = tiny.tokens(300)


def scales(path: Path, policy: Policy, size: int, n: int = 300, **params: Any) -> dict[int, float]:
    """S after each piece of `size` tokens, by the number of tokens."""
    found, at = {0: 1.0}, 0
    with elastic(path, policy, **params) as s:
        for piece in pieces(TOKENS[:n], size):
            s.feed(piece)
            at += len(piece)
            found[at] = scale_of(s)
    return found


@pytest.mark.parametrize("policy", [Policy(), FINE, COARSE], ids=["1.25", "fine", "coarse"])
@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0", "q4_0"])
def test_scale_is_a_function_of_the_length(engine: Worker, tmp_path: Path, policy: Policy, cache: str) -> None:
    path = grow_file(tmp_path, "llama", head_dim=32, n_embd=128).path
    wanted = Policy(policy.step, policy.head_room, cache=cache)
    for size in (1, 7, 100, 300):
        found = engine.call(scales, path, wanted, size)
        expected = {n: np.float32(wanted.scale_at(n)) if n else 1.0 for n in found}
        assert found == expected
    assert found[300] == FULL


def test_the_cache_caps_the_stages() -> None:
    # of the statement itself: a coarse cache is given larger steps than asked for
    finest = {cache: len(Policy(1.01, 1.0, cache=cache).stages()) for cache in ("f16", "q8_0", "q4_0")}
    assert finest["f16"] > finest["q8_0"] > finest["q4_0"] >= 2


def measured(path: Path, policy: Policy, lengths: list[int]) -> list[float]:
    """S where so many positions are in use, each in a context of its own."""
    found = []
    with elastic(path, policy) as s:
        for n in lengths:
            s.clear()
            s.feed([5], first=n - 1)
            found.append(scale_of(s))
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.floats(1.0009765625, 8, width=32),
    head_room=st.floats(1, 4, width=32),
    scale=st.sampled_from([1.5, 2.0, 4.0, 16.0]),
    cache=st.sampled_from(["f32", "q8_0", "q4_0"]),
)
def test_any_policy(engine: Worker, tmp_path: Path, step: float, head_room: float, scale: float, cache: str) -> None:
    path = tmp_path / f"llama.{scale}.gguf"
    if not path.exists():
        (folder := tmp_path / str(scale)).mkdir()
        grow_file(folder, "llama", head_dim=32, n_embd=128, scale=scale).path.rename(path)
    policy = Policy(step, head_room, scale, cache=cache)
    lengths = sorted({n + k for n in policy.bounds() for k in (0, 1)} | {1, round(scale * ORIG), 2000})
    found = engine.call(measured, path, policy, lengths)
    assert found == [np.float32(policy.scale_at(n)) for n in lengths]


def default_scales(path: Path) -> list[float]:
    """S at each length as the engine chooses it unasked."""
    with session(path, cache="f16", n_ctx=512) as s:
        found = []
        for token in TOKENS:
            s.feed([token])
            found.append(scale_of(s))
        return found


def test_the_default_covers_the_conversation(engine: Worker, tmp_path: Path) -> None:
    found = engine.call(default_scales, grow_file(tmp_path, "llama", head_dim=32, n_embd=128).path)
    assert found[:ORIG] == [1.0] * ORIG
    assert found[ORIG] > 1.0
    assert all(min(FULL, (i + 1) / ORIG) <= s <= FULL for i, s in enumerate(found))
    assert found == sorted(found)
    assert 3 <= len(set(found)) <= 30


CUSTOM = [1.0, 1.0, 1.1, 1.3, 1.6, 1.4, 1.25, 1.0]
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "pro": ("llama", {}),
    "uni": ("llama", {"method": "mrrope-uni"}),
    "yarn": ("llama", {"method": "yarn"}),
    "yarn-turns": ("llama", {"method": "yarn-turns"}),
    "ntk": ("llama", {"method": "ntk"}),
    "linear": ("llama", {"method": "linear"}),
    "custom": ("llama", {"radix": {"radix": CUSTOM, "scale": 4.0}}),
    "custom, turning at once": ("llama", {"radix": {"radix": CUSTOM, "lead": 1.2, "scale": 4.0, "attn_factor": 1.3}}),
    "custom over rope_freqs": ("rope_freqs", {"radix": {"radix": CUSTOM, "scale": 4.0}}),
    "portable": ("llama", {"rendering": "portable"}),
    "rope_freqs": ("rope_freqs", {}),
    "rope_freqs, portable": ("rope_freqs", {"rendering": "portable", "method": "mrrope-uni"}),
    "partial rotary": ("stablelm", {}),
    "temperature asked for": ("llama", {"attn_factor": 1.3}),
    "no temperature": ("llama", {"attn_factor": 1.0}),
    "smollm3": ("smollm3", {}),
    "gemma3": ("gemma3", {}),
}


def every_stage(path: Path, policy: Policy, table: RopeTable) -> int:
    """Assert the table in effect at each length; how many there were."""
    seen = set()
    with elastic(path, policy, n_ctx=512) as s:
        for n, token in enumerate(TOKENS, 1):
            s.feed([token])
            if n - 1 in (0, *policy.bounds()) or n in policy.bounds():
                assert_table(s, table, policy.scale_at(n))
                seen.add(scale_of(s))
    return len(seen)


@pytest.mark.parametrize("kind", TABLES)
def test_each_stage_is_the_method_at_that_scale(engine: Worker, tmp_path: Path, kind: str) -> None:
    name, wishes = TABLES[kind]
    if "radix" in wishes:
        (tmp_path / "radix.json").write_text(json.dumps(wishes["radix"]))
        wishes = {**wishes, "radix": tmp_path / "radix.json"}
    done = grow_file(tmp_path, name, **wishes)
    policy = Policy()
    assert engine.call(every_stage, done.path, policy, done.table) == len(policy.stages())


def own_temperature(path: Path, policy: Policy) -> list[tuple[float, float]]:
    """(S, attn_factor) at each stage."""
    found = []
    with elastic(path, policy) as s:
        for bound in policy.bounds():
            s.clear()
            s.feed([5], first=bound)
            table = get_table(s.ctx)
            assert table is not None
            found.append((table.scale, table.attn_factor))
    return found


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_a_temperature_of_the_models_own_is_where_it_starts(engine: Worker, tmp_path: Path, rendering: Any) -> None:
    done = grow_file(tmp_path, "llama", rendering, extra={"rope.scaling.attn_factor": 1.25})
    for scale, attn in engine.call(own_temperature, done.path, Policy()):
        assert attn == pytest.approx(1.25 * (0.1 * np.log(scale) + 1), rel=1e-6)


LAYERS = {"gemma3": 6, "smollm3": 4}


@pytest.mark.parametrize("size", [1, 7, 512])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama", {}),
        ("llama", {"flash_attn_type": 1}),
        ("llama", {"unified": False, "n_seq": 2, "n_ctx": 1024}),
        ("qwen2", {}),
        ("stablelm", {}),
        ("rope_freqs", {}),
        ("smollm3", {}),
        ("gemma2", {}),
        ("gemma3", {"swa_full": False}),
    ],
    ids=["llama", "flash", "streams", "qwen2", "stablelm", "rope_freqs", "smollm3", "gemma2", "gemma3"],
)
def test_growing_is_setting_the_tables_by_hand(
    engine: Worker, tmp_path: Path, name: str, params: dict[str, Any], size: int
) -> None:
    path, policy = grow_file(tmp_path, name, n_layer=LAYERS.get(name, 2)).path, Policy()
    wanted = engine.call(by_hand, path, policy, TOKENS, size, **params)
    assert (engine.call(grown, path, policy, TOKENS, size, **params) == wanted).all()


@pytest.mark.parametrize("cache", ["f16", "q8_0", "q4_0"])
def test_in_smaller_caches_too(engine: Worker, tmp_path: Path, cache: str) -> None:
    path, policy = grow_file(tmp_path, "llama", head_dim=32, n_embd=128).path, Policy(cache=cache)
    wanted = engine.call(by_hand, path, policy, TOKENS, 50)
    assert (engine.call(grown, path, policy, TOKENS, 50) == wanted).all()


@pytest.mark.parametrize("n_ubatch", [16, 100])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_how_the_tokens_come_makes_no_difference(engine: Worker, tmp_path: Path, name: str, n_ubatch: int) -> None:
    path, policy = grow_file(tmp_path, name).path, FINE
    at_once = engine.call(grown, path, policy, TOKENS, 512)
    for size in (1, 7, 512):
        found = engine.call(grown, path, policy, TOKENS, size, n_ubatch=n_ubatch)
        np.testing.assert_allclose(found, at_once, atol=5e-3)


def with_gaps(path: Path, policy: Policy) -> list[tuple[int, float]]:
    """(next position, S) as the later half of what is cached moves on and back, and tokens follow it."""
    with elastic(path, policy) as s:
        s.feed(TOKENS[:40])
        found = []
        for delta in (30, 25, 100, 60, -150, 0):
            if delta:
                s.api.llama_memory_seq_add(s.memory, 0, 30, -1, delta)
            s.feed(TOKENS[:10])
            found.append((s.next(), scale_of(s)))
        return found


def test_gaps_count(engine: Worker, tmp_path: Path) -> None:
    policy = FINE
    found = engine.call(with_gaps, grow_file(tmp_path, "llama", n_layer=2).path, policy)
    assert [n for n, _ in found] == [80, 115, 225, 295, 155, 165]
    assert [s for _, s in found] == [np.float32(policy.scale_at(n)) for n, _ in found]


def test_past_the_file_it_stays_at_the_full_table(engine: Worker, tmp_path: Path) -> None:
    done = grow_file(tmp_path, "llama")
    found = engine.call(measured, done.path, Policy(), [256, 257, 1000, 100_000])
    assert found == [FULL] * 4
