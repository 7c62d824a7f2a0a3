"""`mrrope report` on results with known numbers: means, winners, intervals, gates, and files that are cut or empty."""

from __future__ import annotations

import json
from math import exp, expm1
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.errors import BadFile, FileTrouble, MrropeError
from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.report_stats import Column, Summary, Table, bucket_width, summarize
from mrrope_gguf.evals.report_versus import difference
from mrrope_gguf.evals.report_words import blocks, effective, gate, verdict
from tests.eval_results import LOSS, N_CTX, WAYS, answer, head, losses, ppl, whole, write


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarize(read(write(tmp_path_factory.mktemp("report"), whole())))


def column(table: Table, label: str) -> Column:
    return next(c for c in table.columns if c.label == label)


def said(summary: Summary) -> str:
    return "\n".join(str(block) for block in blocks(summary, []))


def of(tmp_path: Path, *lines: dict[str, Any], bucket: int | None = None) -> Summary:
    return summarize(read(write(tmp_path, lines)), bucket)


def test_means_by_bucket_and_over_texts(summary: Summary) -> None:
    assert summary.bucket == 1024
    everything, *texts = summary.ppl
    assert [t.text for t in summary.ppl] == [None, "one", "two", "three"]
    labels = ["0-1K", "1K-2K", "2K-3K", "3K-4K", "in the window", "past the window"]
    assert [c.label for c in everything.columns] == labels
    for way in WAYS:
        rows = [np.array(losses(i, way)) for i in range(3)]
        for table, row in zip(texts, rows, strict=True):
            assert column(table, "2K-3K").values[way].mean == pytest.approx(row[8:12].mean(), abs=1e-12)
        past = column(everything, "past the window").values[way]
        assert past.mean == pytest.approx(np.mean([row[4:].mean() for row in rows]), abs=1e-12)
        assert (past.n, past.whole) == (36, True)


def test_the_interval_holds_the_difference_that_was_put_in(summary: Summary) -> None:
    past = summary.past
    assert past is not None
    assert past.best == ("yarn",)
    found = {v.way: v for v in past.rivals}
    for way in ("none", "truncate", "elastic"):
        interval = found[way].interval
        assert interval is not None
        assert found[way].real
        assert interval.mean == pytest.approx(LOSS[way][1] - LOSS["yarn"][1], abs=1e-9)
        assert interval.low < interval.mean < interval.high < interval.low + 0.02
    assert not found["mrrope-uni"].real  # 0.001 apart, with noise of 0.004 a block
    assert {v.way for v in past.truncate if v.real and v.interval and v.interval.high < 0} == {"yarn", "mrrope-uni"}


def test_words_name_the_best_and_do_not_separate_what_is_alike(summary: Summary) -> None:
    past = summary.past
    assert past is not None
    words = verdict("ppl", past)
    assert words.startswith(
        f"past the window: yarn has the lowest ({exp(past.values['yarn'].mean):.4g}); really worse:"
    )
    worse, alike = words.split("not told apart from it: ")
    assert alike.startswith("mrrope-uni (")
    assert f"truncate (+{100 * expm1(0.08):.3g} %" in worse
    assert f"none (+{100 * expm1(2.98):,.0f} %, +1,8" in worse
    assert f"'two: {verdict('ppl', column(summary.ppl[2], 'past the window'))}'" in said(summary)
    inside = verdict("ppl", column(summary.ppl[0], "in the window"))
    assert "none, truncate, elastic are equal and have the lowest" in inside
    assert "really worse: yarn (+2.02 %" in inside


@pytest.mark.parametrize("winner", WAYS)
def test_whoever_is_best_wins(tmp_path: Path, winner: str) -> None:
    """The words follow the numbers, also where a model as it is comes first."""
    lines = [ppl("t", way, np.array(losses(0, "none")) - 0.5 * (way == winner)) for way in WAYS]
    column = of(tmp_path, head(), *lines).ppl[0].columns[-1]
    assert column.best == (winner,)
    assert all(v.real and v.interval and v.interval.low == pytest.approx(0.5) for v in column.rivals)
    assert f"past the window: {winner} has the lowest" in verdict("ppl", column)


def test_truncate_is_a_row_of_every_perplexity_table(summary: Summary) -> None:
    assert all("truncate" in c.values for t in summary.ppl for c in t.columns)


def test_kl_is_of_the_window(summary: Summary) -> None:
    (table,) = summary.kl
    assert [c.label for c in table.columns] == ["all texts", "one", "two", "three"]
    assert table.columns[0].values["yarn"].mean == pytest.approx(0.02**2 + 0.0015)
    assert table.columns[0].values["yarn"].n == 12
    assert "yarn (+0.0004" in verdict("kl", table.columns[0])


