"""The bound: golden values, an independent scan, exactness near zero, its inverse, and the curve."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrrope_gguf import _native
from mrrope_gguf.bound import bound, bound_curve, min_base
from mrrope_gguf.tables import RopeTable, pair_angles, rope_table

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "bounds.json").read_text())
MODELS = {"llama2-7b": (128, 1e4, 4096), "qwen2.5-3b": (128, 1e6, 32768)}
PI = Fraction(31415926535897932384626433832795028841971693993751058209749445923, 10**64)

# The golden scan stopped somewhere between its largest value, 149500, and the smallest of these: bounds past its end.
BEYOND_GOLDEN = {
    "linear": 433831, "yarn": 283401, "yarn-turns": 264449, "mrrope-uni": 291387, "mrrope-pro": 273102,
}  # fmt: skip


def golden_table(entry: dict[str, Any]) -> RopeTable:
    n_rot, freq_base, n_ctx_orig = MODELS[entry["model"]]
    scale = entry["scale"]
    return rope_table(entry["method"], n_rot=n_rot, freq_base=freq_base, n_ctx_orig=n_ctx_orig, scale=scale)


def plain_scan(theta: list[float], first: int, last: int) -> int | None:
    """numpy's cosine at every position, nothing else."""
    angles = np.array(theta)
    for start in range(first, last + 1, 4096):
        m = np.arange(start, min(start + 4096, last + 1), dtype=np.float64)
        below = np.flatnonzero(np.cos(m[:, None] * angles).sum(axis=1) < 0.0)
        if below.size:
            return start + int(below[0])
    return None


def exact_sum(theta: list[float], m: int) -> float:
    """The sum with every angle reduced by 2 pi in exact fractions before any rounding."""
    return math.fsum(math.cos(float(Fraction(t) * m % (2 * PI))) for t in theta)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda g: f"{g['model']}-{g['method']}-{g['scale']:g}")
def test_golden_bounds(entry: dict[str, Any]) -> None:
    table = golden_table(entry)
    want = entry["first_negative"]
    if want is None:
        want = BEYOND_GOLDEN[entry["method"]]
        assert want > max(g["first_negative"] or 0 for g in GOLDEN)
    assert bound(table) == want
    assert exact_sum(table.theta, want) < 0.0


@pytest.mark.slow
@pytest.mark.parametrize("method", BEYOND_GOLDEN)
def test_bounds_past_the_golden_scan_by_plain_cosines(method: str) -> None:
    table = rope_table(method, n_rot=128, freq_base=1e6, n_ctx_orig=32768, scale=16)
    assert plain_scan(table.theta, 1, 500_000) == BEYOND_GOLDEN[method]


@settings(deadline=None)
@given(
    st.sampled_from(["none", "ntk", "yarn", "mrrope-uni", "mrrope-pro"]),
    st.sampled_from([2, 4, 6, 10, 32, 64, 128, 130, 256]),
    st.floats(2, 1e6),
    st.floats(1, 32),
)
def test_bound_equals_a_plain_scan(method: str, n_rot: int, freq_base: float, scale: float) -> None:
    table = rope_table(method, n_rot=n_rot, freq_base=freq_base, n_ctx_orig=512, scale=scale)
    got = bound(table, limit=6000)
    want = plain_scan(table.theta, 1, 6000)
    close = [m for m in (got, want) if m is not None and abs(exact_sum(table.theta, m)) < 1e-9]
    assert got == want or close  # plain cosines may only differ where the sum is zero to their own rounding


def test_rounding_does_not_decide() -> None:
    """Two pairs that cancel at every odd m but for 1e-9 radians a token: float32 alone would say any sign."""
    for k in range(1, 200):
        theta = [k / 200, math.pi - k / 200 + 1e-9]
        first = next(m for m in range(1, 1000) if exact_sum(theta, m) < 0.0)
        assert bound(theta) == first


def test_zero_is_not_below_zero() -> None:
    assert bound([0.0], limit=10_000) is None
    assert bound([math.pi / 2]) == 2  # the double below pi/2: its cosine is 6e-17


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=128), st.integers(1, 2**40))
def test_sums_are_exact_to_double(theta: list[float], m: int) -> None:
    assert _native.bound_sum(theta, m) == pytest.approx(exact_sum(theta, m), abs=1e-15 * (len(theta) + 1) * 4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=130), st.integers(1, 2**30), st.integers(1, 3000))
