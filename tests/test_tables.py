"""Rope tables: the golden values, the two twins against one another, invariants, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrrope_gguf import _native
from mrrope_gguf.tables import (
    METHODS,
    RopeTable,
    band,
    factors_to_radix,
    pair_angles,
    pair_turns,
    radix_to_factors,
    rescale,
    rope_table,
    stored_factors,
)

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "tables.json").read_text())
RULED = [m for m in METHODS if m != "custom"]
BANDED = ["yarn", "mrrope-uni", "mrrope-pro"]
LLAMA2 = {"n_rot": 128, "freq_base": 1e4, "n_ctx_orig": 4096}


def table(method: str, scale: float = 4.0, **facts: Any) -> RopeTable:
    return rope_table(method, scale=scale, **{**LLAMA2, **facts})


def native(t: RopeTable) -> tuple[list[float], list[float], float, int, int]:
    """The same table by mrrope.h."""
    base = None if t.base_factors is None else list(t.base_factors)
    radix = list(t.radix_values) if t.method == "custom" else None
    return _native.rope_table(
        t.method, t.n_rot, t.freq_base, t.n_ctx_orig, t.scale, t.beta_fast, t.beta_slow, base, radix, t.lead
    )


@st.composite
def models(draw: st.DrawFn, base_factors: bool = True) -> dict[str, Any]:
    """Any model and stretch, edge bands included: short and endless contexts, tiny heads, bases near 1, S = 1."""
    n_rot = 2 * draw(st.sampled_from([1, 2, 3, 4, 8, 16, 20, 32, 64, 128]))
    slow = draw(st.floats(0.01, 40))
    base = st.lists(st.floats(0.25, 64), min_size=n_rot // 2, max_size=n_rot // 2)
    return {
        "n_rot": n_rot,
        "freq_base": draw(st.one_of(st.sampled_from([1e4, 5e5, 1e6]), st.floats(1.5, 1e9))),
        "n_ctx_orig": draw(st.one_of(st.integers(1, 64), st.integers(64, 2**31))),
        "scale": draw(st.one_of(st.just(1.0), st.sampled_from([2.0, 4.0, 7.5]), st.floats(1, 1024))),
        "beta_slow": slow,
        "beta_fast": slow * draw(st.floats(1.01, 200)),
        "base_factors": draw(st.none() | base) if base_factors else None,
    }


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda g: f"{g['model']}-{g['method']}-{g['scale']:g}")
def test_both_twins_equal_the_golden_table(entry: dict[str, Any]) -> None:
    names = ("n_rot", "freq_base", "n_ctx_orig", "scale", "beta_fast", "beta_slow")
    t = rope_table(entry["method"], **{name: entry[name] for name in names})
    factors, _, attn, d_l, d_h = native(t)
    np.testing.assert_allclose(t.factors, entry["factors"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(factors, entry["factors"], rtol=1e-12, atol=0)
    assert (t.d_l, t.d_h) == (d_l, d_h) == (entry["d_l"], entry["d_h"])
    assert t.attn_factor == pytest.approx(entry["attn_factor"], rel=1e-12)
    assert attn == pytest.approx(entry["attn_factor"], rel=1e-12)


def test_all_golden_tables_are_here() -> None:
    assert len(GOLDEN) == 245
    assert {g["method"] for g in GOLDEN} == set(METHODS) - {"llama3", "custom"}


@given(st.sampled_from(RULED), models())
def test_twins_agree(method: str, given_facts: dict[str, Any]) -> None:
    t = rope_table(method, **given_facts)
    factors, radix, attn, d_l, d_h = native(t)
    np.testing.assert_allclose(t.factors, factors, rtol=1e-12, atol=0)
    np.testing.assert_allclose(t.radix, radix, rtol=1e-12, atol=0)
    assert (t.d_l, t.d_h) == (d_l, d_h)
    assert t.attn_factor == pytest.approx(attn, rel=1e-12)


@given(st.sampled_from(RULED), models(base_factors=False))
def test_invariants(method: str, given_facts: dict[str, Any]) -> None:
    t = rope_table(method, **given_facts)
    f, scale, pairs = t.factors, t.scale, t.n_rot // 2
    assert len(f) == len(t.radix) == pairs
    assert np.all(np.diff(f) >= 0)
    assert f[0] >= 1.0
    assert f[-1] <= scale
    assert radix_to_factors(t.radix_values, t.lead) == pytest.approx(list(f), rel=1e-12)
    if scale == 1.0:
        assert np.all(f == 1.0)
        assert t.attn_factor == 1.0
    if method in BANDED:
        assert np.all(f[: t.d_l + 1] == 1.0)
        ends_inside = t.d_h < pairs and t.d_l + 1 < pairs
        assert not ends_inside or math.prod(t.radix_values) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("method", BANDED)
def test_a_band_that_ends_past_the_last_pair_never_reaches_the_scale(method: str) -> None:
    t = table(method, n_rot=16, n_ctx_orig=2**18)
    assert t.d_h > t.n_rot // 2
    assert 1.0 < t.factors[-1] < t.scale


def test_a_band_clamped_at_both_ends() -> None:
    low = table("mrrope-pro", n_rot=16, n_ctx_orig=64)
    assert low.d_l == 0
    assert low.factors[0] == 1.0
    high = table("mrrope-pro", n_rot=4, freq_base=2.0, n_ctx_orig=2**20)
    assert high.d_h == high.n_rot - 1
    assert list(high.factors) == [1.0, 1.0]


@pytest.mark.parametrize("method", BANDED)
def test_a_band_without_width_is_one_step(method: str) -> None:
    t = table(method, n_ctx_orig=2)
    assert t.d_h <= t.d_l == 0
    assert list(t.factors) == [1.0] + [4.0] * 63


def test_the_smallest_head() -> None:
    for method in RULED:
        assert list(table(method, n_rot=2).factors) == [4.0 if method == "linear" else 1.0]


def test_linear_leads_with_the_scale() -> None:
    t = table("linear")
    assert t.lead == 4.0
    assert list(t.radix) == [1.0] * 64


def test_the_rules_in_radix_form() -> None:
    uni, pro = table("mrrope-uni"), table("mrrope-pro")
    n = uni.d_h - uni.d_l
    inside = slice(uni.d_l, uni.d_h)
    assert uni.radix[inside] == pytest.approx([4.0 ** (1 / n)] * n)
    assert pro.radix[inside] == pytest.approx([4.0 ** (2 * k / (n * (n + 1))) for k in range(1, n + 1)])
    assert table("ntk").radix[:-1] == pytest.approx([4.0 ** (1 / 63)] * 63)


def meta_llama3(theta: Sequence[float], old_context_len: float, scale: float) -> list[float]:
    """Meta's apply_scaling, from its published description: by wavelength, with factors 1 and 4."""
    new = []
    for freq in theta:
        wavelen = 2 * math.pi / freq
        if wavelen < old_context_len / 4.0:
            new.append(freq)
        elif wavelen > old_context_len / 1.0:
            new.append(freq / scale)
        else:
            smooth = (old_context_len / wavelen - 1.0) / (4.0 - 1.0)
            new.append((1 - smooth) * freq / scale + smooth * freq)
    return new


