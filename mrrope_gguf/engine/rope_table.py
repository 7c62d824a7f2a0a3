"""The rope table of a running context, through the C functions that the patch adds to llama.cpp.

`set_table` changes it at any time: keys that are cached already are rotated again, each at its own position, so that
they are what they would have been under the new table. Nothing else of the context changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from mrrope_gguf.engine.libllama import ROPE_TABLE_SYMBOL, llama_cpp, loaded_library
from mrrope_gguf.errors import EngineTrouble, MrropeError, Refused

if TYPE_CHECKING:
    from llama_cpp import Llama

    from mrrope_gguf.tables import RopeTable

# enum llama_rope_table_status in the patched llama.h
OK, BAD_COUNT, BAD_VALUE, NO_ROPE, NOT_REACHED, NORM_AFTER, MROPE, NO_SHIFT, FAILED = range(0, -9, -1)

_FIXES = {
    BAD_COUNT: "make the table with the n_rot of this model (`mrrope inspect` shows it)",
    BAD_VALUE: "every factor and attn_factor must be a finite float32 above 0",
    NO_ROPE: "nothing to do: no global layer of this model has RoPE, so its reach is not limited by one",
    NOT_REACHED: "run this model without a table; docs/engine.md lists the architectures that take one",
    NORM_AFTER: "set the table before the first token, or clear the memory first (Llama.reset, llama_memory_clear)",
    MROPE: "set the table before the first token, or clear the memory first (Llama.reset, llama_memory_clear)",
    NO_SHIFT: "set the table before the first token, or clear the memory first (Llama.reset, llama_memory_clear)",
    FAILED: "see llama.cpp's log; a smaller n_ctx or n_ubatch needs less memory",
}


@dataclass(frozen=True)
class ActiveTable:
    """What a context turns by: pair i by pos * freq_base**(-2i/n_rot) / factors[i], cos and sin times attn_factor."""

    factors: tuple[float, ...]  # (n_rot/2,), float32 values, a model's own rope_freqs included
    attn_factor: float
    method: str  # of tables.METHODS; "custom" where set_table or set_factors set it
    scale: float


def set_table(llm: Llama | int, table: RopeTable | None) -> None:
    """Make a context turn by `table`, or by the model's own RoPE scaling again (None).

    llm: a llama_cpp.Llama, or a llama_context_p. The factors are those a file would hold (tables.stored_factors).
    Raises Refused where keys or model do not allow it, EngineTrouble on a stock library or where the backend fails;
    the context is then as it was.
    """
    if table is None:
        _set(llm, (), 0.0)
        return
    from mrrope_gguf.tables import stored_factors

    factors = stored_factors(table.radix_values, table.base_factors, table.lead)
    set_factors(llm, factors, table.attn_factor)


def set_factors(llm: Llama | int, factors: Sequence[float], attn_factor: float = 1.0) -> None:
    """The same for factors (n_rot/2,) of one's own, which take the place of the model's rope_freqs and scaling too.

    Raises as set_table does; Refused also for no factors at all, which set_table(llm, None) is for.
    """
    if not len(factors):
        raise refusal(BAD_COUNT, "0 factors were given", "the model's own scaling comes back with set_table(llm, None)")
    _set(llm, factors, attn_factor)


def get_table(llm: Llama | int) -> ActiveTable | None:
    """The table a context turns by, from its file, its parameters or set_table; None if it has none.

    Raises EngineTrouble on a stock library.
    """
    api, ctx = _api(), context_of(llm)
    method = api.method(ctx).decode()
    n = api.n(ctx)
    if method == "none" or not n:
        return None
    factors, attn_factor = (ctypes.c_float * n)(), ctypes.c_float()
    if not api.get(ctx, factors, n, ctypes.byref(attn_factor)):
        return None
    return ActiveTable(tuple(factors), attn_factor.value, method, api.scale(ctx))


def table_size(llm: Llama | int) -> int:
    """How many factors a table of this model has: n_rot/2 of its global layers, 0 without RoPE.

    Raises EngineTrouble on a stock library.
    """
    return int(_api().n(context_of(llm)))


def _set(llm: Llama | int, factors: Sequence[float], attn_factor: float) -> None:
    api, ctx, n = _api(), context_of(llm), len(factors)
    status = api.set(ctx, (ctypes.c_float * n)(*factors) if n else None, n, attn_factor)
    if status != OK:
        raise refusal(status, _why(api, ctx, status, factors, attn_factor))


def _why(api: _Api, ctx: int, status: int, factors: Sequence[float], attn_factor: float) -> str:
    """llama.cpp's reason and the numbers behind it."""
    reason: str = api.error(status).decode()
    if status == BAD_COUNT:
        return f"{reason}: {len(factors)} were given, and a table of this model has {api.n(ctx)}"
    if status == BAD_VALUE:
        named = [*((f"factors[{i}]", f) for i, f in enumerate(factors)), ("attn_factor", attn_factor)]
        wrong = [f"{name} = {value!r}" for name, value in named if not _usable(value)]
        return f"{reason}: {', '.join(wrong[:3])}" if wrong else reason
    return reason


def _usable(value: float) -> bool:
    """Whether a float32 holds it as a number above 0."""
    return isfinite(value) and ctypes.c_float(value).value > 0 and isfinite(ctypes.c_float(value).value)


def refusal(status: int, why: str, fix: str = "", what: str = "the rope table was not changed") -> MrropeError:
    """The error for a status that is not OK, with the fix that belongs to it."""
    kind = EngineTrouble if status == FAILED else Refused
    return kind(what, why=why, fix=fix or _FIXES.get(status, ""))


def context_of(llm: Llama | int) -> int:
    """The llama_context * behind a Llama, or the pointer itself."""
    if isinstance(llm, int):
        return llm
    holder = getattr(llm, "_ctx", None)
    ctx = getattr(holder, "ctx", None)
    if not ctx:
        raise EngineTrouble("this model has no context", why="it was closed", fix="load it again")
    return int(ctx)


@dataclass(frozen=True)
class _Api:
    """The C functions; signatures as the patched llama.h declares them."""

    set: Any
    get: Any
    n: Any
    error: Any
    method: Any
    scale: Any


@cache
def _api() -> _Api:
    library = loaded_library()
    if not library.has_rope_table:
        raise EngineTrouble(
            "a rope table cannot be changed in a running context",
            why=f"the libllama in {library.path.parent} is stock: it has no {ROPE_TABLE_SYMBOL}",
            fix="`mrrope build` once for the patched engine",
        )
    lib = llama_cpp().llama_cpp._lib
    context, floats = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)

    def function(name: str, result: Any, *arguments: Any) -> Any:
        # indexing makes a fresh object: the signature set here is ours alone
        found = lib[f"llama_rope_table_{name}"]
        found.restype, found.argtypes = result, list(arguments)
        return found

    return _Api(
        set=function("set", ctypes.c_int32, context, floats, ctypes.c_size_t, ctypes.c_float),
        get=function("get", ctypes.c_bool, context, floats, ctypes.c_size_t, floats),
        n=function("n", ctypes.c_size_t, context),
        error=function("error", ctypes.c_char_p, ctypes.c_int32),
        method=function("method", ctypes.c_char_p, context),
        scale=function("scale", ctypes.c_float, context),
    )