def test_block_sums_stay_within_their_error(theta: list[float], first: int, count: int) -> None:
    sums = _native.bound_sums(theta, first, count)
    assert sums.shape == (count,)
    n = len(theta)
    error = (2 * n + 4) * n * 2.0**-24
    for k in {0, count // 3, count - 1}:
        assert abs(sums[k] - exact_sum(theta, first + k)) <= error


def test_the_limit_is_the_last_position_looked_at() -> None:
    table = rope_table("none", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=1)
    assert bound(table) == 1707
    assert bound(table, limit=1707) == 1707
    assert bound(table, limit=1706) is None
    assert bound(table, limit=1) is None


def test_a_bound_past_one_native_call() -> None:
    """theta so small that the first negative lies beyond the 2**24 positions scanned at a time."""
    theta = [math.pi / 2 / 20_000_000.5]
    assert bound(theta) == 20_000_001
    assert bound(theta, limit=20_000_000) is None


def test_base_factors_count() -> None:
    own = [1.0] * 40 + [8.0] * 24
    table = rope_table("none", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=1, base_factors=own)
    assert bound(table) == plain_scan(list(np.array(pair_angles(128, 1e4)) / own), 1, 50_000)
    assert bound(table) != 1707


@pytest.mark.parametrize(
    ("theta", "limit", "words"),
    [
        ([], 10, "got \\[\\]"),
        ([math.nan], 10, "nan"),
        ([-1.0], 10, "-1.0"),
        ([1.0], 0, "limit"),
        ([1.0], 2**53, "limit"),
    ],
)
def test_bad_arguments(theta: list[float], limit: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bound(theta, limit=limit)


# n_ctx: (two digits, three digits, four digits, published by Men et al.). See docs/tables.md.
MIN_BASES = {
    1 << 10: (4300, 4300, 4294, 4.3e3),
    1 << 11: (16000, 11600, 11590, 1.6e4),
    1 << 12: (29000, 28700, 26960, 2.7e4),
    1 << 13: (84000, 83800, 83770, 8.4e4),
    1 << 14: (350000, 235000, 231700, 3.1e5),
    1 << 15: (630000, 630000, 630000, 6.4e5),
    1 << 16: (2.1e6, 2.1e6, 2.091e6, 2.1e6),
    1 << 17: (8.8e6, 4.87e6, 4.87e6, 7.8e6),
    1 << 18: (3.3e7, 3.28e7, 3.036e7, 3.6e7),
    1 << 19: (6.5e7, 6.42e7, 6.269e7, 6.4e7),
    1 << 20: (3.5e8, 3.47e8, 6.543e7, 5.1e8),
}


@pytest.mark.parametrize("n_ctx", MIN_BASES)
def test_min_base(n_ctx: int) -> None:
    two, three, _, published = MIN_BASES[n_ctx]
    assert (min_base(n_ctx, 128, digits=2), min_base(n_ctx, 128)) == (two, three)
    assert 0.6 < two / published < 1.2
    for base in (two, three):
        assert bound(pair_angles(128, base), limit=n_ctx - 1) is None


@pytest.mark.slow
@pytest.mark.parametrize("n_ctx", MIN_BASES)
def test_min_base_of_four_digits(n_ctx: int) -> None:
    _, three, four, _ = MIN_BASES[n_ctx]
    assert min_base(n_ctx, 128, digits=4) == four <= three
    assert bound(pair_angles(128, four), limit=n_ctx - 1) is None


def test_reaching_is_not_monotone_in_the_base() -> None:
    assert bound(pair_angles(128, 26960.0), limit=4095) is None
    assert bound(pair_angles(128, 27000.0), limit=4095) is not None


@pytest.mark.parametrize(
    ("n_ctx", "n_rot", "digits"), [(200, 32, 2), (100, 64, 3), (50, 8, 2), (1, 16, 2), (300, 6, 1)]
)
def test_every_smaller_base_of_so_many_digits_fails(n_ctx: int, n_rot: int, digits: int) -> None:
    found = min_base(n_ctx, n_rot, digits)
    assert plain_scan(pair_angles(n_rot, found), 1, n_ctx - 1) is None
    ones = 10 ** (digits - 1)
    ladder = [float(f"{k}e{e - digits + 1}") for e in range(23) for k in range(ones, 10 * ones)]
    smaller = [base for base in ladder if 1.0 < base < found]
    assert found in ladder
    for base in smaller[-400:]:
        assert plain_scan(pair_angles(n_rot, base), 1, n_ctx - 1) is not None


def test_one_pair_never_reaches() -> None:
    assert min_base(4096, 2) == math.inf
    assert min_base(2, 2) == 1.01  # cos 1 is above zero, so two tokens are fine


@pytest.mark.parametrize(
    ("n_ctx", "n_rot", "digits"), [(0, 128, 3), (2**31 + 1, 128, 3), (10, 7, 3), (10, 8, 0), (10, 8, 7)]
)
def test_min_base_refuses(n_ctx: int, n_rot: int, digits: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        min_base(n_ctx, n_rot, digits)


def test_the_papers_bound_claim_is_not_ours() -> None:
    """The paper says 1K to 28K at base 10,000. Its start is 1707; an end near 28K takes S = 32, not its 16."""
    facts: dict[str, Any] = {"n_rot": 128, "freq_base": 1e4, "n_ctx_orig": 4096}
    assert bound(rope_table("none", scale=1, **facts)) == 1707
    assert bound(rope_table("mrrope-pro", scale=16, **facts)) == 14239
    assert bound(rope_table("mrrope-pro", scale=32, **facts)) == 27436


def test_curve_holds_every_position() -> None:
    table = rope_table("mrrope-pro", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=4)
    curve = bound_curve(table, 8000, points=100)
    assert curve.m[0] == 1
    assert len(curve.m) == len(curve.lowest) == len(curve.highest) <= 100
    assert curve.bound == 5490
    assert np.all(curve.lowest <= curve.highest)
    whole = np.cos(np.arange(1, 8001)[:, None] * np.array(table.theta)).sum(axis=1)
    want = np.minimum.reduceat(whole, curve.m - 1)
    assert np.abs(curve.lowest - want).max() < 1e-3
    assert bound_curve(table, 5000).bound is None
    with pytest.raises(ValueError, match="points"):
        bound_curve(table, 100, points=0)