def test_scores_gate_and_effective_length(summary: Summary) -> None:
    needle, vt = summary.tasks
    assert (needle.base, needle.gated) == (1.0, True)
    assert {e.way: e.length for e in needle.effective} == {
        "none": 1024, "truncate": 1024, "yarn": 2048, "mrrope-uni": 4096, "elastic": 4096,
    }  # fmt: skip
    longest = column(needle.table, "4K")
    assert longest.best == ("mrrope-uni", "elastic")
    assert longest.values["yarn"].mean == pytest.approx(0.4)
    assert {v.way for v in longest.rivals if v.real} == {"none", "truncate", "yarn"}
    assert vt.base == pytest.approx(0.1)
    assert not vt.gated
    assert "ruler/vt is not gated in: the unextended model scores 0.10 in its window, under 0.5" in said(summary)
    assert effective(vt.effective[0], vt) == "4K, not gated in"


def test_a_task_that_was_not_tried_in_the_window_is_not_gated_in(tmp_path: Path) -> None:
    lines = [answer("kv", way, 4096, "0", 1.0) for way in ("none", "yarn")]
    (task,) = of(tmp_path, head(), *lines).tasks
    assert task.base is None
    assert "was not measured in its window" in gate(task)
    assert effective(task.effective[0], task) == "unknown: no base score"


def test_85_per_cent_of_the_base_is_enough_and_a_dip_is_said(tmp_path: Path) -> None:
    scores = {512: 1.0, 1024: 1.0, 2048: 0.84, 4096: 0.85}
    lines = [answer("t", "yarn", n, "0", score) for n, score in scores.items()]
    (task,) = of(tmp_path, head(), answer("t", "none", 512, "0", 1.0), *lines).tasks
    found = {e.way: e for e in task.effective}
    assert (found["yarn"].length, found["yarn"].dips) == (4096, (2048,))
    assert effective(found["yarn"], task) == "4K (but not at 2K)"


def test_few_samples_are_not_called_different(tmp_path: Path) -> None:
    """Five of five against none of five is no sign yet; six of six is."""
    for n, real in ((5, False), (6, True)):
        lines = [answer("t", way, 2048, str(i), float(way == "yarn")) for way in ("none", "yarn") for i in range(n)]
        (its,) = of(tmp_path / str(n), head(), *lines).tasks[0].table.columns
        assert [v.real for v in its.rivals] == [real]
        assert ("too few pairs to tell (under 6): none" in verdict("score", its)) is not real


def test_three_of_six_is_no_real_difference_though_the_bootstrap_says_so(tmp_path: Path) -> None:
    lines = [answer("t", w, 2048, str(i), float(w == "yarn" and i < 3)) for w in ("none", "yarn") for i in range(6)]
    (its,) = of(tmp_path, head(), *lines).tasks[0].table.columns
    assert its.rivals[0].interval is not None
    assert its.rivals[0].interval.high < 0
    assert "not told apart from it: none" in verdict("score", its)


def test_what_a_way_has_not_finished_is_shown_and_not_compared(tmp_path: Path) -> None:
    lines = [ppl("t", "none", [2.0] * 16), ppl("t", "yarn", [1.0] * 14)]
    last = column(of(tmp_path, head(), *lines).ppl[0], "3K-4K")
    assert not last.values["yarn"].whole
    assert last.best == ("none",)
    assert verdict("ppl", last) == "3K-4K: only none was measured wholly, nothing to compare."


def test_mode_b_takes_each_length_from_its_own_pass(tmp_path: Path) -> None:
    table = of(tmp_path, head(), ppl("t", "yarn@B", [3.0] * 16), ppl("t", "yarn@B", [1.0] * 4)).ppl[0]
    assert [c.values["yarn@B"].mean for c in table.columns[:4]] == [1.0, 3.0, 3.0, 3.0]


def test_modes_and_order_of_the_ways(tmp_path: Path) -> None:
    names = ("elastic:yarn", "new", "yarn@B", "none", "yarn")
    results = read(write(tmp_path, [head(), *(ppl("t", name, [1.0] * 4) for name in names)]))
    assert results.ways == ["none", "yarn", "yarn@B", "elastic:yarn", "new"]  # in every report alike
    assert [results.mode(way) for way in results.ways] == ["", "A", "B", "C", "A"]


def test_a_last_block_counts_from_half_its_size_on(tmp_path: Path) -> None:
    for rest, n in ((127, 4), (128, 5)):
        line = {**ppl("t", "none", [1.0] * 5), "end": 1024 + rest}
        assert len(read(write(tmp_path, [head(), line])).ppl["t"]["none"]) == n


