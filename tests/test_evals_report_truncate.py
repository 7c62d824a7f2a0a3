"""What the report says of each method against truncating: every case of what was measured, and of who was better."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.evals.report_pages import html, markdown
from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.report_stats import summarize
from mrrope_gguf.evals.report_versus import RULE, against_truncate
from mrrope_gguf.evals.report_words import blocks
from tests.eval_results import answer, head, ppl, whole, write

WORSE = "does not beat truncate at perplexity past the window (+22.1 %, +22.1 to +22.1: worse)"
BEATS = "beats truncate at perplexity past the window (-18.1 %, -18.1 to -18.1)"


def said(folder: Path, *lines: dict[str, Any]) -> list[str]:
    return list(against_truncate(summarize(read(write(folder, [head(), *lines])))))


def texts(yarn: float | None, truncate: float | None, n: int = 16) -> Iterator[dict[str, Any]]:
    """One text of 16 blocks, 4 of them in the window."""
    for way, loss in (("yarn", yarn), ("truncate", truncate)):
        if loss is not None:
            yield ppl("t", way, [2.0] * 4 + [loss] * (n - 4))


def needles(
    yarn: int, truncate: int, n: int = 10, base: float = 1.0, loss: float | None = None
) -> Iterator[dict[str, Any]]:
    """So many of `n` questions at 4096 tokens right; `base` is the unextended model's score in its window.

    loss: of yarn's right answers, in nats, where truncate's is 1.
    """
    for way, right, its in (("yarn", yarn, loss), ("truncate", truncate, loss and 1.0)):
        yield from (answer("needle", way, 4096, str(i), float(i < right), loss=its) for i in range(n))
    yield answer("needle", "none", 512, "0", base)


def test_a_method_that_beats_it_and_retrieves(tmp_path: Path) -> None:
    (words,) = said(tmp_path, *texts(2.0, 2.2), *needles(9, 1))
    assert words.startswith(f"yarn: {BEATS}, and it retrieves what truncate cannot: needle 0.90 against 0.10 (+0.8, ")


def test_a_method_that_beats_it_alone(tmp_path: Path) -> None:
    (words,) = said(tmp_path, *texts(2.0, 2.2), *needles(2, 2))
    assert words == (
        f"yarn: {BEATS}, but nothing here shows that it retrieves what truncate cannot; not told apart from truncate: "
        "needle 0.20 against 0.20 (+0, +0 to +0)."
    )


def test_a_method_that_does_not_beat_it_but_retrieves(tmp_path: Path) -> None:
    (words,) = said(tmp_path, *texts(2.2, 2.0), *needles(10, 2))
    assert words.startswith(f"yarn: {WORSE}, but it retrieves what truncate cannot: needle 1.00 against 0.20 (+0.8, ")


def test_a_method_that_does_neither(tmp_path: Path) -> None:
    (words,) = said(tmp_path, *texts(2.2, 2.0), *needles(0, 9))
    assert words.startswith(
        f"yarn: {WORSE}, and nothing here shows that it retrieves what truncate cannot; "
        "retrieves less: needle 0.00 against 0.90 (-0.9, "
    )


def test_lengths_past_the_window_count_together_and_others_do_not(tmp_path: Path) -> None:
    """Four of four at each of two lengths are too few alone; in the window truncate is none."""
    lines = [
        answer("needle", way, length, str(i), float(way == "yarn" or length == 1024), loss=None)
        for way in ("yarn", "truncate", "none") for length in (1024, 2048, 4096) for i in range(4)
    ]  # fmt: skip
    (words,) = said(tmp_path, *lines)
    assert words.endswith("but it retrieves what truncate cannot: needle 1.00 against 0.00 (+1, +1 to +1).")


def test_questions_that_were_not_put_to_both_are_said(tmp_path: Path) -> None:
    more = [answer("needle", "truncate", 2048, str(i), 1.0) for i in range(6)]
    (words,) = said(tmp_path, *needles(10, 0), *more)
    assert "needle 1.00 against 0.00 (+1, +1 to +1, over 10 of 16 questions)" in words


def test_few_questions_show_nothing(tmp_path: Path) -> None:
    (words,) = said(tmp_path, *texts(2.2, 2.0), *needles(5, 0, n=5))
    assert "nothing here shows" in words
    assert "needle 1.00 against 0.00 (under 6 questions)" in words


def test_alike_in_perplexity_does_not_beat_it(tmp_path: Path) -> None:
    lines = [ppl("t", "truncate", [2.0] * 16), ppl("t", "yarn", [2.0] * 4 + [1.9, 2.1] * 6)]
    (words,) = said(tmp_path, *lines)
    assert "does not beat truncate at perplexity past the window" in words
    assert ": not told apart), and no task here tells whether it retrieves" in words


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """Without perplexity, without a text that is long enough, without truncate, without the way, without questions."""
    unknown = "and no task here tells whether it retrieves what truncate cannot."
    lacking = "yarn: not compared with truncate at perplexity past the window"
    cases: dict[str, list[dict[str, Any]]] = {
        "it was not measured": [ppl("t", "yarn", [0.1] * 4, task="kl")],
        "no text reaches there": [*texts(2.0, 2.0, n=4)],
        "truncate was not measured there": [*texts(2.0, None)],
        "yarn was not measured there": [*texts(None, 2.0), *texts(2.0, None, n=4)],
        "no text by both was measured there": [*texts(None, 2.0), {**ppl("u", "yarn", [2.0] * 16)}],
        "under 6 pairs of blocks": [*texts(2.0, 2.0, n=8)],
    }
    for why, lines in cases.items():
        assert said(tmp_path / why, *lines) == [f"{lacking} ({why}), {unknown}"]
    (words,) = said(tmp_path / "tasks alone", *needles(10, 0))
    assert words.startswith(f"{lacking} (it was not measured), but it retrieves what truncate cannot: needle 1.00")


def test_what_both_have_read_is_compared(tmp_path: Path) -> None:
    """A pass that was cut short is no reason to say nothing, and the report says how much it was."""
    one = said(tmp_path / "1", *texts(None, 2.0), *texts(2.2, None, n=12))
    two = said(tmp_path / "2", *texts(2.2, None), *texts(None, 2.0, n=12), ppl("u", "yarn", [2.0] * 16))
    for (words,), n in ((one, 12), (two, 24)):
        assert f"(+22.1 %, +22.1 to +22.1: worse, over the 8 of {n} blocks that both have read)" in words


def test_likelier_answers_are_told_also_of_a_hard_task(tmp_path: Path) -> None:
    """A score of nothing against nothing says nothing; the losses of the right answers do."""
    for loss, words in ((0.5, "likelier"), (2.5, "less likely")):
        found, _ = said(tmp_path / words, *needles(0, 0, base=0.2, loss=loss))
        assert found.endswith(
            f"right answers are {words} than for truncate (nats a token): needle {loss:.2f} against 1.00 "
            f"({loss - 1:+.3g}, {loss - 1:+.3g} to {loss - 1:+.3g})."
        )
    (found,) = said(tmp_path / "alike", *needles(0, 0, loss=1.0))
    assert "likel" not in found


def test_a_task_too_hard_for_the_model_shows_nothing(tmp_path: Path) -> None:
    assert said(tmp_path, *texts(2.2, 2.0), *needles(10, 0, base=0.2)) == [
        f"yarn: {WORSE}, and no task here tells whether it retrieves what truncate cannot.",
        "Scores that do not count here, since the unextended model fails in its own window: needle.",
    ]


def test_methods_of_which_the_same_is_known_are_named_together(tmp_path: Path) -> None:
    words = said(tmp_path, *(ppl("t", way, [0.1] * 4, task="kl") for way in ("yarn", "mrrope-uni")))
    assert len(words) == 1
    assert words[0].startswith("yarn, mrrope-uni: not compared")
    assert not said(tmp_path / "none", ppl("t", "none", [2.0] * 16), ppl("t", "truncate", [2.0] * 16))


@pytest.mark.parametrize("page", [markdown, lambda content: html(content, {})])
def test_both_pages_have_the_rule_and_a_sentence_for_every_method(tmp_path: Path, page: Any) -> None:
    summary = summarize(read(write(tmp_path, whole())))
    text = page(blocks(summary, [])).replace("\\", "")
    assert RULE in text
    for way, does in (("yarn", "beats"), ("mrrope-uni", "beats"), ("elastic", "does not beat")):
        assert f"{way}: {does} truncate at perplexity past the window" in text
    assert "but it retrieves what truncate cannot: needle 1.00 against 0.30" in text