@pytest.mark.parametrize(("n_rot", "base", "n_ctx", "scale"), [(128, 5e5, 8192, 8.0), (64, 5e5, 8192, 32.0)])
def test_llama3_is_metas_formula(n_rot: int, base: float, n_ctx: int, scale: float) -> None:
    t = rope_table("llama3", n_rot=n_rot, freq_base=base, n_ctx_orig=n_ctx, scale=scale)
    assert t.theta == pytest.approx(meta_llama3(pair_angles(n_rot, base), n_ctx, scale), rel=1e-12)
    assert (t.beta_fast, t.beta_slow, t.attn_factor) == (4.0, 1.0, 1.0)
    assert 1.0 < t.factors[t.d_l + 1] < scale


def test_llama3_takes_other_betas() -> None:
    assert table("llama3", beta_fast=8.0, beta_slow=2.0).factor_values == (
        table("yarn-turns", beta_fast=8.0, beta_slow=2.0).factor_values
    )


@given(models(base_factors=False))
def test_base_factors_of_one_change_nothing(given_facts: dict[str, Any]) -> None:
    plain = rope_table("mrrope-pro", **given_facts)
    given_facts["base_factors"] = [1.0] * len(plain.factors)
    ones = rope_table("mrrope-pro", **given_facts)
    assert (ones.d_l, ones.d_h) == (plain.d_l, plain.d_h)
    assert ones.factor_values == plain.factor_values
    assert ones.theta == plain.theta


