"""Whatever a conversation does, its cached keys are those of the table in effect, and that is the one it needs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrrope_gguf.engine import ActiveTable, get_table, set_elastic, set_elastic_policy, set_factors, set_table
from tests import tiny
from tests.elastic import COARSE, FINE, PRECISION, Held, Policy, elastic, feed, grow_file, scale_of, scratch
from tests.engine_session import HEAD, RECORD, Session, kl, record_size, rel_rms
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS = tiny.tokens(300)
BROAD: dict[str, Any] = {"head_dim": 32, "n_embd": 128}


def errors(path: Path, s: Session, texts: dict[int, Held], cache: str) -> list[float]:
    """Relative RMS error of each sequence's keys of layer 0."""
    table, found = get_table(s.ctx), []
    for seq, held in texts.items():
        keys = s.keys(seq)[0]
        assert keys.pos.tolist() == sorted(held)
        found.append(rel_rms(keys.values, scratch(path, table, held, cache)))
    return found


def grown(path: Path, policy: Policy, sizes: list[int], **params: Any) -> list[tuple[int, float, float]]:
    """(length, S, error of layer 0's keys) after each piece of a text."""
    found, at = [], 0
    with elastic(path, policy, **params) as s:
        for size in sizes:
            feed(s, TOKENS[at : at + size], 16)
            at += size
            found.append((at, scale_of(s), errors(path, s, {0: dict(enumerate(TOKENS[:at]))}, policy.cache)[0]))
    return found


def moves(policy: Policy, n: int) -> int:
    return sum(bound < n for bound in policy.bounds())


@pytest.mark.parametrize("policy", [Policy(), FINE, COARSE], ids=["1.25", "fine", "coarse"])
@pytest.mark.parametrize("cache", PRECISION)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_keys_after_growth(engine: Worker, tmp_path: Path, name: str, cache: str, policy: Policy) -> None:
    path = grow_file(tmp_path, name, **BROAD).path
    wanted = Policy(policy.step, policy.head_room, cache="f16" if cache == "bf16" else cache)
    actual = Policy(policy.step, policy.head_room, cache=cache)
    for n, scale, error in engine.call(grown, path, actual, [60, 20, 40, 80, 90]):
        assert scale == np.float32(wanted.scale_at(n))
        assert error < PRECISION[cache] * max(1.0, moves(actual, n)) ** 0.5


@pytest.mark.parametrize("cache", ["f32", "q8_0"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rendering": "portable", **BROAD}),
        ("rope_freqs", {"rope_freqs": [1.0] * 4 + [2.0] * 4 + [8.0] * 8, **BROAD}),
        ("stablelm", {"head_dim": 64, "n_rot": 32, "n_embd": 128, "n_head": 2}),
        ("smollm3", BROAD),
        ("llama", {"method": "ntk", **BROAD}),
        ("llama", {"method": "linear", **BROAD}),
    ],
    ids=["portable", "rope_freqs", "partial", "smollm3", "ntk", "linear"],
)
def test_keys_of_other_models(engine: Worker, tmp_path: Path, name: str, changes: dict[str, Any], cache: str) -> None:
    path, policy = grow_file(tmp_path, name, **changes).path, Policy(cache=cache)
    for n, _, error in engine.call(grown, path, policy, [100, 190]):
        assert error < 2 * PRECISION[cache] * moves(policy, n) ** 0.5


def one_key(path: Path, policy: Policy, n: int) -> tuple[Floats, Floats, Floats]:
    """Logits of a token that n positions away from one other needs a larger S, which the other was not decoded under.

    They are: as the context grows, under that table from the start, and where the other's keys did not turn.
    A first token attends to itself alone: what it leaves in every layer depends on no table, but for its keys' turn.
    """
    found = []
    with elastic(path, policy) as s:
        s.feed([9], first=37)
        s.api.llama_memory_seq_add(s.memory, 0, -1, -1, n)
        found.append(s.feed([200])[0])
        full = get_table(s.ctx)
        assert full is not None
        for first in (full, None):
            s.clear()
            set_factors(s.ctx, full.factors, full.attn_factor)
            if first is None:
                set_table(s.ctx, None)
            s.feed([9], first=37 + n)
            state = s.state(0)
            if first is None:
                s.clear()
                set_factors(s.ctx, full.factors, full.attn_factor)
                # the same bytes under another name: what a context that forgot to turn them would hold
                s.restore(renamed(state, full), 0)
            found.append(s.feed([200])[0])
    return found[0], found[1], found[2]


def renamed(state: bytes, table: ActiveTable) -> bytes:
    """A sequence's state with the record of another table."""
    n = len(table.factors)
    record = struct.pack(f"<4sIIf{n}f", RECORD, 1, n, table.attn_factor, *table.factors)
    return state[:HEAD] + record + state[HEAD + record_size(state, HEAD) :]


@pytest.mark.parametrize("name", ["llama", "qwen2", "stablelm", "smollm3", "gemma3", "gemma2", "rope_freqs"])
def test_every_layer_turns(engine: Worker, tmp_path: Path, name: str) -> None:
    path = grow_file(tmp_path, name, n_layer=tiny.ARCHS[name if name in tiny.ARCHS else "llama"].n_layer).path
    found, wanted, stale = engine.call(one_key, path, Policy(), 200)
    assert kl(wanted, stale) > 1e-4
    assert kl(wanted, found) < 1e-3 * kl(wanted, stale)


