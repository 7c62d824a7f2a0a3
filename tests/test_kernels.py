"""rope and nll against slow twins, at every instruction set this CPU has, and against each other bit for bit."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mrrope_gguf.kernels import MAX_POSITION, nll, rope, simd_levels
from mrrope_gguf.tables import RopeTable, rope_table

LEVELS = simd_levels()
TWO_PI = 2 * Fraction(
    31415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679, 10**100
)


@contextmanager
def at_level(level: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"MRROPE_SIMD": level}):
        yield


def a_table(n_rot: int = 8, freq_base: float = 1e4, scale: float = 4.0, method: str = "mrrope-pro") -> RopeTable:
    return rope_table(method, n_rot=n_rot, freq_base=freq_base, n_ctx_orig=256, scale=scale)


# --- twins --------------------------------------------------------------------------------------------------------


def exact_angle(position: int, theta: float) -> float:
    """position * theta with whole turns taken off exactly: rational numbers and 100 digits of pi."""
    angle = position * Fraction(theta)
    return float(angle - round(angle / TWO_PI) * TWO_PI)


def rope_twin(x: NDArray[Any], positions: NDArray[Any], table: RopeTable, mode: str) -> NDArray[np.float64]:
    """rope in float64, one pair at a time."""
    out = x.astype(np.float64)
    half = len(table.theta)
    for t, position in enumerate(positions.tolist()):
        for i, theta in enumerate(table.theta):
            a, b = (2 * i, 2 * i + 1) if mode == "norm" else (i, i + half)
            angle = exact_angle(position, theta)
            c, s = table.attn_factor * math.cos(angle), table.attn_factor * math.sin(angle)
            u, v = x[t, :, a].astype(np.float64), x[t, :, b].astype(np.float64)
            out[t, :, a] = u * c - v * s
            out[t, :, b] = v * c + u * s
    return out


def nll_twin(logits: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    top = x.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(x - top).sum(axis=1)) + top[:, 0]
    return np.asarray(log_sum - x[np.arange(len(x)), targets])


# --- rope ---------------------------------------------------------------------------------------------------------


@st.composite
def ropes(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], RopeTable, str]:
    n_tokens, n_heads = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    n_rot = 2 * draw(st.integers(1, 70))
    head_dim = n_rot + draw(st.sampled_from([0, 0, 1, 6, 32]))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x = rng.standard_normal((n_tokens, n_heads, head_dim)).astype(dtype)
    places = draw(st.lists(st.integers(-MAX_POSITION, MAX_POSITION), min_size=n_tokens, max_size=n_tokens))
    table = a_table(n_rot, draw(st.floats(1e3, 1e7)), draw(st.floats(1.0, 64.0)))
    return x, np.array(places, dtype=np.int64), table, draw(st.sampled_from(["norm", "neox"]))


@given(ropes())
def test_rope_equals_its_twin(case: tuple[NDArray[Any], NDArray[Any], RopeTable, str]) -> None:
    x, positions, table, mode = case
    out = rope(x, positions, table, mode)
    # float32: cos and sin, two products and a sum round once each; float16 rounds the result once more
    limit = 4 * 2.0**-24 * table.attn_factor * np.abs(x.astype(np.float64)).max(initial=0.0)
    if x.dtype == np.float16:
        limit += 2.0**-11 * np.abs(out.astype(np.float64)) + 2.0**-25
    assert out.dtype == x.dtype
    assert np.all(np.abs(out - rope_twin(x, positions, table, mode)) <= limit)
    assert np.array_equal(out[..., table.n_rot :], x[..., table.n_rot :])


@given(ropes(), st.integers(1, 5))
def test_rope_has_the_same_bits_everywhere(
    case: tuple[NDArray[Any], NDArray[Any], RopeTable, str], n_threads: int
) -> None:
    x, positions, table, mode = case
    with at_level("scalar"):
        expected = rope(x, positions, table, mode, n_threads=1)
    for level in LEVELS:
        with at_level(level):
            apart, inside = rope(x, positions, table, mode, n_threads=n_threads), x.copy()
            assert rope(inside, positions, table, mode, out=inside) is inside
        assert apart.tobytes() == expected.tobytes(), level
        assert inside.tobytes() == expected.tobytes(), level


@pytest.mark.parametrize("mode", ["norm", "neox"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n_rot", [128, 64, 96])
def test_rope_of_large_arrays_writes_around_the_cache_to_the_same_result(n_rot: int, dtype: str, mode: str) -> None:
    table = a_table(n_rot)
    n_tokens = 1100 if dtype == "float32" else 2200
    x: NDArray[Any] = np.random.default_rng(0).standard_normal((n_tokens, 32, 128)).astype(dtype)
    assert x.nbytes > 17e6
    positions = np.arange(n_tokens)
    for level in LEVELS:
        if level == "scalar":
            continue  # has no such stores
        inside = x.copy()
        with at_level(level):
            rope(inside, positions, table, mode, out=inside)
            assert np.array_equal(rope(x, positions, table, mode), inside)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("last", [4096, 1_000_000, 2**31])
@pytest.mark.parametrize("method", ["none", "mrrope-pro"])
def test_angles_stay_exact_at_any_position(method: str, last: int, level: str) -> None:
    """cos and sin are the exact ones, rounded to float32: within half an ulp and 1e-12."""
    table = rope_table(method, n_rot=128, freq_base=1e6, n_ctx_orig=32768, scale=4, attn_factor=1.0)
    positions = np.linspace(last - 12345, last, 40).astype(np.int64) * np.array([1, -1]).repeat(20)
    x = np.zeros((len(positions), 1, 128), dtype=np.float32)
    x[..., ::2] = 1.0
    with at_level(level):
        out = rope(x, positions, table).astype(np.float64).reshape(len(positions), 64, 2)
    angles = np.array([[exact_angle(p, theta) for theta in table.theta] for p in positions.tolist()])
    for got, exact in ((out[..., 0], np.cos(angles)), (out[..., 1], np.sin(angles))):
        assert np.all(np.abs(got - exact) <= 2.0**-24 * np.abs(exact) + 1e-12)
    error = np.arctan2(out[..., 1], out[..., 0]) - angles
    error -= np.round(error / (2 * np.pi)) * 2 * np.pi
    assert np.abs(error).max() < 1e-7


def test_turning_back_undoes_a_turn() -> None:
    table = a_table(64, method="linear")
    x = np.random.default_rng(1).standard_normal((3, 2, 64)).astype(np.float32)
    there = rope(x, np.array([5, 999_999, 2**31]), table)
    assert np.abs(rope(there, np.array([-5, -999_999, -(2**31)]), table) - x).max() < 1e-6
    assert np.abs(there - x).max() > 0.1


@pytest.mark.parametrize("level", LEVELS)
def test_every_half_survives_and_rounds_as_numpy_rounds(level: str) -> None:
    """All 65536 halves: position 0 keeps finite ones bit for bit, a third of them rounds to nearest even."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = np.zeros((2**16 // 64, 1, 128), dtype=np.float16)
    x[..., ::2] = every.reshape(-1, 1, 64)
    still = np.zeros(len(x), dtype=np.int64)
    one, third = (
        a_table(128, scale=1.0),
        rope_table("ntk", n_rot=128, freq_base=1e4, n_ctx_orig=9, scale=2, attn_factor=1 / 3),
    )
    with at_level(level):
        same, less = rope(x, still, one), rope(x, still, third)
    finite = np.isfinite(every)
    assert np.array_equal(same[..., ::2].reshape(-1)[finite].view(np.uint16), every[finite].view(np.uint16))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = (every.astype(np.float32) * np.float32(1 / 3)).astype(np.float16)
    assert np.array_equal(less[..., ::2].reshape(-1), expected, equal_nan=True)


