"""What the report makes of answers: losses compared as scores are, RULER's means over its tasks, effective lengths."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.evals.bootstrap import paired
from mrrope_gguf.evals.report import report
from mrrope_gguf.evals.report_pages import numbers
from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.report_stats import Summary, summarize
from mrrope_gguf.evals.report_words import blocks, effective
from mrrope_gguf.evals.ruler_tasks import CORE, OFFLINE
from tests.eval_results import answer, head, write

SCORES = {"none": 0.9, "truncate": 0.2, "yarn": 0.6}


def of(folder: Path, *lines: dict[str, Any]) -> Summary:
    return summarize(read(write(folder, [head(), *lines])))


def ruler(names: tuple[str, ...], n: int = 4, **without: str) -> list[dict[str, Any]]:
    """Task k of n scores SCORES at every length, and k hundredths less; `without`: the tasks a way lacks at 2048."""
    return [
        answer(f"ruler/{name}", way, length, str(i), score - 0.01 * k, loss=None)
        for k, name in enumerate(names)
        for way, score in SCORES.items()
        for length in (512, 2048)
        for i in range(n)
        if not (length == 2048 and without.get(way) == name)
    ]


def test_losses_of_answers_are_compared(tmp_path: Path) -> None:
    """Where nobody finds a needle the loss of the right answer still tells ways apart."""
    lines = [
        answer("needle", way, 2048, str(i), 0.0, loss=loss + 0.01 * i)
        for way, loss in (("none", 2.0), ("yarn", 1.0), ("mrrope-uni", 1.0))
        for i in range(8)
    ]
    summary = of(tmp_path, *lines)
    (losses,) = summary.tasks[0].losses.columns if summary.tasks[0].losses else ()
    assert losses.best == ("yarn", "mrrope-uni")
    assert [(v.way, v.real) for v in losses.rivals] == [("none", True)]
    assert losses.rivals[0].interval == pytest.approx((1.0, 1.0, 1.0))
    words = "\n".join(map(str, blocks(summary, [])))
    assert (
        "Loss of the right answer at 2K: yarn, mrrope-uni are equal and have the lowest (1.035); "
        "really worse: none (+1, +1 to +1)."
    ) in words
    rows = [row for row in csv.DictReader(io.StringIO(numbers(summary))) if "nats" in row["metric"]]
    assert [(row["measure"], row["way"], row["metric"], row["text"]) for row in rows[:1]] == [
        ("needle", "none", "loss, nats", "")
    ]
    assert float(rows[0]["value"]) == pytest.approx(2.035)
    assert {row["metric"] for row in rows} == {"loss, nats", "difference, nats"}


def test_rulers_mean_weighs_tasks_alike(tmp_path: Path) -> None:
    """The six tasks that need no text apart from all eleven; more samples of one task count no more."""
    more = [answer(f"ruler/{OFFLINE[0]}", "none", 512, str(i), 0.9, loss=None) for i in range(4, 40)]
    core, offline = of(tmp_path, *ruler(OFFLINE), *more).ruler
    assert (core.name, offline.name) == ("RULER core (6 tasks)", "RULER-11 (offline)")
    wanted = {
        "RULER core (6 tasks)": sum(OFFLINE.index(name) for name in CORE) / 600,
        "RULER-11 (offline)": sum(range(11)) / 1100,
    }
    for task in (core, offline):
        short, long = task.table.columns
        assert (short.end, long.end) == (512, 2048)
        assert long.values["yarn"].mean == pytest.approx(0.6 - wanted[task.name])
        assert task.base == pytest.approx(0.9 - wanted[task.name])
        assert long.best == ("none",)
        assert all(v.real for v in long.rivals)
        assert {e.way: e.length for e in task.effective} == {"none": 2048, "truncate": None, "yarn": None}


def test_a_way_that_lacks_a_task_has_no_mean(tmp_path: Path) -> None:
    (core,) = of(tmp_path, *ruler(CORE, yarn="vt")).ruler
    assert not core.table.columns[1].values["yarn"].whole
    assert core.table.columns[1].best == ("none",)
    assert not of(tmp_path / "five", *ruler(CORE[:-1])).ruler
    words = "\n".join(map(str, blocks(of(tmp_path / "all", *ruler(CORE)), [])))
    assert "RULER core (6 tasks) is gated in: the unextended model scores 0.88 in its window." in words
    assert "RULER-11" not in words


def test_tasks_are_not_drawn_as_texts_are() -> None:
    """A benchmark has the tasks it has: what differs between them is no doubt about their mean."""
    ours, theirs = [[float(k)] * 3 for k in range(6)], [[0.0] * 3] * 6
    assert paired(ours, theirs, fixed=True) == (2.5, 2.5, 2.5)
    assert paired(ours, theirs).low < 2


def test_a_length_that_is_not_finished_is_no_effective_length(tmp_path: Path) -> None:
    lines = [answer("t", way, n, str(i), 1.0) for way in ("none", "yarn") for n in (512, 2048) for i in range(4)]
    (task,) = of(tmp_path, *lines, answer("t", "none", 4096, "0", 0.0), answer("t", "none", 4096, "1", 0.0),
                 answer("t", "yarn", 4096, "0", 1.0)).tasks  # fmt: skip
    found = {e.way: effective(e, task) for e in task.effective}
    assert found == {"none": "2K", "yarn": "2K"}


def test_the_report_has_them_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = report(write(tmp_path, [head(), *ruler(CORE)]))
    found = json.loads(json.dumps(made.to_json()))
    assert [task["name"] for task in found["ruler"]] == ["RULER core (6 tasks)"]
    assert len(found["tasks"]) == 6
    (words,) = found["against_truncate"]
    assert words.startswith("yarn: not compared with truncate at perplexity")
    assert {path.name for path in made.files} >= {"ruler-0.png", "ruler-0.svg"}
    assert "![RULER core" in (tmp_path / "report.md").read_text()
