"""Perplexity by position, from one pass over the text.

With a static table and causal attention the loss at a position does not depend on what follows, so one pass at the
longest length gives the perplexity at every shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..kernels import nll
from ..progress import Progress
from .decode import Decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def token_nll(llm: Any, tokens: Sequence[int], progress: Progress | None = None) -> NDArray[np.float32]:
    """Negative log likelihood of every token but the first, in nats, float32 (len(tokens) - 1,).

    Value i is the loss of predicting tokens[i + 1] at position i. Logits are reduced chunk by chunk.
    Raises ValueError for fewer than two tokens, EngineTrouble if they do not fit in the context.
    """
    import numpy as np

    if len(tokens) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(tokens)}")
    targets = np.asarray(tokens[1:], dtype=np.int64)
    losses = np.empty(len(targets), dtype=np.float32)
    at = 0
    with Decoder(llm) as decoder:
        for logits in decoder.logits(tokens[:-1], progress=progress):
            losses[at : at + len(logits)] = nll(logits, targets[at : at + len(logits)])
            at += len(logits)
    return losses


def half_chunks(llm: Any, tokens: Sequence[int], n_ctx: int, progress: Progress | None = None) -> NDArray[np.float32]:
    """llama-perplexity's losses, in nats, float32 (chunks * (n_ctx - 1 - n_ctx // 2),).

    The text is cut into pieces of `n_ctx` tokens; what is over at its end is left out. Each is read anew, BOS in the
    place of its first token where the model adds one, and the losses of its second half count.
    Raises ValueError for a text shorter than one piece.
    """
    import numpy as np

    n, first = len(tokens) // n_ctx, n_ctx // 2
    if not n:
        raise ValueError(f"a piece has {n_ctx} tokens, the text {len(tokens)}")
    starts_with_bos = tokens[0] == llm.token_bos()
    found: list[NDArray[np.float32]] = []
    with Decoder(llm) as decoder:
        for start in range(0, n * n_ctx, n_ctx):
            piece = list(tokens[start : start + n_ctx])
            shown = [tokens[0], *piece[1:]] if starts_with_bos else piece
            decoder.clear()
            for _ in decoder.logits(shown[:first], every=False):
                pass
            targets = np.asarray(piece[first + 1 :], dtype=np.int64)
            at = 0
            for logits in decoder.logits(shown[first:-1]):
                found.append(nll(logits, targets[at : at + len(logits)]))
                at += len(logits)
            if progress:
                progress(start + n_ctx, n * n_ctx)
    return np.concatenate(found)


def perplexity(losses: NDArray[np.float32], start: int = 0, end: int | None = None) -> float:
    """exp of the mean loss of positions start..end."""
    return math.exp(float(losses[start:end].mean(dtype="float64")))


def buckets(losses: NDArray[np.float32], width: int) -> tuple[list[int], list[float]]:
    """(middle positions, perplexities) of consecutive buckets of `width` positions; a last half bucket counts."""
    starts = [s for s in range(0, len(losses), width) if len(losses) - s >= width // 2]
    ends = [min(s + width, len(losses)) for s in starts]
    middles = [(s + e) // 2 for s, e in zip(starts, ends, strict=True)]
    return middles, [perplexity(losses, s, e) for s, e in zip(starts, ends, strict=True)]
