"""Elastic context: the rope table of a running context follows its longest sequence. The patched engine does the work.

Up to n_ctx_orig tokens the model is the original, bit for bit. At each stage the engine rotates the cached keys to the
next table; when tokens are removed, it rotates them back. docs/elastic.md has the reasons and the figures.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from mrrope_gguf.engine.libllama import llama_cpp, loaded_library
from mrrope_gguf.engine.rope_table import BAD_VALUE, OK, context_of, refusal
from mrrope_gguf.errors import EngineTrouble, Refused

if TYPE_CHECKING:
    from llama_cpp import Llama

SYMBOL = "llama_rope_elastic_set"


@dataclass(frozen=True)
class ElasticState:
    """Where a context stands. `on` is False for a static table, and where there is no table at all.

    `scale` is S of the table in effect, 1 while the model is as it was; `method` and `full_scale` are those of the
    table it grows to ("none" and 1 without one).
    """

    on: bool
    scale: float
    method: str
    full_scale: float


def get_elastic(llm: Llama | int) -> ElasticState:
    """The state of a llama_cpp.Llama, or of a llama_context_p. The engine moves at the next decode, not before.

    Raises EngineTrouble on a library without elastic context.
    """
    api, ctx = _api(), context_of(llm)
    return ElasticState(api.get(ctx), api.scale(ctx), api.method(ctx).decode(), api.full_scale(ctx))


def set_elastic(llm: Llama | int, on: bool) -> None:
    """Let the table follow the longest sequence, or (False) hold the full table from the first token on.

    Cached keys are rotated to where they belong. Raises Refused where there is no table to grow to or the keys cannot
    be rotated, EngineTrouble on a library without elastic context or where the backend fails.
    """
    api, ctx = _api(), context_of(llm)
    status = api.set(ctx, on)
    if status == OK:
        return
    what = f"elastic context was not switched {'on' if on else 'off'}"
    if status == BAD_VALUE:
        raise Refused(
            what,
            why="this context has no table to grow to",
            fix='extend the model first, or load it with rope_scaling_type="mrrope-pro"',
        )
    raise refusal(status, api.error(status).decode(), what=what)


def set_elastic_policy(llm: Llama | int, *, step: float, head_room: float) -> None:
    """When to grow and by how much: the first stage ends at n_ctx_orig tokens, every other `step` times later.

    A stage that ends at n tokens has S = head_room * n / n_ctx_orig, the last one that of the full table. A cache of
    few bits makes larger steps than it is told to. Raises Refused for a step of 1 or less and a head_room under 1.
    """
    if not (isfinite(step) and step > 1 and isfinite(head_room) and head_room >= 1):
        raise Refused(
            "the elastic policy was not changed",
            why=f"step = {step!r}, head_room = {head_room!r}",
            fix="step must be above 1 (1.19 is the default), head_room 1 or more",
        )
    api, ctx = _api(), context_of(llm)
    status = api.policy(ctx, step, head_room)
    if status != OK:
        raise refusal(status, api.error(status).decode(), what="the elastic policy was not changed")


def reserve_elastic(llm: Llama | int, n_tokens: int) -> None:
    """From the next decode on, hold the stage of n_tokens at least: for a first prompt known to be so long. 0: no more.

    The whole prompt is then read at its last scale instead of stage by stage. Raises Refused where the context is not
    elastic, and for a negative number.
    """
    api, ctx = _api(), context_of(llm)
    if n_tokens < 0 or api.reserve(ctx, n_tokens) != OK:
        raise Refused(
            f"no stage was reserved for {n_tokens} tokens",
            why="a length is 0 or more" if n_tokens < 0 else "this context is not elastic",
            fix="load the model with elastic=True" if n_tokens >= 0 else "give the length of the prompt",
        )


@dataclass(frozen=True)
class _Api:
    """The C functions; signatures as the patched llama.h declares them."""

    set: Any
    get: Any
    policy: Any
    reserve: Any
    method: Any
    full_scale: Any
    scale: Any
    error: Any


def has_elastic() -> bool:
    """Whether the library of this process can do it."""
    return hasattr(llama_cpp().llama_cpp._lib, SYMBOL)


@cache
def _api() -> _Api:
    if not has_elastic():
        library = loaded_library()
        kind = "of an older patch" if library.has_rope_table else "stock"
        raise EngineTrouble(
            "elastic context is not to be had here",
            why=f"the libllama in {library.path.parent} is {kind}: it has no {SYMBOL}",
            fix="`mrrope build` once for the patched engine",
        )
    lib, context = llama_cpp().llama_cpp._lib, ctypes.c_void_p

    def function(name: str, result: Any, *arguments: Any) -> Any:
        # indexing makes a fresh object: the signature set here is ours alone
        found = lib[f"llama_rope_{name}"]
        found.restype, found.argtypes = result, list(arguments)
        return found

    return _Api(
        set=function("elastic_set", ctypes.c_int32, context, ctypes.c_bool),
        get=function("elastic_get", ctypes.c_bool, context),
        policy=function("elastic_policy", ctypes.c_int32, context, ctypes.c_float, ctypes.c_float),
        reserve=function("elastic_reserve", ctypes.c_int32, context, ctypes.c_int32),
        method=function("elastic_method", ctypes.c_char_p, context),
        full_scale=function("elastic_scale", ctypes.c_float, context),
        scale=function("table_scale", ctypes.c_float, context),
        error=function("table_error", ctypes.c_char_p, ctypes.c_int32),
    )