class Player:
    """Plays random moves on a context, and keeps the book of what it must hold."""

    def __init__(self, s: Session, policy: Policy, unified: bool, n_seq: int = 3) -> None:
        self.s, self.policy, self.unified = s, policy, unified
        self.texts: dict[int, Held] = {seq: {} for seq in range(n_seq)}
        self.shared: set[int] = set()
        self.turns = 0  # how often keys may have been rounded again
        self.scale = 1.0
        self.pending = False

    def longest(self) -> int:
        return max((max(held) + 1 for held in self.texts.values() if held), default=0)

    def decoded(self, extra: int = 0) -> None:
        """S is what the longest sequence needs; it may have been passed through all stages on the way."""
        assert scale_of(self.s) == np.float32(self.policy.scale_at(max(self.longest(), extra)))
        self.pending = False

    def feed(self, seq: int, n: int, first: int) -> None:
        held = self.texts[seq]
        at = max(held) + 1 if held else first
        tokens = [TOKENS[(at + i + 7 * seq) % len(TOKENS)] for i in range(n)]
        before = self.longest()
        self.s.feed(tokens, seq=seq, first=at)
        held.update(zip(range(at, at + n), tokens, strict=True))
        self.turns += 1 + abs(moves(self.policy, self.longest()) - moves(self.policy, before))
        self.decoded()

    def shift(self, seq: int, part: int, delta: int) -> None:
        held = self.texts[seq]
        if not held or (seq in self.shared and self.unified):
            return
        first = sorted(held)[part % len(held)]
        stay = {pos: token for pos, token in held.items() if pos < first}
        low = max(stay) + 1 if stay else 0
        delta = max(delta, low - first)
        self.s.api.llama_memory_seq_add(self.s.memory, seq, first, -1, delta)
        self.texts[seq] = stay | {pos + delta: token for pos, token in held.items() if pos >= first}
        self.turns += 1
        self.pending = True

    def remove(self, seq: int, part: int, n: int) -> None:
        held = self.texts[seq]
        if not held:
            return
        first = sorted(held)[part % len(held)]
        self.s.remove(seq, first, first + n)
        self.texts[seq] = {pos: token for pos, token in held.items() if not first <= pos < first + n}

    def drop(self, seq: int) -> None:
        self.s.remove(seq)
        self.texts[seq] = {}
        self.shared.discard(seq)

    def settle(self) -> None:
        """Decode a token and forget it, so that no shift and no copy is left to do."""
        for seq, held in self.texts.items():
            if held:
                self.s.peek(seq=seq)
                self.turns += 2
                self.decoded(max(held) + 2)
                return

    def copy(self, source: int, target: int) -> None:
        if source == target or not self.texts[source]:
            return
        if self.pending:
            self.settle()
        self.drop(target)
        self.s.copy(source, target)
        self.texts[target] = dict(self.texts[source])
        self.shared |= {source, target}
        self.pending = True

    def reload(self, source: int, target: int) -> None:
        """Save a sequence and restore it as another, or as itself."""
        if not self.texts[source]:
            return
        if self.pending:
            self.settle()
        state = self.s.state(source)
        assert self.s.restore(state, target) == len(state)
        self.texts[target] = dict(self.texts[source])
        self.shared.discard(target)
        self.turns += 3

    def change(self, policy: Policy) -> None:
        self.policy = policy
        set_elastic_policy(self.s.ctx, step=policy.step, head_room=policy.head_room)
        self.turns += 1

    def switch(self) -> None:
        set_elastic(self.s.ctx, False)
        assert scale_of(self.s) == self.policy.scale
        set_elastic(self.s.ctx, True)
        self.turns += 2


SEQ = st.integers(0, 2)
MOVES = st.one_of(
    st.tuples(st.just("feed"), SEQ, st.integers(1, 120), st.sampled_from([0, 0, 50, 130])),
    st.tuples(st.just("feed"), SEQ, st.integers(1, 20), st.just(0)),
    st.tuples(st.just("shift"), SEQ, st.integers(0, 60), st.integers(-80, 80)),
    st.tuples(st.just("remove"), SEQ, st.integers(0, 100), st.sampled_from([1, 10, 1000])),
    st.tuples(st.just("copy"), SEQ, SEQ),
    st.tuples(st.just("reload"), SEQ, SEQ),
    st.tuples(st.just("drop"), SEQ),
    st.tuples(st.just("change"), st.sampled_from([Policy(), Policy(1.5, 1.0), Policy(2.0, 1.5)])),
    st.tuples(st.just("switch")),
)


def played(path: Path, script: list[tuple[Any, ...]], cache: str, unified: bool) -> tuple[list[float], int]:
    """Errors of each sequence's keys after the moves, and how often they may have been rounded."""
    policy = Policy(cache=cache)
    with elastic(path, policy, n_seq=3, unified=unified, n_ctx=3 * 1024) as s:
        player = Player(s, policy, unified)
        for name, *arguments in script:
            if name == "feed" and player.longest() > 500:
                continue
            if name == "change":
                arguments = [Policy(arguments[0].step, arguments[0].head_room, cache=cache)]
            getattr(player, name)(*arguments)
        player.settle()
        texts = {seq: held for seq, held in player.texts.items() if held}
        return errors(path, s, texts, cache), player.turns


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(MOVES, min_size=3, max_size=14),
    cache=st.sampled_from(["f32", "f32", "f16", "q8_0"]),
    unified=st.booleans(),
)
def test_any_conversation(
    engine: Worker, tmp_path_factory: pytest.TempPathFactory, script: list[tuple[Any, ...]], cache: str, unified: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any" / "llama.engine.gguf"
    if not path.exists():
        path.parent.mkdir()
        grow_file(path.parent, "llama", **BROAD)
    found, turns = engine.call(played, path, script, cache, unified)
    for error in found:
        # at position 600 float32 angles alone are worth 3e-5
        assert error < max(PRECISION[cache], 5e-5) * max(turns, 1) ** 0.5
