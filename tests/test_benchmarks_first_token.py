"""The benchmark of the first token: when it stops the clock, and what it makes of the times."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.first_token import answer_in, first_byte, summary

SLOW = "import sys, time; w = sys.stdout; {} time.sleep(0.3); w.write('Me'); w.flush(); time.sleep(0.5); print(' too')"


@pytest.mark.parametrize(
    ("words", "before"),
    [("", b""), ("w.write('logo\\n\\n> Wh'); w.flush(); w.write('o?\\n'); w.flush();", b"> Who?\n")],
)
def test_the_clock_stops_at_the_first_byte_of_the_answer(words: str, before: bytes) -> None:
    began = time.perf_counter()
    seconds, answer = first_byte([sys.executable, "-c", SLOW.format(words)], before, dict(os.environ))
    whole = time.perf_counter() - began
    assert answer == "Me too"
    assert 0.3 <= seconds <= whole - 0.5


def test_a_program_without_an_answer_is_no_measurement() -> None:
    with pytest.raises(SystemExit, match="ended with 3 and no answer"):
        first_byte([sys.executable, "-c", "import sys; print('logo'); sys.exit(3)"], b"> Who?\n", dict(os.environ))


def test_what_comes_before_the_question_is_no_answer() -> None:
    assert answer_in(b"logo\n> Who?\nMe.", b"> Who?\n") == b"Me."
    assert answer_in(b"logo\n> Wh", b"> Who?\n") == b""


def test_a_ratio_is_of_times_next_to_each_other() -> None:
    found = summary({"llama-cli": [10.0, 20.0, 10.0], "mrrope chat": [10.5, 20.2, 10.2]})
    assert found["first_token_seconds"] == {"llama-cli": 10.0, "mrrope chat": 10.5}
    assert found["ratios"] == [1.05, 1.01, 1.02]
    assert found["ratio"] == 1.02