def test_infinite_and_missing_values_are_the_same_at_every_level() -> None:
    for dtype in ("float32", "float16"):
        x: NDArray[Any] = np.ones((3, 2, 80), dtype=dtype)
        x[0, 0, 3], x[1, 1, 79], x[2, 0, 40] = np.nan, np.inf, -np.inf
        results = []
        for level in LEVELS:
            with at_level(level):
                results.append(rope(x, [1, 2, 3], a_table(80), "neox"))
        assert np.isnan(results[0]).sum() > 0
        assert all(np.array_equal(results[0], other, equal_nan=True) for other in results)


def test_rope_takes_int32_positions_and_a_read_only_source() -> None:
    x = np.ones((2, 1, 8), dtype=np.float32)
    expected = rope(x, np.array([3, 4]), a_table())
    x.flags.writeable = False
    assert np.array_equal(rope(x, np.array([3, 4], dtype=np.int32), a_table()), expected)


def _x() -> NDArray[np.float32]:
    return np.ones((2, 3, 8), dtype=np.float32)


def _read_only() -> NDArray[np.float32]:
    out = _x()
    out.flags.writeable = False
    return out


def _overlapping() -> None:
    buffer = np.ones(64, dtype=np.float32)
    rope(buffer[:48].reshape(2, 3, 8), [0, 1], a_table(), out=buffer[8:56].reshape(2, 3, 8))


