"""A conversation that outgrew its window goes on in a new process at its own stage, with the same keys."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import engine
from mrrope_gguf.extend import extend
from mrrope_gguf.session import ChatSession
from mrrope_gguf.sessions.fingerprint import fingerprint
from mrrope_gguf.watch import StageChange
from tests import tiny
from tests.patched import run
from tests.session_chat import GREEDY, Told, open_small, states

pytestmark = pytest.mark.engine

WINDOW, SCALE = 128, 4
QUESTIONS = [f"{n} red hens ran in the rain and on" for n in ("two", "six", "ten", "no", "all", "few")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    plain = tiny.make(folder / "plain.gguf", n_ctx=WINDOW)
    return extend(plain, folder / "elastic.gguf", scale=SCALE, method="mrrope-pro", rendering="engine").path


def converse(path: Path, store: Path, questions: list[str], name: str = "x", **options: Any) -> tuple[Told, Any]:
    """The answers, with S after each, and every stage that was passed."""
    stages, notes = list[StageChange](), list[str]()
    llm = open_small(path, on_stage=stages.append, **options)
    answers, readings, scales = [], [], []
    with ChatSession(llm, name=name, store=store, on_note=notes.append, **GREEDY) as chat:
        for question in questions:
            answers.append(chat.ask(question))
            readings.append(chat.reading)
            scales.append(chat.scale)
    told = Told(answers, llm.input_ids[: llm.n_tokens].tolist(), readings, notes, chat.scale)
    return told, (scales, stages)


def test_it_goes_on_at_its_stage(patched: Path, model: Path, tmp_path: Path) -> None:
    whole, (scales, stages) = run(converse, model, tmp_path / "a", QUESTIONS, lib=patched)
    assert scales[0] == 1.0
    assert len(set(scales)) >= 4
    assert len(stages) >= 3  # told while it is read and written
    assert all(one.after == next.before for one, next in pairwise(stages))
    for cut in (1, 3, 5):
        store = tmp_path / str(cut)
        head, _ = run(converse, model, store, QUESTIONS[:cut], lib=patched)
        assert head.scale == scales[cut - 1]
        tail, (after, _) = run(converse, model, store, QUESTIONS[cut:], lib=patched)
        assert tail.readings[0].restored == len(head.tokens)
        assert (head.answers + tail.answers, tail.tokens) == (whole.answers, whole.tokens)
        assert after == scales[cut:]
        assert tail.notes == []


def back_to_the_window(path: Path, store: Path) -> tuple[float, float, list[str], list[str]]:
    """Restore a long conversation, drop all but what fits the window, and ask; and the same from nothing."""
    llm = open_small(path)
    with ChatSession(llm, name="x", store=store, **GREEDY) as chat:
        chat.read()
        grown = chat.scale
        while len(chat.messages) > 2:
            chat.undo()
        answers = [chat.ask("a tin")]
        back, messages = chat.scale, chat.messages
    llm.reset()
    fresh = ChatSession(llm, store=False, **GREEDY)
    fresh.ask(messages[0]["content"])
    wanted = [fresh.ask("a tin")]
    return grown, back, answers, wanted


def test_back_within_the_window_it_is_the_original(patched: Path, model: Path, tmp_path: Path) -> None:
    run(converse, model, tmp_path, QUESTIONS, lib=patched)
    grown, back, answers, wanted = run(back_to_the_window, model, tmp_path, lib=patched)
    assert grown > 1.0
    assert back == 1.0
    assert answers == wanted


def marks(path: Path) -> list[str]:
    """Fingerprints of a model under different tables."""
    from mrrope_gguf.tables import rope_table

    found = []
    for options in ({}, {"elastic": False}, {"n_ctx": 256}):
        llm = open_small(path, **options)
        found.append(fingerprint(llm).key)
        llm.close()
    llm = open_small(path)
    for scale in (2, 3):
        engine.set_table(
            llm, rope_table("mrrope-uni", n_rot=16, freq_base=1e4, n_ctx_orig=WINDOW, scale=scale)
        )  # fmt: skip
        found.append(fingerprint(llm).key)
    llm.close()
    return found


def test_tables_have_fingerprints_of_their_own(patched: Path, model: Path) -> None:
    elastic, static, shorter, two, three = run(marks, model, lib=patched)
    assert shorter == elastic
    assert len({elastic, static, two, three}) == 4


def static_reads(path: Path, store: Path) -> tuple[int, list[str]]:
    llm, notes = open_small(path, elastic=False), list[str]()
    with ChatSession(llm, name="x", store=store, on_note=notes.append, **GREEDY) as chat:
        chat.read()
        return chat.reading.restored, notes


def test_a_state_of_another_table_is_not_used(patched: Path, model: Path, tmp_path: Path) -> None:
    run(converse, model, tmp_path, QUESTIONS[:4], lib=patched)
    assert len(states(tmp_path)) == 1
    restored, notes = run(static_reads, model, tmp_path, lib=patched)
    assert restored == 0
    assert "its table was elastic mrrope-pro to S = 4 and is static mrrope-pro" in notes[0]
