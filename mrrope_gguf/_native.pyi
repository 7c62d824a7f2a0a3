"""Types of the C++ core. One section per binding file, each beside what it binds."""

from typing import Any

from numpy import float32, int64
from numpy.typing import NDArray
from typing_extensions import Buffer

# --- bind_tables.cpp ----------------------------------------------------------------------------------------------

def rope_table(
    method: str,
    n_rot: int,
    freq_base: float,
    n_ctx_orig: int,
    scale: float,
    beta_fast: float,
    beta_slow: float,
    base_factors: list[float] | None,
    radix: list[float] | None,
    lead: float,
) -> tuple[list[float], list[float], float, int, int]:
    """(factors, radix, attn_factor, d_l, d_h) by mrrope.h; ValueError on what it refuses."""

def stored_factors(radix: list[float], base_factors: list[float] | None, lead: float) -> list[float]: ...
def rescale(factors: list[float], from_scale: float, to_scale: float) -> list[float]: ...
def bound(theta: list[float], first: int, last: int) -> int | None: ...
def bound_sum(theta: list[float], m: int) -> float: ...
def bound_sums(theta: list[float], first: int, count: int) -> NDArray[float32]: ...
def min_base(n_ctx: int, n_rot: int, digits: int) -> float | None: ...

# --- bind_index.cpp -----------------------------------------------------------------------------------------------

class GGUFError(Exception):
    """args: (offset: int, field: str, what: str, why: str, fix: str)"""

class GGUFHeader:
    version: int
    alignment: int
    infos_start: int
    infos_end: int
    data_start: int
    def kvs(self) -> list[tuple[int, int, int, int, int, int, int]]: ...
    def tensors(self) -> list[tuple[int, int, int, int, int, int, tuple[int, ...]]]: ...

def scan_gguf(buffer: Buffer, file_size: int) -> GGUFHeader: ...
def ggml_types() -> list[tuple[str | None, int, int]]: ...

# --- bind_kernels.cpp ---------------------------------------------------------------------------------------------

def rope(
    x: NDArray[Any],
    out: NDArray[Any],
    positions: NDArray[int64],
    theta: list[float],
    attn_factor: float,
    neox: bool,
    n_threads: int,
    level: str,
) -> None: ...
def nll(
    logits: NDArray[float32], targets: NDArray[int64], out: NDArray[float32], n_threads: int, level: str
) -> None: ...
def simd_levels() -> list[str]: ...
