"""Rope tables: how much slower each rotary pair must turn for a longer context. The readable twin of native/mrrope.h.

Pair i of n_rot/2 turns by theta_i = freq_base**(-2i/n_rot) per token. Seen as a number, a position is a row of
digits: pair i is digit i, and it carries into pair i+1 after freq_base**(2/n_rot) steps. Extending the context gives
digit d a radix `radix[d]` times as large, so theta_i is divided by factors[i] = radix[0] * ... * radix[i-1].
Every method below is a rule for that one list.

No numpy at load: `factor_values` and `radix_values` are tuples, `factors` and `radix` the same numbers as arrays.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METHODS: tuple[str, ...] = (
    "none", "linear", "ntk", "yarn", "yarn-turns", "mrrope-uni", "mrrope-pro", "llama3", "custom",
)  # fmt: skip

# The methods that sharpen attention by 0.1 ln S + 1 (YaRN, section 3.4).
TEMPERED: frozenset[str] = frozenset({"yarn", "yarn-turns", "mrrope-uni", "mrrope-pro"})
DEFAULT_METHOD = "mrrope-uni"  # ahead in perplexity and needles on what was measured: docs/elastic-figures.md

# Meta's band for Llama 3.1: low_freq_factor and high_freq_factor of its published scaling rule.
LLAMA3_BETA_FAST, LLAMA3_BETA_SLOW = 4.0, 1.0

FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class RopeTable:
    """One factor per rotary pair, and the facts it was made from. Made by `rope_table`, not by hand."""

    method: str
    n_rot: int
    freq_base: float
    n_ctx_orig: int
    scale: float
    beta_fast: float
    beta_slow: float
    attn_factor: float  # cos and sin are multiplied by it, for q and for k
    d_l: int  # last pair that keeps its speed
    d_h: int  # first pair that is slowed by the whole scale; may lie past the last pair
    lead: float  # factors[0]: what divides the position itself; 1 but for `linear` and some custom tables
    radix_values: tuple[float, ...]  # (n_rot/2,), the last one is 1: no pair follows it
    factor_values: tuple[float, ...]  # (n_rot/2,), without base_factors
    base_factors: tuple[float, ...] | None = None  # (n_rot/2,), the model's own rope_freqs

    @cached_property
    def factors(self) -> NDArray[np.float64]:
        """What theta_i is divided by, float64 (n_rot/2,), read-only. A model's own rope_freqs come on top."""
        return _read_only(self.factor_values)

    @cached_property
    def radix(self) -> NDArray[np.float64]:
        """How much larger each digit's radix became, float64 (n_rot/2,), read-only."""
        return _read_only(self.radix_values)

    @cached_property
    def theta(self) -> list[float]:
        """Radians per token of each pair under this table and the model's own rope_freqs, (n_rot/2,)."""
        base = self.base_factors or (1.0,) * len(self.factor_values)
        plain = pair_angles(self.n_rot, self.freq_base)
        return [t / (f * b) for t, f, b in zip(plain, self.factor_values, base, strict=True)]


