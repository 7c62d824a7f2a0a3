"""Types of the C++ core. One section per binding file, each beside what it binds."""

from typing_extensions import Buffer

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
    x: Buffer,
    out: Buffer,
    positions: Buffer,
    theta: list[float],
    attn_factor: float,
    half: bool,
    neox: bool,
    n_threads: int,
    level: str,
) -> None: ...
def nll(logits: Buffer, targets: Buffer, out: Buffer, n_threads: int, level: str) -> None: ...
def simd_levels() -> list[str]: ...
