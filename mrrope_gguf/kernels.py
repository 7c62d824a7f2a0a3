"""Rotary embedding and token likelihoods at memory speed: checks here, the work in native/rope.cpp and native/nll.cpp.

Both use the best instruction set of this CPU; MRROPE_SIMD=scalar|avx2|avx512|neon asks for another one.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from mrrope_gguf import _native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from mrrope_gguf.tables import RopeTable

MAX_POSITION = 2**31
MAX_THETA = 2.0**20


def simd_levels() -> list[str]:
    """The instruction sets that this CPU and this build can use, best first; "scalar" is always the last."""
    return _native.simd_levels()


def rope(
    x: NDArray[Any],
    positions: ArrayLike,
    table: RopeTable,
    mode: str = "norm",
    out: NDArray[Any] | None = None,
    n_threads: int | None = None,
) -> NDArray[Any]:
    """Turn every rotary pair of x by its position: what a model does to queries and keys before it compares them.

    Pair i of a token is turned by position * table.theta[i] radians and multiplied by table.attn_factor.

    x: float32 or float16 (tokens, heads, head_dim), C-contiguous.
    positions: int32 or int64 (tokens,), from -2**31 to 2**31; a negative one turns back, as a context shift does.
    mode: "norm" pairs dims (2i, 2i+1), "neox" dims (i, i + n_rot/2); dims from table.n_rot on stay as they are.
    out: None for a new array, x itself to work in place, or an array like x that does not overlap it.
    n_threads: None to choose by size.

    Returns out. Angles are exact to 1e-12 rad before cos and sin are rounded to float32, at any position; the result
    is the same, bit for bit, for every instruction set and number of threads.
    Raises ValueError where a type, shape, layout or number is not one of these.

    >>> import numpy as np
    >>> from mrrope_gguf.tables import rope_table
    >>> table = rope_table("none", n_rot=2, freq_base=1e4, n_ctx_orig=64, scale=1)
    >>> x = np.array([[[1.0, 0.0]]], dtype=np.float32)
    >>> print(rope(x, [1], table))  # cos 1, sin 1
    [[[0.5403023  0.84147096]]]
    """
    _check_array("x", x, ("float32", "float16"), 3)
    places = _integers("positions", positions, x.shape[0], -MAX_POSITION, MAX_POSITION)
    theta = _check_table(table, x.shape[2])
    if mode not in ("norm", "neox"):
        raise ValueError(f"mode must be 'norm' or 'neox', got {mode!r}")
    target = _aligned_like(x) if out is None else _check_out(x, out)
    _native.rope(x, target, places, theta, table.attn_factor, mode == "neox", _threads(n_threads), _level())
    return target


def nll(logits: NDArray[np.float32], targets: ArrayLike, n_threads: int | None = None) -> NDArray[np.float32]:
    """How surprised a model was by each token: -log softmax(logits)[target]. The mean's exp is the perplexity.

    logits: float32 (n, vocab), C-contiguous. They are read once, and no copy is made.
    targets: int32 or int64 (n,), from 0 to vocab - 1.
    n_threads: None to choose by size.

    Returns float32 (n,), within 1e-6 * (1 + value) of the exact figure. A logit of -inf is a token that cannot come,
    +inf as a target; a row with a NaN, a +inf or nothing but -inf gives NaN.
    Raises ValueError where a type, shape, layout or target is not one of these.

    >>> import numpy as np
    >>> print(nll(np.zeros((1, 4), dtype=np.float32), [2]))  # log 4
    [1.3862944]
    """
    import numpy as np

    _check_array("logits", logits, ("float32",), 2)
    n, vocab = logits.shape
    chosen = _integers("targets", targets, n, 0, vocab - 1)
    out = np.empty(n, dtype=np.float32)
    _native.nll(logits, chosen, out, _threads(n_threads), _level())
    return out


def _check_array(name: str, array: NDArray[Any], dtypes: tuple[DTypeLike, ...], n_dims: int) -> None:
    """ValueError unless array is a C-contiguous numpy array of one of dtypes in native byte order."""
    import numpy as np

    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be a numpy array, got {type(array).__name__}")
    if not any(array.dtype == dtype for dtype in dtypes):  # a swapped byte order is another dtype
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {array.dtype}")
    if array.ndim != n_dims:
        raise ValueError(f"{name} must have {n_dims} dimensions, got {array.ndim}: shape {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous, got strides {array.strides} for shape {array.shape}")
    if not array.flags.aligned:
        raise ValueError(f"{name} must be aligned to {array.itemsize} bytes, got address {_address(array)}")


def _check_out(x: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    _check_array("out", out, (x.dtype,), 3)
    if out.shape != x.shape:
        raise ValueError(f"out must have the shape of x, {x.shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError(f"out is read-only: shape {out.shape}")
    if out is not x and _address(out) != _address(x) and np.may_share_memory(x, out):
        shift = _address(out) - _address(x)
        raise ValueError(f"out must be x or apart from it; they overlap, {shift} bytes shifted")
    return out


def _integers(name: str, values: ArrayLike, n: int, low: int, high: int) -> NDArray[np.int64]:
    """values as contiguous int64 (n,), ValueError unless they are integers from low to high."""
    import numpy as np

    array = np.asarray(values)
    if array.size == 0 and n == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        raise ValueError(f"{name} must be int32 or int64, got {array.dtype}")
    if array.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {array.shape}")
    for extreme in (int(array.min()), int(array.max())):
        if not low <= extreme <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {extreme}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_table(table: RopeTable, head_dim: int) -> list[float]:
    """table.theta, ValueError unless its pairs fit in head_dim and its numbers are sound."""
    theta = table.theta
    if 2 * len(theta) > head_dim:
        raise ValueError(f"the table rotates {2 * len(theta)} dims, x has only head_dim {head_dim}")
    total = sum(map(abs, theta))
    if not total <= MAX_THETA:
        raise ValueError(f"theta must be finite and add up to {MAX_THETA:g} radians per token at most, got {total}")
    if not math.isfinite(table.attn_factor):
        raise ValueError(f"attn_factor must be finite, got {table.attn_factor}")
    return theta


def _aligned_like(x: NDArray[Any]) -> NDArray[Any]:
    """An uninitialised array like x that starts on a cache line, which the fastest stores need."""
    import numpy as np

    buffer = np.empty(x.nbytes + 64, dtype=np.uint8)
    start = -_address(buffer) % 64
    return buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _threads(n_threads: int | None) -> int:
    if n_threads is None:
        return 0
    if not 1 <= n_threads <= 1024:
        raise ValueError(f"n_threads must be from 1 to 1024, got {n_threads}")
    return n_threads


def _level() -> str:
    """The instruction set asked for in MRROPE_SIMD, "" for the best one."""
    level = os.environ.get("MRROPE_SIMD", "")
    if level and level not in simd_levels():
        raise ValueError(f"MRROPE_SIMD={level} is not one of this CPU's levels: {', '.join(simd_levels())}")
    return level
