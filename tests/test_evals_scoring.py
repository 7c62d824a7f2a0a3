"""What an answer is worth: each rule on answers that are right, nearly right, and right in another rule's eyes."""

from __future__ import annotations

import sys

import pytest

from mrrope_gguf.errors import EngineTrouble
from mrrope_gguf.evals.longfiles import INFINITEBENCH
from mrrope_gguf.evals.retrieval import TASKS as RETRIEVAL
from mrrope_gguf.evals.ruler_tasks import TASKS as RULER
from mrrope_gguf.evals.scoring import METRICS

CASES = {
    "string_match_all": [
        ("ABC and def", ["abc", "DEF"], 1.0),
        ("abc", ["abc", "def", "ghi", "jkl"], 0.25),
        ("x1234567y", ["1234567"], 1.0),
        ("", ["a"], 0.0),
    ],
    "string_match_part": [
        ("in Paris.", ["Lyon", "paris"], 1.0),
        ("Lyons", ["Lyon", "Paris"], 1.0),
        ("Rome", ["Lyon", "Paris"], 0.0),
    ],
    "first_integer": [
        (" 71432. Remember", ["71432"], 1.0),
        ("the 71432", ["71432"], 1.0),
        ("0714", ["714"], 0.0),
        ("714320", ["71432"], 0.0),
        ("1, 71432", ["71432"], 0.0),
        ("none", ["71432"], 0.0),
        ("", ["71432"], 0.0),
    ],
    "any_word": [
        ('"ab-12"}', ["ab-12"], 1.0),
        ("it is:ab-12.", ["ab-12"], 1.0),
        ("ab-12-34", ["ab-12"], 0.0),
        ("AB-12", ["ab-12"], 0.0),
    ],
    "any_name": [
        ("perhaps Rose?", ["ROSE"], 1.0),
        ("ROSE: hello", ["ROSE", "JACK"], 1.0),
        ("Jack", ["ROSE", "JACK"], 0.0),
        ("Rosemary", ["ROSE"], 0.0),
    ],
    "first_number": [
        ("it is 12.5!", ["12.5"], 1.0),
        ("12", ["12"], 1.0),
        ("12.0", ["12"], 1.0),
        ("no 12", ["13"], 0.0),
        ("none", ["13"], 0.0),
    ],
    "last_integer": [
        ("the value is -7.", ["-7"], 1.0),
        ("-7 or 8", ["-7"], 0.0),
        ("seven", ["7"], 0.0),
        ("", ["7"], 0.0),
    ],
    "running_integers": [
        ("[1, 4, 8]", ["1", "4", "8"], 1.0),
        ("1 4 9 8", ["1", "4", "8", "3"], 0.5),
        ("2", ["1"], 0.0),
        ("", ["1"], 0.0),
    ],
    "option": [
        ("B", ["Tom", "B"], 1.0),
        ("C. Tom", ["Tom", "B"], 0.0),
        ("the answer is: Tom Sawyer", ["Tom", "B"], 1.0),
        ("the answer is B", ["Tom", "B"], 1.0),
        ("the answer is", ["Tom", "B"], 0.0),
        (" so C or B", ["Tom", "B"], 0.0),
        (" so it is 'B'", ["Tom", "B"], 1.0),
        ("none", ["Tom", "B"], 0.0),
        ("", ["Tom", "B"], 0.0),
    ],
    "bug_option": [
        ("B.", ["run", "B"], 1.0),
        ("B: run", ["run", "B"], 1.0),
        ("B", ["run", "B"], 0.0),
        ("The error is: run", ["run", "B"], 1.0),
        ("my answer is: Option C", ["run", "B"], 0.0),
        ("run", ["run", "B"], 0.0),
    ],
    "choice": [
        ("The correct answer is (C).", ["C"], 1.0),
        ("The **correct** answer is C", ["C"], 1.0),
        ("The correct answer is (A), not (C)", ["C"], 0.0),
        ("C", ["C"], 0.0),
    ],
    "letter": [("C) it", ["C"], 1.0), (" (C)", ["C"], 1.0), ("Cats", ["C"], 0.0), ("A or C", ["C"], 0.0)],
    "f1": [
        ("The red house!", ["a red house"], 1.0),
        ("red", ["red house", "blue"], 2 / 3),
        ("green", ["red house"], 0.0),
        ("", ["red"], 0.0),
    ],
    "f1_chinese": [  # characters: two of four said, two of two wanted
        ("是老张了。", ["李四", "老 张"], 2 / 3),
        ("老张", ["》老张！"], 1.0),
        ("《老张", ["老张"], 0.8),  # the one sign that the original leaves in
        ("", ["老"], 0.0),
    ],
    "rouge": [
        ("The cat sat.\nIt ran.", ["the cat sat\nit ran"], 1.0),
        ("the cat", ["a dog", "the cat sat down"], 2 / 3),
        ("cats", ["cat"], 0.0),  # words are not stemmed
        ("", ["cat"], 0.0),
    ],
}


@pytest.mark.parametrize("metric", METRICS)
def test_rule(metric: str) -> None:
    assert metric in CASES
    for said, references, wanted in CASES[metric]:
        assert METRICS[metric](said, references) == pytest.approx(wanted), (said, references)


def test_every_task_has_a_rule() -> None:
    used = {task.metric for tasks in (RULER, RETRIEVAL, INFINITEBENCH) for task in tasks.values()}
    assert used - set(METRICS) == set()


def test_summaries_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(EngineTrouble, match="longbook_sum_eng: no score") as caught:
        METRICS["rouge"]("a summary", ["a summary"])
    assert "mrrope-gguf[eval]" in caught.value.fix
