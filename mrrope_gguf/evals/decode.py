"""Tokens in, logits out, a chunk at a time, so that memory never grows with the length of the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import EngineTrouble
from ..progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 512  # tokens decoded at once; logits held: CHUNK * n_vocab float32


class Decoder:
    """Decodes one sequence of a llama_cpp.Llama through llama.cpp's own API. Empties the model's cache first.

    `n_past` is the number of tokens in the cache; the next ones go to positions n_past, n_past + 1, ...
    `chunk` tokens at most are decoded at once, in one batch that llama.cpp does not split further.
    """

    def __init__(self, llm: Any) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.ctx = llm._ctx.ctx
        self._memory = llama_cpp.llama_get_memory(self.ctx)
        self._n_vocab = llm.n_vocab()
        self.chunk = min(CHUNK, llm.n_batch, llama_cpp.llama_n_ubatch(self.ctx))
        self._batch = llama_cpp.llama_batch_init(self.chunk, 0, 1)
        self.n_ctx: int = llm.n_ctx()
        self.n_past = 0
        llm.reset()
        llama_cpp.llama_memory_clear(self._memory, False)

    def logits(
        self, tokens: Sequence[int], *, every: bool = True, progress: Progress | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """Decode `tokens` and yield each chunk's logits, float32 (n, n_vocab), valid until the next chunk.

        every: logits of all tokens; else of the last one alone, (1, n_vocab), and of no chunk but the last.
        Raises EngineTrouble if the context is too small, or llama_decode fails.
        """
        import numpy as np

        self._check_room(len(tokens))
        for start in range(0, len(tokens), self.chunk):
            chunk = tokens[start : start + self.chunk]
            last = start + len(chunk) == len(tokens)
            self._decode(chunk, every, last)
            if progress:
                progress(start + len(chunk), len(tokens))
            rows = len(chunk) if every else int(last)
            if rows:
                pointer = self.api.llama_get_logits(self.ctx)
                yield np.ctypeslib.as_array(pointer, shape=(rows, self._n_vocab))

    def rewind(self, n_past: int) -> None:
        """Forget every token from position `n_past` on."""
        if not self.api.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            raise EngineTrouble("this model's memory cannot be rewound", why="it holds a recurrent state, not keys")
        self.n_past = n_past

    def whole(self) -> bool:
        """Whether the memory still holds every token it was given: a sliding-window cache drops those behind it."""
        return self.n_past == 0 or int(self.api.llama_memory_seq_pos_min(self._memory, 0)) == 0

    def try_rewind(self, n_past: int) -> bool:
        """`rewind`, or False and nothing done where what went before `n_past` is no longer there to go on from."""
        if n_past == self.n_past:
            return True
        if not self.whole() or not self.api.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            return False
        self.n_past = n_past
        return True

    def clear(self) -> None:
        """Forget everything, of any memory: the next token has the bits of a first one."""
        self.api.llama_memory_clear(self._memory, False)
        self.n_past = 0

    def close(self) -> None:
        self.api.llama_batch_free(self._batch)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_room(self, n: int) -> None:
        if self.n_past + n > self.n_ctx:
            raise EngineTrouble(
                f"{self.n_past + n} tokens do not fit in the context",
                why=f"it was made for {self.n_ctx}",
                fix="load the model with a larger n_ctx, or give a shorter text",
            )

    def _decode(self, chunk: Sequence[int], every: bool, last: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk):
            batch.token[i] = token
            batch.pos[i] = self.n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or (last and i == len(chunk) - 1)
        status = self.api.llama_decode(self.ctx, batch)
        if status:
            raise EngineTrouble(f"llama_decode failed at token {self.n_past}", why=f"it returned {status}")
        self.n_past += len(chunk)