def _misaligned() -> NDArray[np.float32]:
    return np.zeros(4 * 48 + 1, dtype=np.uint8)[1:].view(np.float32).reshape(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope([1.0], [0], a_table()), "x must be a numpy array, got list"),  # type: ignore[arg-type]
        (lambda: rope(_x().astype(np.float64), [0, 1], a_table()), "float32 or float16, got float64"),
        (lambda: rope(_x().astype(">f4"), [0, 1], a_table()), "float32 or float16, got >f4"),
        (lambda: rope(_x()[0], [0, 1], a_table()), r"3 dimensions, got 2: shape \(3, 8\)"),
        (lambda: rope(_x()[:, ::2], [0, 1], a_table()), r"C-contiguous, got strides \(96, 64, 4\)"),
        (lambda: rope(_misaligned(), [0, 1], a_table()), "aligned to 4 bytes"),
        (lambda: rope(_x(), [0, 1, 2], a_table()), r"positions must have shape \(2,\), got \(3,\)"),
        (lambda: rope(_x(), [[0, 1]], a_table()), r"positions must have shape \(2,\), got \(1, 2\)"),
        (lambda: rope(_x(), [0.0, 1.0], a_table()), "positions must be int32 or int64, got float64"),
        (lambda: rope(_x(), [0, 2**31 + 1], a_table()), r"positions must lie in .*2147483648\], got 2147483649"),
        (lambda: rope(_x(), [-(2**31) - 1, 0], a_table()), "got -2147483649"),
        (lambda: rope(_x(), [0, 1], a_table(10)), "rotates 10 dims, x has only head_dim 8"),
        (lambda: rope(_x(), [0, 1], a_table(), mode="gptj"), "'norm' or 'neox', got 'gptj'"),
        (lambda: rope(_x(), [0, 1], a_table(), out=_x()[:1]), r"shape of x, \(2, 3, 8\), got \(1, 3, 8\)"),
        (lambda: rope(_x(), [0, 1], a_table(), out=_x().astype(np.float16)), "out must be float32, got float16"),
        (lambda: rope(_x(), [0, 1], a_table(), out=_read_only()), r"out is read-only: shape \(2, 3, 8\)"),
        (_overlapping, "overlap, 32 bytes shifted"),
        (lambda: rope(_x(), [0, 1], a_table(), n_threads=0), "n_threads must be from 1 to 1024, got 0"),
        (lambda: nll(np.zeros((2, 3)), [0, 1]), "logits must be float32, got float64"),  # type: ignore[arg-type]
        (lambda: nll(np.zeros((4, 6), dtype=np.float32)[:, ::2], [0] * 4), "C-contiguous"),
        (lambda: nll(np.zeros((2, 3), dtype=np.float32), [0, 3]), r"targets must lie in \[0, 2\], got 3"),
        (lambda: nll(np.zeros((2, 3), dtype=np.float32), [-1, 0]), r"targets must lie in \[0, 2\], got -1"),
        (lambda: nll(np.zeros((2, 3), dtype=np.float32), [0]), r"targets must have shape \(2,\), got \(1,\)"),
        (lambda: nll(np.zeros((2, 0), dtype=np.float32), [0, 0]), r"targets must lie in \[0, -1\], got 0"),
    ],
)
def test_wrong_arguments_are_named_with_their_numbers(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_infinite_theta_is_refused() -> None:
    table = a_table()
    table.theta[1] = math.inf
    with pytest.raises(ValueError, match="theta must be finite"):
        rope(_x(), [0, 1], table)


def test_an_unknown_level_is_refused_with_those_there_are() -> None:
    with at_level("mmx"), pytest.raises(ValueError, match=r"MRROPE_SIMD=mmx is not one of .*scalar"):
        rope(_x(), [0, 1], a_table())


# --- nll ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@given(
    st.integers(0, 5),
    st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 4097, 9000])),
    st.sampled_from([0.0, 0.1, 3.0, 30.0, 1e4]),
    st.floats(-1e4, 1e4),
    st.integers(0, 99),
)
def test_nll_equals_its_twin(level: str, n: int, vocab: int, spread: float, centre: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (centre + spread * rng.standard_normal((n, vocab))).astype(np.float32)
    if vocab > 8:
        logits[:, : vocab // 2][rng.random((n, vocab // 2)) < 0.2] = -np.inf
    targets = rng.integers(vocab // 2, vocab, n)
    with at_level(level):
        out = nll(logits, targets, n_threads=1 + seed % 4)
    exact = nll_twin(logits, targets)
    assert out.dtype == np.float32
    assert out.shape == (n,)
    assert np.all(np.abs(out - exact) <= 1e-6 * (1 + exact))


@pytest.mark.parametrize("level", LEVELS)
def test_nll_of_a_falling_row_shows_every_exponential(level: str) -> None:
    """One logit of 0 and 4095 of -d: the answer is log(1 + 4095 exp(-d)), so d from 0 to 8 shows exp itself."""
    depths = np.linspace(0, 8, 400, dtype=np.float32)
    logits = np.repeat(-depths[:, None], 4096, axis=1)
    logits[:, 17] = 0.0
    with at_level(level):
        out = nll(logits, np.full(400, 17)).astype(np.float64)
    exponential = np.expm1(out) / 4095
    assert np.abs(exponential / np.exp(-depths.astype(np.float64)) - 1).max() < 1e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab", [1, 3, 17, 64, 5000])
def test_nll_of_infinite_and_missing_logits(level: str, vocab: int) -> None:
    rows = np.zeros((6, vocab), dtype=np.float32)
    last = vocab - 1
    rows[0, last] = np.nan
    rows[1, last] = np.inf
    rows[2] = -np.inf
    rows[3, 1:] = -np.inf
    rows[4] = 3e38
    rows[5] = -3e38
    with at_level(level):
        out = nll(rows, np.zeros(6, dtype=np.int64))
        missing = nll(rows[3:4], [last])[0] if vocab > 1 else np.inf
    assert np.isnan(out[:3]).all()
    assert out[3] == 0.0
    assert missing == np.inf
    assert np.allclose(out[4:], math.log(vocab), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("payload", [0x7FC00001, 0x7F800001, 0xFFC001FF])
def test_no_kind_of_nan_is_lost(level: str, payload: int) -> None:
    for at in range(0, 200, 7):
        row = np.zeros((1, 200), dtype=np.float32)
        row.view(np.uint32)[0, at] = payload
        with at_level(level):
            assert np.isnan(nll(row, [5])[0])


def test_both_let_other_python_threads_run() -> None:
    """With no forced switches, this thread gets a turn inside the call only if the call gives up the lock."""
    logits, x = np.zeros((40, 150_000), dtype=np.float32), np.zeros((4096, 8, 64), dtype=np.float32)
    calls = (lambda: nll(logits, np.zeros(40, dtype=np.int64)), lambda: rope(x, np.arange(4096), a_table(64)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)
    try:
        for call in calls:
            assert any(_runs_beside(call) for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


def _runs_beside(call: Callable[[], object]) -> bool:
    """True if this thread read the clock between the start and the end of call, made in another thread."""
    span: list[float] = []

    def work() -> None:
        start = time.perf_counter()
        call()
        span.extend((start, time.perf_counter()))

    seen: list[float] = []
    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        seen.append(time.perf_counter())
        time.sleep(0)
    return any(span[0] < moment < span[1] for moment in seen)
