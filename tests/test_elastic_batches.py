"""Batches of several sequences are cut where any of them passes a bound, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.elastic import FINE, ORIG, Policy, elastic, grow_file, scale_of
from tests.engine_session import Session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS, OTHERS = tiny.tokens(300), tiny.tokens(300, seed=1)
Place = tuple[int, int]  # a sequence and a position


def token_at(place: Place) -> int:
    seq, pos = place
    return TOKENS[(pos + 97 * seq) % len(TOKENS)]


def decode(s: Session, places: list[Place]) -> Floats:
    """One batch; its logits."""
    return s.decode([(token_at((seq, pos)), pos, seq) for seq, pos in places])


def mixed(
    path: Path, policy: Policy, unified: bool, starts: list[int], sizes: list[int], order: list[int], n_ubatch: int
) -> tuple[Floats, Floats, list[Place], float, list[Place]]:
    """Logits of sequences that grow in one batch, and of the same tokens one by one; the batch, S, what is cached."""
    n_seq = len(starts)
    heads = [[(seq, pos) for pos in range(start)] for seq, start in enumerate(starts)]
    left = [
        [(seq, start + i) for i in range(size)] for seq, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    places = []
    for k in order:
        if left[k % n_seq]:
            places.append(left[k % n_seq].pop(0))
    rows = []
    for together in (True, False):
        with elastic(path, policy, n_seq=n_seq, unified=unified, n_ctx=512 * n_seq, n_ubatch=n_ubatch) as s:
            for head in heads:
                if head:
                    decode(s, head)
            rows.append(decode(s, places) if together else np.concatenate([decode(s, [place]) for place in places]))
            scale = scale_of(s)
            cached = [(seq, s.next(seq)) for seq in range(n_seq)]
    return rows[0], rows[1], places, scale, cached


def check(found: tuple[Floats, Floats, list[Place], float, list[Place]], policy: Policy, starts: list[int]) -> None:
    together, apart, places, scale, cached = found
    ends = [max([start, *(pos + 1 for s, pos in places if s == seq)]) for seq, start in enumerate(starts)]
    assert cached == list(enumerate(ends))
    assert scale == np.float32(policy.scale_at(max(ends)))
    assert np.isfinite(together).all()
    # a token may be decoded under an earlier table than one by one, never under a later one, where another sequence of
    # the batch passes a bound; those before any does are the same, and so are the last of the longest
    first = next((k for k in range(len(places)) if max(pos for _, pos in places[: k + 1]) >= ORIG), len(places))
    if max(starts) <= ORIG:
        np.testing.assert_allclose(together[:first], apart[:first], atol=2e-3)
    longest = max(range(len(ends)), key=lambda seq: ends[seq])
    if starts[longest] == max(starts) and len(set(ends)) == len(ends):
        last = [k for k, (seq, pos) in enumerate(places) if seq == longest and pos == ends[longest] - 1]
        np.testing.assert_allclose(together[last], apart[last], atol=2e-3)


LENGTHS = [[10, 20], [60, 20], [60, 55], [100, 60], [20, 130], [0, 60], [63, 64]]


@pytest.mark.parametrize("starts", LENGTHS, ids=str)
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_two_sequences_token_about(engine: Worker, tmp_path: Path, name: str, unified: bool, starts: list[int]) -> None:
    path, policy = grow_file(tmp_path, name).path, Policy()
    found = engine.call(mixed, path, policy, unified, starts, [20, 20], [0, 1] * 20, 512)
    check(found, policy, starts)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    starts=st.lists(st.integers(40, 80) | st.integers(0, 150), min_size=2, max_size=4),
    size=st.integers(1, 60),
    order=st.lists(st.integers(0, 11), min_size=2, max_size=12).map(lambda turns: (turns * 100)[:200]),
    unified=st.booleans(),
    n_ubatch=st.sampled_from([3, 16, 512]),
    fine=st.booleans(),
)
def test_any_batch(
    engine: Worker,
    tmp_path_factory: pytest.TempPathFactory,
    starts: list[int],
    size: int,
    order: list[int],
    unified: bool,
    n_ubatch: int,
    fine: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_batch" / "llama.engine.gguf"
    if not path.exists():
        path.parent.mkdir()
        grow_file(path.parent, "llama")
    policy = FINE if fine else Policy()
    found = engine.call(mixed, path, policy, unified, starts, [size] * len(starts), order, n_ubatch)
    check(found, policy, starts)
