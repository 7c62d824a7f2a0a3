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


def perplexity(losses: NDArray[np.float32], start: int = 0, end: int | None = None) -> float:
    """exp of the mean loss of positions start..end."""
    return math.exp(float(losses[start:end].mean(dtype="float64")))


def buckets(losses: NDArray[np.float32], width: int) -> tuple[list[int], list[float]]:
    """(middle positions, perplexities) of consecutive buckets of `width` positions; a last half bucket counts."""
    starts = [s for s in range(0, len(losses), width) if len(losses) - s >= width // 2]
    ends = [min(s + width, len(losses)) for s in starts]
    middles = [(s + e) // 2 for s, e in zip(starts, ends, strict=True)]
    return middles, [perplexity(losses, s, e) for s, e in zip(starts, ends, strict=True)]