@given(st.lists(st.floats(1, 2), min_size=64, max_size=64), st.integers(64, 2**22))
def test_the_band_is_counted_on_effective_turns(steps: list[float], n_ctx: int) -> None:
    """With growing base factors turns fall from pair to pair, so the band's ends can be read off them."""
    base = np.cumprod(np.minimum(steps, 1.3)).tolist()
    turns = pair_turns(128, 1e4, n_ctx, base)
    d_l, d_h = band(128, 1e4, n_ctx, 32.0, 1.0, base)
    slack = 1 + 1e-9
    assert all(turns[i] * slack >= 32.0 for i in range(1, min(d_l + 1, 64)))
    assert all(turns[i] <= 32.0 * slack for i in range(d_l + 1, 64))
    assert all(turns[i] <= slack for i in range(max(d_h, 0), 64))
    assert all(turns[i] * slack >= 1.0 for i in range(min(max(d_h, 0), 64)))


def test_a_model_with_rope_freqs_of_its_own() -> None:
    """Llama 3.1 as converters write it: n_ctx_orig 131072 is already slowed by 8, so its band starts earlier."""
    own = rope_table("llama3", n_rot=128, freq_base=5e5, n_ctx_orig=8192, scale=8.0)
    facts: dict[str, Any] = {"n_rot": 128, "freq_base": 5e5, "n_ctx_orig": 131072, "scale": 4.0}
    t = rope_table("mrrope-pro", base_factors=own.factor_values, **facts)
    plain = rope_table("mrrope-pro", **facts)
    assert (plain.d_l, plain.d_h) == (31, 49)
    assert (t.d_l, t.d_h) == (29, 39)
    assert t.theta == pytest.approx(np.array(own.theta) / t.factors, rel=1e-12)
    assert native(t)[0] == pytest.approx(list(t.factors), rel=1e-12)


def test_rising_turns_take_the_first_crossing() -> None:
    """Base factors that fall faster than theta make turns rise again; the first pair past the limit counts."""
    base = [1.0] * 30 + [1e-3] * 34
    assert band(128, 1e4, 4096, 32.0, 1.0, base)[0] == 20


def test_radix_and_factors_convert_both_ways() -> None:
    assert factors_to_radix([2.0, 4.0, 4.0, 6.0]) == [2.0, 1.0, 1.5, 1.0]
    assert radix_to_factors([2.0, 1.0, 1.5, 1.0], lead=2.0) == [2.0, 4.0, 4.0, 6.0]


@given(st.lists(st.floats(0.5, 4), min_size=1, max_size=128), st.floats(0.5, 4))
def test_custom_round_trip(radix: list[float], lead: float) -> None:
    t = table("custom", n_rot=2 * len(radix), radix=radix, lead=lead)
    assert t.radix[:-1] == pytest.approx(radix[:-1], rel=1e-12)
    assert t.radix[-1] == 1.0
    assert t.factors[0] == t.lead == lead
    factors, out, attn, _, _ = native(t)
    assert t.attn_factor == attn == 1.0
    assert factors == pytest.approx(list(t.factors), rel=1e-12)
    assert out == pytest.approx(list(t.radix), rel=1e-12)


@given(st.sampled_from(["ntk", "mrrope-uni", "mrrope-pro"]), st.floats(1.01, 64), st.floats(1, 64))
def test_rescaling_a_custom_table_is_exact_for_powers_of_s(method: str, scale: float, other: float) -> None:
    made = table(method, scale)
    custom = table("custom", scale, radix=made.radix_values)
    want = table(method, other)
    assert rescale(custom, other).factors == pytest.approx(want.factors, rel=1e-10)
    assert rescale(made, other) == want
    assert _native.rescale(list(made.factor_values), scale, other) == pytest.approx(list(want.factors), rel=1e-10)


def test_rescale_to_one_is_the_original_model() -> None:
    custom = table("custom", 4.0, radix=[1.1] * 64, lead=1.2, attn_factor=1.3)
    one = rescale(custom, 1.0)
    assert list(one.factors) == [1.0] * 64
    assert (one.attn_factor, one.lead, one.scale) == (1.0, 1.0, 1.0)
    assert rescale(custom, 4.0) == custom


def test_rescale_moves_ones_own_temperature() -> None:
    t = table("mrrope-pro", 4.0, attn_factor=1.2)
    assert rescale(t, 16.0).attn_factor == pytest.approx(1.4)
    assert rescale(table("mrrope-pro", 4.0), 16.0).attn_factor == pytest.approx(0.1 * math.log(16) + 1)
    assert rescale(table("mrrope-pro", 1.0, attn_factor=1.2), 4.0).attn_factor == 1.2


def test_rescale_refuses_a_direction_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="custom table of scale 1"):
        rescale(table("custom", 1.0, radix=[1.1] * 64), 4.0)
    with pytest.raises(ValueError, match=r"1 or more, got 0\.5"):
        rescale(table("ntk"), 0.5)
    with pytest.raises(ValueError, match="scale"):
        _native.rescale([1.0, 2.0], 1.0, 4.0)


