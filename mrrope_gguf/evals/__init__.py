"""Measurements on a plain llama_cpp.Llama: perplexity by position, needles in a haystack, RULER, retrieval.

`perplexity`, `needle` and `ruler` are one call each; `mrrope eval` compares ways to run a model, and resumes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Answers, Asked, Perplexity, needle, perplexity, ruler

__all__ = ["Answers", "Asked", "Perplexity", "needle", "perplexity", "ruler"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command that measures nothing need not load what measures."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
