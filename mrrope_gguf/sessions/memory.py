"""What a llama_cpp.Llama holds in its memory, and how it gets there: read, wound back, saved, restored.

`llm.input_ids[:llm.n_tokens]` stays true throughout, so the Llama can be used by itself before and after.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import engine
from ..errors import EngineTrouble, FileTrouble, Refused
from ..model import prefill
from ..text import printable
from .store import shared

if TYPE_CHECKING:
    from llama_cpp import Llama


class Memory:
    """Sequence 0 of a model. Raises Refused for a model without a memory, such as an encoder."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._api = engine.llama_cpp().llama_cpp
        self._memory = llm._ctx.memory
        if self._memory is None or self._api.llama_model_has_encoder(llm._model.model):
            raise Refused(
                "this model cannot chat", why="it is an encoder: it keeps nothing of a text", fix="take another"
            )

    @property
    def tokens(self) -> array[int]:
        return array("i", self._llm.input_ids[: self._llm.n_tokens].astype("i4").tobytes())

    @property
    def n(self) -> int:
        return int(self._llm.n_tokens)

    @property
    def whole(self) -> bool:
        """Whether every token that was read is still there; sliding windows and recurrent states forget."""
        return self.n == 0 or int(self._api.llama_memory_seq_pos_min(self._memory, 0)) == 0

    @property
    def scale(self) -> float:
        """S in effect, 1 for a model as it was."""
        if engine.has_elastic():
            return engine.get_elastic(self._llm).scale
        arch = self._llm.metadata.get("general.architecture")
        return float(self._llm.metadata.get(f"{arch}.rope.scaling.mrrope.scale", 1.0))

    def shares(self, tokens: Sequence[int]) -> int:
        """How many tokens it holds of those that `tokens` begins with."""
        return shared(self.tokens, array("i", tokens))

    def keep(self, n: int) -> int:
        """Forget what comes after the first `n` tokens. Returns what is left: 0 where the memory cannot go back."""
        if n == self.n:
            return n
        context = self._llm._ctx
        # load's guard knows how far a sliding window goes back
        may = 0 < n < self.n and (self.whole or "kv_cache_seq_rm" in vars(context))
        self._llm.n_tokens = n  # first: Ctrl-C between the two leaves too much in memory, which eval removes
        if not may or not context.kv_cache_seq_rm(0, n, -1):
            self.clear()
            return 0
        return n

    def clear(self) -> None:
        self._llm.reset()
        self._api.llama_memory_clear(self._memory, False)

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens after those that are held. Raises as model.prefill does."""
        prefill(self._llm, list(tokens))

    def state_size(self) -> int:
        """Bytes of a saved state, to within a few."""
        return int(self._api.llama_state_seq_get_size(self._llm._ctx.ctx, 0)) + 4 * self.n

    def save(self, path: str) -> None:
        """Write llama.cpp's sequence file, layer by layer. Raises FileTrouble."""
        held = self.tokens
        tokens = (self._api.llama_token * len(held))(*held)
        with engine.capture() as log:
            done = self._api.llama_state_seq_save_file(self._llm._ctx.ctx, os.fsencode(path), 0, tokens, len(held))
        # the last bytes are written when llama.cpp closes the file, and then nobody asks how that went
        if not done or done != os.path.getsize(path):
            raise FileTrouble(
                "the state was not saved",
                why=printable(log.why()) if not done else f"of {done} bytes {os.path.getsize(path)} were written",
                fix="free some space, or let MRROPE_DATA name a folder on another disk",
            )

    def restore(self, path: str, n: int) -> None:
        """Read llama.cpp's sequence file of n tokens, which must have been checked. EngineTrouble leaves it empty."""
        import ctypes

        self.clear()
        tokens, found = (self._api.llama_token * n)(), ctypes.c_size_t()
        with engine.capture() as log:
            done = self._api.llama_state_seq_load_file(
                self._llm._ctx.ctx, os.fsencode(path), 0, tokens, n, ctypes.byref(found)
            )
        if not done or found.value != n:
            self.clear()
            raise EngineTrouble("the state was not restored", why=printable(log.why()), fix="it is read again")
        self._llm.input_ids[:n] = tokens[:n]
        self._llm.n_tokens = n
