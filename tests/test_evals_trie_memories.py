"""The trie on elastic contexts, whose keys are rotated again when they are rolled back, and on recurrent memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.evals.trie import Plan, Prompt, plan, run
from tests import tiny
from tests.arch_models import generate
from tests.elastic import PRECISION, grow_file
from tests.engine_worker import Worker

pytestmark = pytest.mark.engine

Rows = dict[int, Any]


def evaluated(path: Path, prompts: list[Prompt], share: bool, **settings: Any) -> tuple[Rows, list[float], list[int]]:
    """Logits after each prompt, S there, and the tokens that were decoded."""
    from mrrope_gguf import engine
    from mrrope_gguf.model import load

    llm = load(path, **{"flash_attn": False, "n_threads": 1, "n_threads_batch": 1, **settings})
    rows: Rows = {}
    scales: Rows = {}
    said: list[int] = [0]

    def keep(i: int, row: Any) -> None:
        rows[i], scales[i] = row.copy(), engine.get_elastic(llm).scale if engine.has_elastic() else 1.0

    run(llm, prompts, on_logits=keep, share=share, progress=lambda done, total: said.append(done))
    llm.close()
    return rows, [scales[i] for i in range(len(prompts))], said[-1:]


def worst(found: Rows, wanted: Rows) -> float:
    """The largest difference relative to the largest logit."""
    return max(float(np.abs(found[i] - wanted[i]).max() / np.abs(wanted[i]).max()) for i in wanted)


def grid() -> list[Prompt]:
    """Prompts of 80 to 2000 tokens of a window of 512 made four times as long; they part at many places."""
    trunk = tiny.tokens(2000)
    return [
        Prompt((*trunk[: n * part // 4], *tiny.tokens(20, n + part), *trunk[n * part // 4 : n]))
        for n in (80, 500, 700, 1000, 1900) for part in range(5)
    ]  # fmt: skip


@pytest.mark.parametrize("cache", ["f32", "f16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_elastic_within_the_rounding_of_the_cache(engine: Worker, tmp_path: Path, name: str, cache: str) -> None:
    path = grow_file(tmp_path, name, n_layer=2, n_ctx=512).path
    prompts = grid()
    settings = {"type_k": cache, "type_v": cache}
    wanted, scales, naive = engine.call(evaluated, path, prompts, False, **settings)
    found, again, trie = engine.call(evaluated, path, prompts, True, **settings)
    assert again == scales
    assert len(set(scales)) > 3
    assert naive == [plan(prompts).naive]
    assert trie == [plan(prompts).trie]
    assert worst(found, wanted) < 20 * PRECISION[cache]


def test_a_static_table_keeps_the_bits(engine: Worker, tmp_path: Path) -> None:
    path = grow_file(tmp_path, "llama", n_layer=2, n_ctx=512).path
    wanted, scales, _ = engine.call(evaluated, path, grid(), False, elastic=False)
    found, _, trie = engine.call(evaluated, path, grid(), True, elastic=False)
    assert {i: row.tobytes() for i, row in found.items()} == {i: row.tobytes() for i, row in wanted.items()}
    assert trie == [plan(grid()).trie]
    assert set(scales) == {4.0}


@pytest.mark.parametrize("arch", ["mamba", "jamba"])
def test_a_memory_that_cannot_be_rolled_back(engine: Worker, patched: Path, tmp_path: Path, arch: str) -> None:
    """Evaluated one by one: the same bits, no token saved, and a text after an answer reads its prompt again."""
    (path, *_) = generate(patched, arch, tmp_path / arch)
    rng = np.random.default_rng(0)
    trunk, ends = rng.integers(3, 128, 150).tolist(), rng.integers(3, 128, (4, 30)).tolist()
    prompts = [Prompt((*trunk, *end)) for end in ends] + [Prompt(tuple(trunk), tuple(ends[0][:3]), 2)]
    wanted, _, naive = engine.call(evaluated, path, prompts, False, n_ctx=256)
    found, _, trie = engine.call(evaluated, path, prompts, True, n_ctx=256)
    assert plan(prompts) == Plan(trie=150 + 4 * (30 + 150 - 64), naive=4 * 180 + 150, continuation=3)
    assert trie == naive
    assert 4 * 180 + 150 + 150 + 2 <= trie[0] <= 4 * 180 + 150 + 150 + 3
    assert {i: row.tobytes() for i, row in found.items()} == {i: row.tobytes() for i, row in wanted.items()}
