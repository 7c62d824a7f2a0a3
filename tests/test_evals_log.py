"""Runs that outlive an interruption, and how sure their differences are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mrrope_gguf.errors import BadFile
from mrrope_gguf.evals import report_read
from mrrope_gguf.evals.bootstrap import paired
from mrrope_gguf.evals.runlog import RunLog


def test_a_line_cut_off_costs_its_own_run_alone(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    assert log.runs() == {}
    log.add("a", {"loss": 1.0})
    log.add("b", {"loss": 2.0})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-9])
    assert RunLog(log.path).runs() == {"a": {"loss": 1.0}}
    log.add("c", {"loss": 3.0})
    assert log.runs() == {"a": {"loss": 1.0}, "c": {"loss": 3.0}}


def test_the_first_result_of_a_run_holds_and_other_lines_are_left_alone(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    log.path.write_text('3\n{"loss": 1}\n' + json.dumps({"run": "a", "loss": 5}) + "\n")
    log.add("a", {"loss": 6})
    assert log.runs() == {"a": {"loss": 5}}


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """200 pairs of runs that differ by 0.1 and share most of their noise: 95 % of the intervals hold 0.1."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        shared = rng.normal(0, 1, (2, 40))
        ours, theirs = shared + 0.1 + rng.normal(0, 0.1, (2, 40)), shared
        found = paired(list(ours), list(theirs), draws=400, seed=seed)
        assert found.high - found.low < 0.1  # the shared noise, ten times as large, is gone
        held += found.low <= 0.1 <= found.high
    assert 180 <= held <= 198


def test_texts_that_differ_widen_the_interval() -> None:
    """Three texts, each sure of another difference: what holds for all is not sure."""
    ours = [[d] * 50 for d in (-0.1, 0.0, 0.1)]
    theirs = [[0.0] * 50] * 3
    found = paired(ours, theirs)
    assert found.mean == pytest.approx(0)
    assert found.low <= -0.09
    assert found.high >= 0.09
    assert paired(ours[:2], theirs[:2]).low == pytest.approx(-0.05)


UNPAIRED: list[tuple[list[list[float]], list[list[float]]]] = [
    ([], []), ([[1.0]], [[1.0, 2.0]]), ([[1.0]], [[1.0], [2.0]]), ([[]], [[]]),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), UNPAIRED)
def test_unpaired_blocks_are_refused(ours: list[list[float]], theirs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="the same blocks"):
        paired(ours, theirs)


@pytest.mark.parametrize("change", ["value", "name", "space", "check", "no check", "another line's"])
def test_a_line_that_was_changed_is_refused_by_its_number_and_nothing_is_lost(tmp_path: Path, change: str) -> None:
    log = RunLog(tmp_path / "results.jsonl")
    for name in ("a", "b", "c"):
        log.add(name, {"task": "x", "way": "none", "length": 8, "score": 0.5})
    lines = log.path.read_text().split("\n")
    lines[1] = {
        "value": lines[1].replace("0.5", "0.9"),
        "name": lines[1].replace('"b"', '"d"'),
        "space": lines[1].replace('"b", ', '"b",  '),
        "check": lines[1][:-4] + ("00" if lines[1][-4:-2] != "00" else "11") + lines[1][-2:],
        "no check": re.sub(', "check": "[0-9a-f]*"', "", lines[1]),
        "another line's": lines[1][:-20] + lines[0][-20:],
    }[change]
    log.path.write_text("\n".join(lines))
    before = log.path.read_bytes()
    for read in (log.runs, lambda: report_read.read(tmp_path)):
        with pytest.raises(BadFile, match=r"results\.jsonl: line 2 is not what was written") as caught:
            read()
        assert "delete line 2" in caught.value.fix
    assert log.path.read_bytes() == before
    log.path.write_text("\n".join([lines[0], *lines[2:]]))  # what the error says to do
    assert list(log.runs()) == ["a", "c"]


def test_a_log_from_before_there_were_checks_goes_on(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    log.path.write_text('{"run": "a", "loss": 1}\n')
    log.add("b", {"loss": 2})
    with open(log.path, "a") as file:
        file.write('{"run": "c", "loss": 3}\n')
    assert log.runs() == {"a": {"loss": 1}, "b": {"loss": 2}, "c": {"loss": 3}}
    log.path.write_text(log.path.read_text().replace('"loss": 2', '"loss": 9'))
    with pytest.raises(BadFile, match="line 2"):
        log.runs()
