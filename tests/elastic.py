"""What an elastic context must do, written down a second time: when it grows, to which table, and a driver of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrrope_gguf.engine import ActiveTable, get_elastic, get_table, set_elastic_policy, set_factors, set_table
from mrrope_gguf.extend import Extended, extend
from mrrope_gguf.tables import RopeTable, rescale, stored_factors
from tests.engine_models import MODELS, model, table_keys
from tests.engine_session import Session, session

if TYPE_CHECKING:
    from tests.engine_session import Floats

ORIG, FULL = 64, 4.0
# what the tests set unless they are about the defaults
STEP, HEAD_ROOM = 1.25, 1.25
# how many times a cache of each type is rotated on the way to its full table
STAGES = {"f32": 24, "f16": 24, "bf16": 24, "q8_0": 8, "q4_0": 2}
# what one rotation costs a key, times three: relative RMS
PRECISION = {"f32": 1e-5, "f16": 6e-4, "bf16": 5e-3, "q8_0": 0.015, "q4_0": 0.25}


Held = dict[int, int]  # the token at each position


@dataclass(frozen=True)
class Policy:
    """S of a length, as llama.h and docs/elastic.md state it."""

    step: float = STEP
    head_room: float = HEAD_ROOM
    scale: float = FULL
    orig: int = ORIG
    cache: str = "f32"

    def stages(self) -> list[tuple[float, float]]:
        """(the most positions, S) of each stage; the first is the original model, the last has no end."""
        step = max(float(np.float32(self.step)), self.scale ** (1 / STAGES[self.cache]))
        found: list[tuple[float, float]] = [(self.orig, 1.0)]
        length = self.orig * step
        while True:
            s = float(np.float32(self.head_room)) * length / self.orig
            if s >= 0.999 * self.scale or length >= 0.999 * self.orig * self.scale:
                return [*found, (math.inf, self.scale)]
            found.append((math.floor(length + 0.5), s))
            length *= step

    def scale_at(self, n: int) -> float:
        """S where positions 0..n-1 are in use."""
        return next(s for bound, s in self.stages() if n <= bound)

    def bounds(self) -> list[int]:
        """The lengths at which the table changes."""
        return [int(bound) for bound, _ in self.stages()[:-1]]


# one token a step grows as finely as the cache bears
FINE = Policy(step=1.06, head_room=1.0)
COARSE = Policy(step=2.0, head_room=1.0)


def grow_file(folder: Path, name: str, rendering: Any = "engine", scale: float = FULL, **changes: Any) -> Extended:
    """MODELS[name] extended as `extend` does it; method=, attn_factor=, radix= and force= are its own arguments.

    The method is mrrope-pro where none is named: what the tests state a second time in Python.
    """
    wish = {key: changes.pop(key) for key in ("method", "attn_factor", "radix", "force") if key in changes}
    if "radix" not in wish:
        wish.setdefault("method", "mrrope-pro")
    source, out = model(folder, name, **changes), folder / f"{name}.{rendering}.gguf"
    return extend(source, out, scale=scale, rendering=rendering, **wish)


def extended(folder: Path, name: str, rendering: Any = "engine", **changes: Any) -> tuple[Path, Path]:
    """(source, extended file)."""
    done = grow_file(folder, name, rendering, **changes)
    return done.source, done.path


def with_keys(folder: Path, name: str, words: dict[str, Any] | None = None, **changes: Any) -> tuple[Path, Path]:
    """(source, the same with the keys of an elastic table): what `extend` would not write."""
    source = model(folder, name)
    extra = {
        **MODELS[name].get("extra", {}),
        **changes.pop("extra", {}),
        **table_keys({"elastic": True, **(words or {})}),
    }
    other = folder / "elastic"
    other.mkdir(exist_ok=True)
    return source, model(other, name, **changes, extra=extra)


@contextmanager
def elastic(path: Path, policy: Policy | None = None, **settings: Any) -> Iterator[Session]:
    """A session whose table follows it, by the policy of these tests or another one."""
    wanted = policy or Policy()
    with session(path, cache=wanted.cache, **{"n_ctx": 512, **settings}) as s:
        set_elastic_policy(s.ctx, step=wanted.step, head_room=wanted.head_room)
        yield s


def scale_of(s: Session) -> float:
    return get_elastic(s.ctx).scale


def at_scale(table: RopeTable, scale: float) -> RopeTable | None:
    """The table of a stage, None for the first."""
    return None if scale == 1.0 else rescale(table, scale)


def assert_table(s: Session, table: RopeTable, scale: float) -> None:
    """The context turns by `table` at this scale, within a float32 of each factor."""
    held = get_table(s.ctx)
    assert scale_of(s) == np.float32(scale)
    if scale == 1.0:
        assert held is None
        return
    wanted = rescale(table, scale)
    assert held is not None
    assert held.method == table.method
    factors = stored_factors(wanted.radix_values, wanted.base_factors, wanted.lead)
    np.testing.assert_allclose(held.factors, factors, rtol=1e-6)
    np.testing.assert_allclose(held.attn_factor, wanted.attn_factor, rtol=1e-6)


def pieces(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for at in range(0, len(tokens), size):
        yield tokens[at : at + size]


def feed(s: Session, tokens: Sequence[int], size: int = 512, first: int | None = None, seq: int = 0) -> Floats:
    """Logits of tokens that are fed `size` at a time."""
    at = s.next(seq) if first is None else first
    rows = []
    for piece in pieces(tokens, size):
        rows.append(s.feed(piece, seq=seq, first=at))
        at += len(piece)
    return np.concatenate(rows)


def scratch(path: Path, table: ActiveTable | None, held: Held, cache: str) -> Floats:
    """Layer 0's keys of these tokens at these positions, decoded once, under a table that is there from the start.

    A first layer's key depends on its token and position alone, so runs of positions are decoded one by one.
    """
    positions = sorted(held)
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(positions)) if b != a + 1), len(positions)]
    rows = []
    with session(path, cache=cache, n_ctx=1024) as s:
        if table is None:
            set_table(s.ctx, None)
        else:
            set_factors(s.ctx, table.factors, table.attn_factor)
        for start, stop in pairwise(starts):
            s.clear()
            run = positions[start:stop]
            s.feed([held[pos] for pos in run], first=run[0])
            rows.append(s.keys()[0].values)
    return np.concatenate(rows)


def grown(path: Path, policy: Policy, tokens: Sequence[int], size: int, **params: Any) -> Floats:
    """Logits of tokens fed `size` at a time to a context that grows with them."""
    with elastic(path, policy, **params) as s:
        return feed(s, tokens, size)


def by_hand(path: Path, policy: Policy, tokens: Sequence[int], size: int, **params: Any) -> Floats:
    """The same on a static context: the batches cut at the bounds, and before each the table of the stage is set."""
    tables: dict[float, ActiveTable | None] = {1.0: None}
    with elastic(path, policy, **params) as s:
        for bound in policy.bounds():
            s.clear()
            s.feed(tokens[:1], first=bound)
            tables[scale_of(s)] = get_table(s.ctx)
    rows: list[Floats] = []
    with session(path, cache=policy.cache, **{"n_ctx": 512, **params}) as s:
        set_table(s.ctx, None)
        assert not get_elastic(s.ctx).on
        now, at = None, 0
        for piece in pieces(tokens, size):
            end = at + len(piece)
            for start, stop in pairwise([at, *(b for b in policy.bounds() if at < b < end), end]):
                wanted = tables[float(np.float32(policy.scale_at(stop)))]
                if wanted != now:
                    assert wanted is not None
                    set_factors(s.ctx, wanted.factors, wanted.attn_factor)
                    now = wanted
                rows.append(s.feed(tokens[start:stop]))
            at = end
    return np.concatenate(rows)
