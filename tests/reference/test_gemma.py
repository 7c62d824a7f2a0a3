"""Gemma 3 270M, a real model with sliding-window and global layers, extended from 32768 to 131072 tokens.

What it does past 32768 is measured by benchmarks/gemma_128k.py: hours, where this takes half a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.engine import ActiveTable, get_table
from mrrope_gguf.evals.needles import Answer, ask, haystack
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load
from tests import patched as process

pytestmark = [pytest.mark.engine, pytest.mark.real, pytest.mark.slow]


def loaded_and_asked(path: Path) -> tuple[int, ActiveTable | None, list[Answer]]:
    """In another process: the context the file opens with, its table, and two needles in 1536 tokens."""
    llm: Any = load(path)
    return llm.n_ctx(), get_table(llm), ask(llm, haystack(llm, 1536, keys=("amber", "basil")))


def test_extended_gemma_loads_and_answers(gemma: Path, patched: Path, tmp_path: Path) -> None:
    extended = extend(gemma, tmp_path / "gemma-128k.gguf", scale=4, elastic=False)
    n_ctx, table, answers = process.run(loaded_and_asked, extended.path, lib=patched)
    assert n_ctx == 131072
    assert table
    assert (table.method, table.scale, len(table.factors)) == ("mrrope-pro", 4.0, 128)
    assert table.factors == pytest.approx([float(f) for f in extended.table.factors], rel=1e-5)
    # so small a model says one number and mixes the other up; guessing digits costs ln 10 = 2.3 nats a token
    assert any(answer.exact for answer in answers), answers
    assert max(answer.loss for answer in answers) < 1.2, answers