def test_what_joined_the_head_later_belongs_to_it(tmp_path: Path) -> None:
    late = {"run": "#head/0123456789ab", "ways": {"late": {"kind": "elastic"}}, "texts": {"u": "cd" * 32}}
    broken = {"run": "#head/broken", "ways": 3}
    lines = [head(), late, broken, ppl("t", "none", [1.0] * 4), ppl("t", "late", [1.0] * 4)]
    results = read(write(tmp_path, lines))
    assert results.skipped == 0
    assert results.mode("late") == "C"
    assert results.ways == ["none", "late"]


def test_a_cut_line_and_lines_that_are_no_results_cost_themselves(tmp_path: Path) -> None:
    good = answer("needle", "none", 512, "0", 1.0)
    bad: list[dict[str, Any]] = [
        {**good, "run": "a", "score": 2}, {**good, "run": "b", "length": "x"},
        {**good, "run": "c", "score": float("nan")}, {**ppl("t", "none", [1.0]), "end": 9999},
        {**ppl("u", "none", [1.0]), "blocks": None}, {"run": "d"},
        {**good, "run": "e", "score": 10**400},
    ]  # fmt: skip
    directory = write(tmp_path, [head(), good, {**good, "score": 0.0}, *bad], '{"run": "needle/none/512/1", "sco')
    with open(directory / "results.jsonl", "ab") as file:
        file.write(b"\n\xff\xfe\n\0\0\0\n" + b"[" * 100000)
    results = read(directory)
    assert [a.score for a in results.answers["needle"]] == [1.0]  # the first result of a name holds
    assert results.skipped == len(bad) + 3
    assert not results.ppl


def test_unknown_tasks_are_shown_with_their_scores_or_counted(tmp_path: Path) -> None:
    mystery = {"run": "speed/none/1", "task": "speed", "way": "none", "seconds": 3}
    summary = of(tmp_path, head(), answer("new/task", "none", 512, "0", 0.75), mystery)
    assert summary.tasks[0].table.columns[0].values["none"].mean == 0.75
    assert "Results of speed that have no score and are not shown: 1." in said(summary)
    assert "Task new/task" in said(summary)


def test_without_a_head_the_window_is_not_guessed(tmp_path: Path) -> None:
    summary = of(tmp_path, ppl("t", "none", [1.0] * 8), answer("t", "none", 512, "0", 1.0))
    assert summary.results.n_ctx_orig is None
    assert summary.past is None
    assert summary.tasks[0].base is None
    assert "does not say the model's original context" in said(summary)


@pytest.mark.parametrize("content", [None, "", "\n\n", '{"run": "#head"}\n', '{"run": "ppl/a', "[1]\n"])
def test_nothing_to_report_is_one_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(FileTrouble if content is None else BadFile, match="no results to report") as caught:
        read(tmp_path)
    assert "mrrope eval" in caught.value.fix


def test_buckets() -> None:
    assert [bucket_width(n, None) for n in (2**17, 24576, 8192, 900)] == [4096, 4096, 2048, 256]
    assert [bucket_width(4096, n) for n in (256, 1024, 8192)] == [256, 1024, 1024]


def test_a_bucket_of_ones_own(tmp_path: Path) -> None:
    lines = [head(), ppl("t", "none", range(16))]
    columns = of(tmp_path, *lines, bucket=512).ppl[0].columns
    assert [(c.label, c.values["none"].mean) for c in columns[:2]] == [("0-512", 0.5), ("512-1K", 2.5)]
    with pytest.raises(MrropeError, match="a bucket of 100 positions"):
        of(tmp_path, *lines, bucket=100)


def test_a_loss_past_all_numbers_is_no_overflow(tmp_path: Path) -> None:
    summary = of(tmp_path, head(), ppl("t", "none", [1e6] * 16), ppl("t", "yarn", [1.0] * 16))
    assert "over 1e300" in said(summary)
    assert difference("ppl", summary.ppl[0].columns[-1].rivals[0]).startswith("+over 1e6 %")


def test_results_as_runlog_writes_them(tmp_path: Path) -> None:
    from mrrope_gguf.evals.runlog import RunLog

    log = RunLog(tmp_path / "results.jsonl")
    for line in [head(), *(ppl("t", way, losses(0, way)) for way in WAYS)]:
        log.add(str(line.pop("run")), line)
    summary = summarize(read(tmp_path))
    assert summary.results.n_ctx_orig == N_CTX
    assert json.loads(log.path.read_text().splitlines()[0])["run"] == "#head"
    assert len(summary.results.ways) == 5
