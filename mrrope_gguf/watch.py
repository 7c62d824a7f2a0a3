"""What a loaded `llama_cpp.Llama` is made to do besides: report progress and stages, keep to its sliding window."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mrrope_gguf import engine
from mrrope_gguf.progress import Progress

if TYPE_CHECKING:
    from llama_cpp import Llama


@dataclass(frozen=True)
class StageChange:
    """The table of an elastic context moved from S = `before` to S = `after`; 1 is the original model.

    `n_tokens` is the length of the longest sequence after the decode that moved it. Stages may have been passed over.
    """

    n_tokens: int
    before: float
    after: float


OnStage = Callable[[StageChange], object]


def report_stages(llm: Llama, on_stage: OnStage) -> None:
    """Call on_stage after every decode, whichever of Llama's methods asked for it, that left another table behind."""
    context = llm._ctx
    decode, held = type(context).decode, weakref.ref(context)

    def watched(batch: Any) -> None:
        context = held()
        assert context is not None  # it is being called
        # asked afresh: a state that was read in brings its own
        before = engine.get_elastic(context.ctx).scale
        decode(context, batch)
        after = engine.get_elastic(context.ctx).scale
        if after != before:
            on_stage(StageChange(_n_tokens(context, batch.batch), before, after))

    context.decode = watched


def _n_tokens(context: Any, batch: Any) -> int:
    if context.memory is None:
        return 1 + max(int(batch.pos[i]) for i in range(batch.n_tokens))
    api = engine.llama_cpp().llama_cpp
    n_seq = api.llama_n_seq_max(context.ctx)
    return max(int(api.llama_memory_seq_pos_max(context.memory, seq)) + 1 for seq in range(n_seq))


def guard_window(llm: Llama, window: int) -> None:
    """Make a sliding-window cache say no when it is wound back past what it still holds.

    llama.cpp drops keys that left the window. Llama reuses the prefix two prompts share and would go on without them;
    on a "no" it evaluates the whole prompt again, as it does for recurrent models.
    """
    context = llm._ctx
    if context.memory is None:
        return
    lowest = engine.llama_cpp().llama_cpp.llama_memory_seq_pos_min
    remove, memory = type(context).kv_cache_seq_rm, context.memory
    held, chunked = weakref.ref(context), llm.metadata.get("general.architecture") == "llama4"

    def guarded(seq_id: int, p0: int, p1: int) -> bool:
        # the first position that a token at p0 looks at
        first = p0 // window * window if chunked else max(p0 - window + 1, 0)
        if p0 > 0 and lowest(memory, max(seq_id, 0)) > first:
            return False
        return bool(remove(held(), seq_id, p0, p1))

    context.kv_cache_seq_rm = guarded


def report_eval(llm: Llama, progress: Progress) -> None:
    """Let llm.eval, which all of Llama's methods use, report prompts; single tokens of an answer are not reported."""
    feed, held = type(llm).eval, weakref.ref(llm)

    def evaluate(tokens: Sequence[int]) -> None:
        llm = held()
        assert llm is not None  # it is being called
        total = len(tokens)
        for start in range(0, total, llm.n_batch):
            feed(llm, tokens[start : start + llm.n_batch])
            if total > 1:
                progress(min(start + llm.n_batch, total), total)

    llm.eval = evaluate