@given(st.lists(st.floats(0.5, 2, width=32), min_size=1, max_size=128), st.booleans(), st.floats(0.5, 32, width=32))
def test_stored_factors_are_one_double_product_rounded_once(radix: list[float], based: bool, lead: float) -> None:
    base = [0.5 + 0.25 * (i % 7) for i in range(len(radix))] if based else None
    got = stored_factors(radix, base, lead)
    product = np.cumprod([lead, *radix[:-1]])
    want = (product * (1.0 if base is None else np.array(base))).astype(np.float32)
    assert np.array_equal(np.array(got, np.float32), want)
    assert got == _native.stored_factors(radix, base, lead)


@given(st.sampled_from(RULED), models())
def test_a_stored_table_is_the_table(method: str, given_facts: dict[str, Any]) -> None:
    """What float32 loses over a whole table: less than one unit per digit multiplied."""
    t = rope_table(method, **given_facts)
    want = t.factors * np.array(t.base_factors or [1.0] * len(t.factors))
    got = np.array(stored_factors(t.radix_values, t.base_factors, t.lead))
    assert np.all(np.abs(got / want - 1) <= (len(want) + 3) * 2.0**-24)


def test_stored_factors_must_fit_float32() -> None:
    with pytest.raises(ValueError, match="not a finite float32"):
        stored_factors([1e39, 1.0])
    with pytest.raises(ValueError, match="not a finite float32"):
        stored_factors([1e30, 1e30, 1.0])
    with pytest.raises(ValueError, match="finite"):
        _native.stored_factors([1e30, 1e30, 1.0], None, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_rot": 127}, "n_rot must be an even whole number, 2 or more, got 127"),
        ({"n_rot": 0}, "n_rot"),
        ({"n_rot": 12.5}, "n_rot"),
        ({"freq_base": 1.0}, "freq_base must be a finite number above 1, got 1.0"),
        ({"freq_base": math.nan}, "freq_base"),
        ({"n_ctx_orig": 0}, "n_ctx_orig must be from 1 to 4294967295, got 0"),
        ({"n_ctx_orig": 2**32}, "n_ctx_orig"),
        ({"scale": 0.99}, "scale must be a finite number, 1 or more, got 0.99"),
        ({"scale": math.nan}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"beta_fast": 1.0}, "beta_fast must be above beta_slow and both above 0, got 1.0 and 1.0"),
        ({"beta_slow": 0.0}, "beta_slow"),
        ({"beta_slow": math.nan}, "beta_slow"),
        ({"attn_factor": 0.0}, "attn_factor must be a finite number above 0, got 0.0"),
        ({"method": "rope"}, "unknown method 'rope'; it must be one of none, linear"),
        ({"radix": [1.0] * 64}, "radix and lead belong to method 'custom', got method 'mrrope-pro'"),
        ({"method": "custom"}, "method 'custom' needs radix, 64 numbers above 0"),
        ({"method": "custom", "radix": [1.0] * 63}, "radix must hold 64 numbers, one per rotary pair, got 63"),
        ({"method": "custom", "radix": [1.0] * 9 + [0.0] * 55}, r"radix\[9\] must be a finite number above 0, got 0.0"),
        ({"method": "custom", "radix": [math.nan] * 64}, r"radix\[0\]"),
        ({"method": "custom", "radix": [1e200] * 64}, "radix and lead must multiply to finite"),
        ({"method": "custom", "radix": [1.0] * 64, "lead": -1.0}, "lead"),
        ({"base_factors": [1.0] * 32}, "base_factors must hold 64 numbers"),
        ({"base_factors": [1.0] * 63 + [-2.0]}, r"base_factors\[63\] must be a finite number above 0, got -2.0"),
    ],
)
def test_refusals_name_the_number_and_its_limits(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rope_table(**{"method": "mrrope-pro", "scale": 4.0, **LLAMA2, **change})


def test_arrays_are_read_only_float64() -> None:
    t = table("mrrope-pro")
    assert t.factors.dtype == t.radix.dtype == np.float64
    assert tuple(t.factors) == t.factor_values
    with pytest.raises(ValueError, match="read-only"):
        t.factors[0] = 2.0


def test_no_numpy_until_an_array_is_asked_for() -> None:
    code = """if True:
        import sys
        from mrrope_gguf.tables import rope_table, stored_factors
        t = rope_table("mrrope-pro", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=4)
        stored_factors(t.radix_values, t.base_factors, t.lead)
        assert "numpy" not in sys.modules
        t.factors
        assert "numpy" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