def rope_table(
    method: str,
    *,
    n_rot: int,
    freq_base: float,
    n_ctx_orig: int,
    scale: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    base_factors: Sequence[float] | None = None,
    radix: Sequence[float] | None = None,
    lead: float = 1.0,
    attn_factor: float | None = None,
) -> RopeTable:
    """The factors that stretch a model's context `scale` times, one per rotary pair.

    Pair i turns by theta_i / factors[i] per token. Pairs that turn more than `beta_fast` times within
    `n_ctx_orig` keep 1, those that turn less than `beta_slow` times get `scale`, and between them the method decides.

    method: one of METHODS. `llama3` has a band of its own (4 and 1 turns) unless other betas than 32 and 1 are given.
    `custom` takes radix (n_rot/2,), the table at this very scale, and `lead`, its first factor.
    base_factors: the model's own rope_freqs (n_rot/2,); turns are then counted on theta_i / base_factors[i].
    attn_factor: None for the method's rule, 0.1 ln(scale) + 1 for the yarn and mrrope families and 1 for the others.

    Returns a RopeTable: factors and radix, float64 (n_rot/2,), attn_factor, d_l, d_h.
    Raises ValueError if n_rot is odd, scale < 1, or any other number lies outside its limits; it names them.
    Source: MrRoPE (arXiv 2601.22181) eq. 13-16; boundaries as in YaRN (arXiv 2309.00071).

    >>> t = rope_table("mrrope-pro", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=4)
    >>> t.d_l, t.d_h, round(float(t.factors[33]), 4)
    (20, 46, 1.4325)
    """
    _check_model(n_rot, freq_base, n_ctx_orig)
    if method == "llama3" and (beta_fast, beta_slow) == (32.0, 1.0):
        beta_fast, beta_slow = LLAMA3_BETA_FAST, LLAMA3_BETA_SLOW
    _check_stretch(method, scale, beta_fast, beta_slow, attn_factor)
    if (radix is not None or lead != 1.0) and method != "custom":
        raise ValueError(f"radix and lead belong to method 'custom', got method {method!r}")
    base = None if base_factors is None else _positive("base_factors", base_factors, n_rot // 2)
    d_l, d_h = band(n_rot, freq_base, n_ctx_orig, beta_fast, beta_slow, base)
    if method == "custom":
        if radix is None:
            raise ValueError(f"method 'custom' needs radix, {n_rot // 2} numbers above 0")
        factors = radix_to_factors(_positive("radix", radix, n_rot // 2), lead)
    else:
        turns = pair_turns(n_rot, freq_base, n_ctx_orig, base)
        factors = _RULES[method](_Stretch(float(scale), d_l, d_h, turns, beta_fast, beta_slow))
    return RopeTable(
        method, n_rot, float(freq_base), n_ctx_orig, float(scale), float(beta_fast), float(beta_slow),
        default_attn_factor(method, scale) if attn_factor is None else float(attn_factor), d_l, d_h,
        factors[0], tuple(factors_to_radix(factors)), tuple(factors), base,
    )  # fmt: skip


def pair_angles(n_rot: int, freq_base: float) -> list[float]:
    """theta_i = freq_base**(-2i/n_rot), radians per token, (n_rot/2,)."""
    return [freq_base ** (-2.0 * i / n_rot) for i in range(n_rot // 2)]


def pair_turns(n_rot: int, freq_base: float, n_ctx_orig: int, base: Sequence[float] | None = None) -> list[float]:
    """How often each pair turns round within the original context, (n_rot/2,)."""
    base = base or [1.0] * (n_rot // 2)
    angles = pair_angles(n_rot, freq_base)
    return [n_ctx_orig * theta / b / (2.0 * math.pi) for theta, b in zip(angles, base, strict=True)]


def band(
    n_rot: int, freq_base: float, n_ctx_orig: int, beta_fast: float, beta_slow: float, base: Sequence[float] | None
) -> tuple[int, int]:
    """(d_l, d_h), the pairs between which a table grows from 1 to the scale.

    Clamped as ggml_rope_yarn_corr_dims and the paper's authors do: d_l to 0 below, d_h to n_rot - 1 above,
    so a band can end past the last pair (n_rot/2 - 1), and factors then never reach the scale.
    """
    d_fast = _pair_of_turns(beta_fast, n_rot, freq_base, n_ctx_orig, base)
    d_slow = _pair_of_turns(beta_slow, n_rot, freq_base, n_ctx_orig, base)
    return max(math.floor(d_fast), 0), min(math.ceil(d_slow), n_rot - 1)


def _pair_of_turns(turns: float, n_rot: int, freq_base: float, n_ctx_orig: int, base: Sequence[float] | None) -> float:
    """Where along the pairs, as a real number, one turns `turns` times within n_ctx_orig.

    ln(turns of pair x) = reach - x * slope / n_rot - g(x), with g = ln(base_factors) linear between pairs and
    level beyond both ends. Solved piece by piece; the first crossing counts. Without base factors g = 0.
    """
    reach = math.log(n_ctx_orig / (turns * 2.0 * math.pi))
    slope = 2.0 * math.log(freq_base)
    if base is None:
        return n_rot * reach / slope
    g = [math.log(b) for b in base]
    x = n_rot * (reach - g[0]) / slope
    if x <= 0.0:
        return x
    for i in range(len(g) - 1):
        rise = g[i + 1] - g[i]
        if slope + n_rot * rise > 0.0:
            x = n_rot * (reach - g[i] + i * rise) / (slope + n_rot * rise)
            if x <= i + 1:
                return max(x, float(i))
    return max(n_rot * (reach - g[-1]) / slope, float(len(g) - 1))


@dataclass(frozen=True)
class _Stretch:
    """What a rule may look at: scale, band and the turns of every pair (n_rot/2,)."""

    scale: float
    d_l: int
    d_h: int
    turns: list[float]
    beta_fast: float
    beta_slow: float

    def steps(self) -> tuple[list[int], int]:
        """(t, n): how far each pair stands in the band, 0..n, and the band's width. An empty band is one step."""
        n = max(self.d_h - self.d_l, 1)
        return [min(max(i - self.d_l, 0), n) for i in range(len(self.turns))], n


def _none(s: _Stretch) -> list[float]:
    return [1.0 for _ in s.turns]


def _linear(s: _Stretch) -> list[float]:
    """Position interpolation: every pair slows alike."""
    return [s.scale for _ in s.turns]


def _ntk(s: _Stretch) -> list[float]:
    """A larger base: every digit's radix grows by the same S**(1/(n_rot/2 - 1))."""
    last = max(len(s.turns) - 1, 1)
    return [s.scale ** (i / last) for i in range(len(s.turns))]


def _yarn(s: _Stretch) -> list[float]:
    """Speeds mixed along a ramp that is linear in the pair's index (llama.cpp and YaRN's reference code)."""
    steps, n = s.steps()
    return [_mix(1.0 - t / n, s.scale) for t in steps]


def _by_turns(s: _Stretch) -> list[float]:
    """Speeds mixed along a ramp that is linear in the pair's turns (NTK-by-parts; Llama 3.1 with 4 and 1 turns)."""
    width = s.beta_fast - s.beta_slow
    return [_mix(min(max((r - s.beta_slow) / width, 0.0), 1.0), s.scale) for r in s.turns]


def _uni(s: _Stretch) -> list[float]:
    """MrRoPE-Uni: every digit of the band grows alike, lambda = S**(1/n)."""
    steps, n = s.steps()
    return [s.scale ** (t / n) for t in steps]


def _pro(s: _Stretch) -> list[float]:
    """MrRoPE-Pro: the k-th digit of the band grows by S**(2k/(n(n+1))), the slower the pair the more."""
    steps, n = s.steps()
    return [s.scale ** (t * (t + 1) / (n * (n + 1))) for t in steps]


def _mix(keep: float, scale: float) -> float:
    """The factor of a pair whose speed is `keep` parts its own and 1 - keep parts slowed by `scale`."""
    return min(max(1.0 / ((1.0 - keep) / scale + keep), 1.0), scale)  # rounding must not leave 1..scale


_RULES: dict[str, Callable[[_Stretch], list[float]]] = {
    "none": _none, "linear": _linear, "ntk": _ntk, "yarn": _yarn, "yarn-turns": _by_turns,
    "mrrope-uni": _uni, "mrrope-pro": _pro, "llama3": _by_turns,
}  # fmt: skip


def default_attn_factor(method: str, scale: float) -> float:
    """The temperature a method asks for: 0.1 ln(scale) + 1 for the yarn and mrrope families, else 1."""
    return 0.1 * math.log(scale) + 1.0 if method in TEMPERED else 1.0


def radix_to_factors(radix: Sequence[float], lead: float = 1.0) -> list[float]:
    """factors[i] = lead * radix[0] * ... * radix[i-1]; the last radix has no pair to act on.

    >>> radix_to_factors([1.0, 2.0, 2.0, 1.0])
    [1.0, 1.0, 2.0, 4.0]
    """
    factors, product = [], float(lead)
    for value in radix:
        factors.append(product)
        product *= value
    if not all(math.isfinite(f) and f > 0.0 for f in factors):
        raise ValueError(f"radix and lead must multiply to finite numbers > 0, got {factors[-1]!r} for the last pair")
    return factors


def factors_to_radix(factors: Sequence[float]) -> list[float]:
    """radix[d] = factors[d+1] / factors[d], and 1 for the last digit. factors[0] is the lead.

    >>> factors_to_radix([1.0, 1.0, 2.0, 4.0])
    [1.0, 2.0, 2.0, 1.0]
    """
    values = _positive("factors", factors, len(factors))
    return [after / before for before, after in pairwise(values)] + [1.0]


def rescale(table: RopeTable, scale: float) -> RopeTable:
    """The same table at another scale. At scale 1 it is the original model's, bit for bit.

    A method is asked again. A custom table follows factors(S') = factors(S)**(ln S' / ln S), which is what ntk,
    mrrope-uni and mrrope-pro do of themselves. An attn_factor of one's own moves linearly in ln S, as YaRN's does.
    Raises ValueError for scale < 1, for a custom table that was made at scale 1 (it has no direction), and for one
    whose factors overflow on the way.
    """
    _check_scale(scale)
    if scale == table.scale:
        return table
    power = _power(table, scale)
    plain = table.attn_factor == default_attn_factor(table.method, table.scale)
    attn = default_attn_factor(table.method, scale) if plain else 1.0 + (table.attn_factor - 1.0) * power
    if table.method != "custom":
        return rope_table(
            table.method, n_rot=table.n_rot, freq_base=table.freq_base, n_ctx_orig=table.n_ctx_orig, scale=scale,
            beta_fast=table.beta_fast, beta_slow=table.beta_slow, base_factors=table.base_factors, attn_factor=attn,
        )  # fmt: skip
    try:
        factors = list(_positive("factors", [f**power for f in table.factor_values], len(table.factor_values)))
    except OverflowError:
        raise ValueError(f"a custom table of scale {table.scale:g} cannot be moved as far as {scale:g}") from None
    return replace(
        table, scale=float(scale), attn_factor=attn, lead=factors[0], factor_values=tuple(factors),
        radix_values=tuple(factors_to_radix(factors)),
    )  # fmt: skip


def _power(table: RopeTable, scale: float) -> float:
    """ln S' / ln S, and 1 for a method, which is asked again, at scale 1."""
    if table.scale > 1.0:
        return math.log(scale) / math.log(table.scale)
    if table.method == "custom":
        raise ValueError(f"a custom table of scale 1 cannot be moved to scale {scale}; give the scale it was made for")
    return 1.0


def stored_factors(
    radix_f32: Sequence[float], base_factors: Sequence[float] | None = None, lead: float = 1.0
) -> list[float]:
    """The factors a file holds, as float32 values (n_rot/2,): base factors included, rounded once.

    Radix, lead and base factors are taken as the float32 numbers a file stores; the product runs in double.
    So whoever reads the stored radix computes these very numbers again.
    Raises ValueError for a value that float32 cannot hold.
    """
    factors = radix_to_factors([to_float32(r) for r in radix_f32], to_float32(lead))
    base = [1.0] * len(factors) if base_factors is None else _positive("base_factors", base_factors, len(factors))
    return [to_float32(f * to_float32(b)) for f, b in zip(factors, base, strict=True)]


def to_float32(value: float) -> float:
    """The float32 nearest to a double.  Raises ValueError where there is none.

    >>> to_float32(0.1)
    0.10000000149011612
    """
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{value!r} is not a finite float32; its limit is {FLOAT32_MAX:.3g}")
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _read_only(values: Sequence[float]) -> NDArray[np.float64]:
    import numpy as np

    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return array


def _check_model(n_rot: int, freq_base: float, n_ctx_orig: int) -> None:
    if not (int(n_rot) == n_rot and n_rot >= 2 and n_rot % 2 == 0):
        raise ValueError(f"n_rot must be an even whole number, 2 or more, got {n_rot!r}")
    if not (math.isfinite(freq_base) and freq_base > 1.0):
        raise ValueError(f"freq_base must be a finite number above 1, got {freq_base!r}")
    if not (n_ctx_orig >= 1 and n_ctx_orig < 2**32):
        raise ValueError(f"n_ctx_orig must be from 1 to 4294967295, got {n_ctx_orig!r}")


def _check_stretch(method: str, scale: float, beta_fast: float, beta_slow: float, attn_factor: float | None) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; it must be one of {', '.join(METHODS)}")
    _check_scale(scale)
    if not (math.isfinite(beta_fast) and beta_fast > beta_slow > 0.0):
        raise ValueError(f"beta_fast must be above beta_slow and both above 0, got {beta_fast!r} and {beta_slow!r}")
    if attn_factor is not None and not (math.isfinite(attn_factor) and attn_factor > 0.0):
        raise ValueError(f"attn_factor must be a finite number above 0, got {attn_factor!r}")


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale >= 1.0):
        raise ValueError(f"scale must be a finite number, 1 or more, got {scale!r}")


def _positive(name: str, values: Sequence[float], n: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != n or not numbers:
        raise ValueError(f"{name} must hold {n} numbers, one per rotary pair, got {len(numbers)}")
    for i, v in enumerate(numbers):
        if not (math.isfinite(v) and v > 0.0):
            raise ValueError(f"{name}[{i}] must be a finite number above 0, got {v!r}")
    return numbers
