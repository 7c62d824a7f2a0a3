"""ggml's own rotation on the CPU, through its libraries alone: what llama.cpp's kernels make of a position."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tests import ggml_oracle

if TYPE_CHECKING:
    from numpy.typing import NDArray

F32, I32 = 0, 26


class _Params(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def _ggml() -> tuple[Any, Any]:
    path = ggml_oracle.libggml()
    assert path is not None
    base = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(path.with_name(path.name.replace("ggml-base", "ggml-cpu"))))
    pointer, integer, real, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
    for name, takes in {
        "init": [_Params],
        "new_tensor_1d": [pointer, integer, long],
        "new_tensor_3d": [pointer, integer, long, long, long],
        "rope_ext": [*[pointer] * 4, *[integer] * 3, *[real] * 6],
        "new_graph": [pointer],
        "get_data": [pointer],
        "build_forward_expand": [pointer, pointer],
        "free": [pointer],
    }.items():
        function = getattr(base, f"ggml_{name}")
        function.argtypes, function.restype = takes, None if name in ("free", "build_forward_expand") else pointer
    cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, integer]
    return base, cpu


def ggml_rope(
    x: NDArray[np.float32], positions: Sequence[int], freq_base: float, factors: Sequence[float] | None
) -> NDArray[np.float32]:
    """x, float32 (tokens, 1, n_rot) in NORM pairs, as ggml_rope_ext turns it with these frequency factors."""
    base, cpu = _ggml()
    n_rot = x.shape[2]
    ctx = base.ggml_init(_Params(4 * x.nbytes + (8 << 20), None, False))

    def tensor(kind: int, values: NDArray[Any]) -> int:
        shape = values.shape[::-1]
        held: int = getattr(base, f"ggml_new_tensor_{len(shape)}d")(ctx, kind, *shape)
        ctypes.memmove(base.ggml_get_data(held), values.ctypes.data, values.nbytes)
        return held

    places = tensor(I32, np.asarray(positions, np.int32))
    divisors = None if factors is None else tensor(F32, np.asarray(factors, np.float32))
    turned = base.ggml_rope_ext(
        ctx, tensor(F32, np.ascontiguousarray(x)), places, divisors, n_rot, 0, 0, freq_base, 1.0, 0.0, 1.0, 32.0, 1.0
    )
    graph = base.ggml_new_graph(ctx)
    base.ggml_build_forward_expand(graph, turned)
    assert cpu.ggml_graph_compute_with_ctx(ctx, graph, 1) == 0
    out = np.empty_like(x)
    ctypes.memmove(out.ctypes.data, base.ggml_get_data(turned), out.nbytes)
    base.ggml_free(ctx)
    return out
