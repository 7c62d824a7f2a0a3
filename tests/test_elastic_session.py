"""A conversation through llama-cpp-python that outgrows its window, is saved, and goes on in another process."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import engine
from mrrope_gguf.model import load
from mrrope_gguf.watch import StageChange
from tests.elastic_chat import SCALE, TURNS, WINDOW, elastic_pair
from tests.patched import run

pytestmark = [pytest.mark.engine, pytest.mark.real]

SAVED_AFTER = 3


@dataclass
class Turn:
    """One answer: its text, all tokens the model then holds, S, and the stages passed on the way."""

    answer: str
    tokens: list[int]
    scale: float
    stages: list[StageChange]


def converse(
    path: Path, said: list[str], n_turns: int, keep: Path | None = None, resume: Path | None = None, **options: Any
) -> list[Turn]:
    """Take the turns that follow those `said` already; `keep` gets the state after SAVED_AFTER turns."""
    stages: list[StageChange] = []
    # exactly as in one uninterrupted process: one thread, the same batches
    llm = load(path, n_threads=1, n_threads_batch=1, on_stage=stages.append, **options)
    if resume:
        llm.load_state(pickle.loads(resume.read_bytes()))
        stages.append(StageChange(llm.n_tokens, engine.get_elastic(llm).scale, 0))  # as it was found
    turns, messages = [], [message for pair in zip(TURNS, said, strict=False) for message in exchange(*pair)]
    for turn in range(len(said), n_turns):
        if turn == SAVED_AFTER and keep:
            keep.write_bytes(pickle.dumps(llm.save_state()))
        messages.append({"role": "user", "content": TURNS[turn]})
        # repeat_penalty off: llama-cpp-python forgets on load_state what it had sampled
        reply: Any = llm.create_chat_completion(messages, temperature=0, max_tokens=16, repeat_penalty=1.0)
        answer = reply["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": answer})
        turns.append(Turn(answer, llm.input_ids[: llm.n_tokens].tolist(), engine.get_elastic(llm).scale, stages[:]))
        stages.clear()
    llm.close()
    return turns


def exchange(said: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return elastic_pair(smollm2, tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def state(files: tuple[Path, Path]) -> Path:
    """Where `told` puts the state it saves half-way."""
    return files[1].with_name("half-way.state")


@pytest.fixture(scope="module")
def told(patched: Path, files: tuple[Path, Path], state: Path) -> list[Turn]:
    """The whole conversation in one process."""
    return run(converse, files[1], [], len(TURNS), keep=state, lib=patched)


def test_the_conversation_passes_stages(told: list[Turn]) -> None:
    assert [turn.scale for turn in told] == sorted(turn.scale for turn in told)
    assert len(told[0].tokens) <= WINDOW
    assert (told[0].scale, told[0].stages) == (1.0, [])
    changes = [change for turn in told for change in turn.stages]
    assert len([change for turn in told[:SAVED_AFTER] for change in turn.stages]) >= 2
    assert changes[0].before == 1.0
    assert all(one.after == next.before for one, next in pairwise(changes))
    assert all(one.before < one.after <= SCALE and one.n_tokens > WINDOW for one in changes)
    assert told[-1].scale == SCALE


def test_it_goes_on_in_a_new_process(patched: Path, files: tuple[Path, Path], state: Path, told: list[Turn]) -> None:
    before, after = told[:SAVED_AFTER], told[SAVED_AFTER:]
    assert after[-1].scale > before[-1].scale > 1.0  # growth goes on, too
    said = [turn.answer for turn in before]
    resumed = run(converse, files[1], said, len(TURNS), resume=state, lib=patched)
    found = resumed[0].stages.pop(0)
    assert (found.n_tokens, found.before) == (len(before[-1].tokens), before[-1].scale)
    assert resumed == after


def test_inside_the_window_it_is_the_original(patched: Path, files: tuple[Path, Path], told: list[Turn]) -> None:
    (original,) = run(converse, files[0], [], 1, lib=patched)
    assert original == told[0]


def test_the_static_table_answers_from_the_first_token_on(
    patched: Path, files: tuple[Path, Path], told: list[Turn]
) -> None:
    static = run(converse, files[1], [], 1, elastic=False, lib=patched)
    assert (static[0].scale, static[0].stages) == (SCALE, [])
    assert static[0].answer != told[0].answer
