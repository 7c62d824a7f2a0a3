"""The report's words about tasks: whose essays, what was cut, one question for all ways, and no table twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.report_stats import summarize
from mrrope_gguf.evals.report_words import Grid, Para, blocks
from tests.eval_results import answer, head, write


def content(folder: Path, lines: Iterable[dict[str, Any]], **facts: Any) -> list[Any]:
    return list(blocks(summarize(read(write(folder, [head(**facts), *lines]))), []))


def grids(found: list[Any]) -> dict[str, tuple[tuple[str, ...], ...]]:
    return {block.caption: block.rows for block in found if isinstance(block, Grid)}


def test_tags_that_all_samples_share_are_named(tmp_path: Path) -> None:
    own = [{"essay": "pd", "text": "voyage-out", "id": str(i)} for i in range(3)]
    lines = [answer("ruler/niah_single_2", "none", 512, str(i), 1.0, tags=tags) for i, tags in enumerate(own)]
    cut = [answer("longbench/data", "none", 512, str(i), 1.0, tags={"cut": "12"} if i else {}) for i in range(3)]
    words = [block.text for block in content(tmp_path, [*lines, *cut]) if isinstance(block, Para)]
    assert "Tagged: essay=pd, text=voyage-out." in words
    assert "Tagged: the middle of the context was cut out to fit the length in 2 of 3 answers." in words
    assert sum(text.startswith("Tagged") for text in words) == 2


def test_ways_are_shown_on_the_same_question(tmp_path: Path) -> None:
    """The first that all were asked at the longest length; an answer of no words is one."""
    lines = [
        answer("needle", way, n, sample, 0.0, depth=50, said=f"{way} {n} {sample}" if way != "yarn" else "")
        for way, samples in (("truncate", "10"), ("none", "01"), ("yarn", "01"))
        for n in (512, 2048)
        for sample in samples
    ]
    lines.append(answer("needle", "none", 4096, "0", 0.0))
    rows = grids(content(tmp_path, lines))["needle: one question, and what each way answered"]
    assert rows == (
        ("none", "2K", "50", "7", "none 2048 1"),
        ("truncate", "2K", "50", "7", "truncate 2048 1"),
        ("yarn", "2K", "50", "7", "(nothing)"),
    )


def test_exact_answers_have_a_table_where_the_score_is_another(tmp_path: Path) -> None:
    for score, wanted in ((1.0, False), (0.5, True)):
        found = grids(content(tmp_path / str(score), [answer("vt", "none", 512, "0", score)]))
        assert ("vt: exact answers, share" in found) is wanted
        assert "vt: mean loss of the right answer, nats a token" in found


def test_a_model_is_named_by_what_its_hash_is(tmp_path: Path) -> None:
    """It is taken of parts of a large file: nobody should compare it with sha256sum's."""
    (words, *_) = [b.text for b in content(tmp_path, [answer("vt", "none", 512, "0", 1.0)]) if isinstance(b, Para)]
    assert "content hash abababababababab;" in words
    assert "sha256" not in words


def test_settings_are_words(tmp_path: Path) -> None:
    settings = {"flash_attn": False, "type_k": None, "type_v": "q8_0", "rope": 3}
    found = content(tmp_path, [answer("vt", "none", 512, "0", 1.0)], settings=settings)
    (words, *_) = [b.text for b in found if isinstance(b, Para)]
    assert words.endswith("; flash attention off; K cache f16; V cache q8_0; rope 3.")
