"""The C++ core called from many threads at once, as a server would: each answer is the one a single thread gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf import _native, kernels
from mrrope_gguf.bound import bound
from mrrope_gguf.errors import BadFile
from mrrope_gguf.gguf.index import index_bytes
from mrrope_gguf.tables import rope_table
from tests.bad_gguf import CASES, ODD

TABLE = rope_table("mrrope-uni", n_rot=64, freq_base=1e4, n_ctx_orig=2048, scale=4)
LOGITS = np.random.default_rng(1).normal(size=(64, 20_000)).astype(np.float32)  # 5 MB: several threads of its own
TARGETS = np.arange(64) % LOGITS.shape[1]
QUERIES = np.random.default_rng(2).normal(size=(512, 32, 64)).astype(np.float32)
POSITIONS = np.arange(512)


def scanned() -> list[int]:
    found = []
    for data in (*ODD.values(), *(case.data for case in CASES.values())):
        try:
            found.append(len(index_bytes(data, "x.gguf").kvs))
        except BadFile as error:
            found.append(-error.offset)
    return found


CALLS: dict[str, Callable[[], Any]] = {
    "nll": lambda: kernels.nll(LOGITS, TARGETS, n_threads=3).tobytes(),
    "rope": lambda: kernels.rope(QUERIES, POSITIONS, TABLE, n_threads=3).tobytes(),
    "bound": lambda: bound(TABLE),
    "scan": scanned,
}


@pytest.mark.parametrize("name", CALLS)
def test_many_threads_get_the_answer_of_one(name: str) -> None:
    alone = CALLS[name]()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: CALLS[name](), range(8)))
    assert all(answer == alone for answer in answers)


def test_all_of_them_at_once() -> None:
    alone = {name: call() for name, call in CALLS.items()}
    with ThreadPoolExecutor(4) as pool:
        running = [(name, pool.submit(call)) for _ in range(3) for name, call in CALLS.items()]
    assert all(run.result() == alone[name] for name, run in running)


def test_the_core_in_use_is_the_sanitized_one_where_that_was_asked_for() -> None:
    """tests/sanitized.py would prove nothing if the installed core were loaded all the same."""
    assert _native.__spec__ is not None
    folder = Path(_native.__spec__.origin or "").parent.name
    wanted = os.environ.get("MRROPE_SANITIZED")
    assert (folder == wanted) == (wanted is not None), f"the core lies in {folder!r}"
