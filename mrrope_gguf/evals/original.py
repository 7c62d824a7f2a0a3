"""A second context that runs the model as it is, beside one that runs it by a table: what KL compares with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import engine
from .host import Host

if TYPE_CHECKING:
    from llama_cpp import Llama


class Twin:
    """As much of a llama_cpp.Llama as a Decoder needs, on the weights of another one and with a context of its own."""

    def __init__(self, llm: Llama, n_ctx: int) -> None:
        from llama_cpp import _internals

        self.model, self.n_batch = llm.model, llm.n_batch
        params = type(llm.context_params).from_buffer_copy(llm.context_params)
        params.n_ctx = n_ctx
        self._ctx = _internals.LlamaContext(model=llm._model, params=params, verbose=False)
        self._n_vocab, self._n_ctx = int(llm.n_vocab()), int(self._ctx.n_ctx())

    def n_vocab(self) -> int:
        return self._n_vocab

    def n_ctx(self) -> int:
        return self._n_ctx

    def reset(self) -> None:
        """A context of its own has no tokens to forget but those of its memory."""

    def close(self) -> None:
        self._ctx.close()


@contextmanager
def original(host: Host, llm: Llama, n_ctx: int) -> Iterator[Any]:
    """The unextended model, for `n_ctx` tokens, beside `llm`, which runs it in another way; both are open at once.

    On the patched engine they share their weights. A stock library must load the original as a model of its own.
    """
    if not host.sets_tables:
        with Host(host.path, n_ctx=n_ctx, force=host.force, **host.options) as other:
            yield other.plain()
        return
    with engine.capture():
        twin = Twin(llm, n_ctx)
    try:
        if engine.has_elastic() and engine.get_elastic(twin).on:
            engine.set_elastic(twin, False)
        engine.set_table(twin, None)
        yield twin
    finally:
        with engine.capture():
            twin.close()
