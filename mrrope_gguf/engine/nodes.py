"""Values of a running graph: tensors caught by name and operation while llama.cpp computes them.

llama.cpp asks its eval callback before each node of a graph and calls again once a wanted one is computed. The callback
is a parameter of a context, so a model that is loaded already gets a new context here, in the place of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mrrope_gguf.engine.libllama import _function, llama_cpp
from mrrope_gguf.engine.log import capture
from mrrope_gguf.errors import EngineTrouble

if TYPE_CHECKING:
    import numpy as np
    from llama_cpp import Llama
    from numpy.typing import NDArray

    Taker = Callable[[str, NDArray[np.float32]], None]

F32 = 0  # enum ggml_type
Wanted = Callable[[str, str], bool]  # (name, operation), such as ("Qcur-3", "ROPE")


class _Tensor(ctypes.Structure):
    """The head of struct ggml_tensor, up to its shape."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


class _Ggml(NamedTuple):
    name: Any
    op: Any
    get: Any


@contextmanager
def catch_nodes(llm: Llama, wanted: Wanted, take: Taker) -> Iterator[Callable[[], None]]:
    """While this is open, every decode of `llm` gives take(name, value) each node that wanted(name, operation) names.

    value: float32, shape (ne[2], ne[1], ne[0]) as ggml has it, the caller's own copy. Nodes of other types than f32, of
    four dimensions or not contiguous raise EngineTrouble. The context is a new one, empty, without a table set by
    engine.set_table; the one before it is gone, and the Llama is closed at the end. What take raises is raised again by
    what this gives, to be called between decodes, or at the end. Raises EngineTrouble too where llama.cpp can give no
    new context.
    """
    ggml, failed = _ggml(), list[BaseException]()
    api = llama_cpp().llama_cpp

    def called(tensor: int, ask: bool, _: Any) -> bool:
        # an exception cannot pass through C: it is kept, and the graph stops here
        if failed:
            return False
        try:
            name, op = ggml.name(tensor).decode(errors="replace"), ggml.op(tensor).decode()
            if ask:
                return bool(wanted(name, op))
            take(name, _value(ggml, tensor, name))
            return True
        except BaseException as error:
            failed.append(error)
            return False

    def check() -> None:
        if failed:
            raise failed[0]

    callback = api.ggml_backend_sched_eval_callback(called)
    _replace(llm, api, callback)
    try:
        yield check
    finally:
        with capture():
            llm.close()  # its callback is about to go
    check()


def _replace(llm: Llama, api: Any, callback: Any) -> None:
    """Give the Llama a context with this callback in the place of its own, whose memory is freed first."""
    holder, params = llm._ctx, llm.context_params
    with capture() as log:
        api.llama_free(holder.ctx)
        holder.ctx, params.cb_eval = None, callback
        ctx = api.llama_init_from_model(llm._model.model, params)
    if not ctx:
        raise EngineTrouble("llama.cpp gives no second context", why=log.why(), fix="try a smaller n_ctx")
    holder.ctx, holder.memory = ctx, api.llama_get_memory(ctx)


def _value(ggml: _Ggml, tensor: int, name: str) -> NDArray[np.float32]:
    import numpy as np

    seen = _Tensor.from_address(tensor)
    shape, strides = tuple(seen.ne), tuple(seen.nb)
    plain = (4, 4 * shape[0], 4 * shape[0] * shape[1])
    if seen.type != F32 or shape[3] != 1 or strides[:3] != plain:
        raise EngineTrouble(
            f"the graph's {name} cannot be read",
            why=f"it is of ggml type {seen.type}, shape {shape} and strides {strides}, not contiguous float32",
            fix="take a model of another architecture",
        )
    out = np.empty(shape[2::-1], dtype=np.float32)
    ggml.get(tensor, out.ctypes.data, 0, out.nbytes)
    return out


@cache
def _ggml() -> _Ggml:
    lib, pointer = llama_cpp().llama_cpp._lib, ctypes.c_void_p
    found = _Ggml(
        name=_function(lib, "ggml_get_name", ctypes.c_char_p, pointer),
        op=_function(lib, "ggml_op_desc", ctypes.c_char_p, pointer),
        get=_function(lib, "ggml_backend_tensor_get", None, pointer, pointer, ctypes.c_size_t, ctypes.c_size_t),
    )
    if None in found:
        raise EngineTrouble("this libllama hides ggml's functions", why="ggml_get_name is not exported")
    return found
