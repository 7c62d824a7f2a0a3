"""ChatSession: answers are the model's own, tokens are reused, interruptions keep what there is, nothing is shifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mrrope_gguf
from mrrope_gguf.errors import Refused
from mrrope_gguf.session import ChatSession
from mrrope_gguf.sessions.sampling import Sampling
from tests.session_chat import BOOK, GREEDY, converse, open_small, small, states

pytestmark = pytest.mark.engine


@pytest.fixture
def llm(llm: Any) -> Any:
    """The model with nothing in memory."""
    llm.reset()
    return llm


def chat(llm: Any, *documents: str, **options: Any) -> ChatSession:
    return ChatSession(llm, documents=documents, **{"store": False, **GREEDY, **options})


def by_hand(llm: Any, prompt: str, first: int, n: int) -> list[int]:
    """Greedy tokens after a prompt whose first `first` tokens are read in a batch of their own."""
    import llama_cpp
    import numpy as np

    llm.reset()
    tokens, written = llm.tokenize(prompt.encode(), add_bos=True, special=True), list[int]()
    for batch in (tokens[:first], tokens[first:]):
        llm.eval(batch)
    while len(written) < n:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1), (llm.n_vocab(),))
        if int(logits.argmax()) == llm.token_eos():
            break
        written.append(int(logits.argmax()))
        llm.eval(written[-1:])
    return written


def test_it_is_public() -> None:
    assert mrrope_gguf.ChatSession is ChatSession


def test_answers_are_the_models_own(llm: Any) -> None:
    session = chat(llm, BOOK, n_predict=30)
    wanted = by_hand(llm, f"system: {BOOK.strip()}\nuser: the red hen\nassistant:", len(session._opening()), 30)
    llm.reset()
    pieces = list(session.say("the red hen"))
    assert session._transcript.pieces[-1].tokens == tuple(wanted)
    assert session.messages == [
        {"role": "user", "content": "the red hen"}, {"role": "assistant", "content": "".join(pieces)},
    ]  # fmt: skip
    assert len(pieces) > 5
    assert session.finish_reason == ("length" if len(wanted) == 30 else "stop")
    assert session.scale == 1.0


def test_nothing_is_read_twice(llm: Any) -> None:
    session = chat(llm, BOOK)
    assert session.tokens_used == len(session._opening()) > 300
    assert session.read()
    assert session.reading.read == session.tokens_used
    for question in ("one", "two", "three"):
        before = session.tokens_used
        session.ask(question)
        # all but the opening's last token, or the answer's, which nobody had to read before
        assert session.reading.held >= before - 1
        assert session.reading.read <= len(f"\nuser: {question}\nassistant:") + 2
    used = session.tokens_used
    assert used == session.reading.total + len(session._transcript.pieces[-1].tokens)
    question = session.undo()
    assert question == "three"
    assert session.tokens_used == before
    session.ask("three")
    assert session.tokens_used == used


def test_regenerate(llm: Any) -> None:
    session = chat(llm, BOOK)
    first = session.ask("one")
    assert "".join(session.regenerate()) == first
    assert session.reading.read == 1
    other = "".join(session.regenerate(temp=1.5, seed=3))
    assert other != first
    assert "".join(session.regenerate(temp=1.5, seed=3)) == other
    assert "".join(session.regenerate(temp=1.5, seed=4)) != other
    assert session.messages[-1]["content"] != other
    assert len(session.messages) == 2
    before = session.messages
    next(session.regenerate(stop=lambda: True), None)
    assert session.messages[:1] == before[:1]
    session.undo()
    for change in (session.undo, session.regenerate, session.drop_oldest, lambda: session.drop_oldest(-1)):
        with pytest.raises(Refused, match="no such turn"):
            change()


def test_stopped_while_reading(llm: Any) -> None:
    wanted = chat(llm, BOOK * 2).ask("one")
    llm.reset()
    seen = list[tuple[int, int]]()
    session = chat(llm, BOOK * 2, chunk=100, on_progress=lambda done, total: seen.append((done, total)))
    assert list(session.say("one", stop=lambda: len(seen) == 3)) == []
    assert session.finish_reason == "interrupted"
    assert session.messages == []
    assert [done for done, _ in seen] == [100, 200, 300]
    assert llm.n_tokens == 300
    assert session.ask("one") == wanted
    assert (session.reading.held, session.reading.read) == (300, session.reading.total - 300)
    assert seen[-1] == (session.reading.read,) * 2


def test_ctrl_c_while_reading(llm: Any) -> None:
    wanted = chat(llm, BOOK * 2).ask("one")
    llm.reset()

    def interrupt(done: int, _total: int) -> None:
        if done == 200 and not raised:
            raised.append(True)
            raise KeyboardInterrupt

    raised = list[bool]()
    session = chat(llm, BOOK * 2, chunk=100, on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask("one")
    assert (session.messages, llm.n_tokens) == ([], 200)
    assert session.ask("one") == wanted
    assert session.reading.held == 200


def test_what_was_read_before_an_interruption_is_saved(llm: Any, tmp_path: Path) -> None:
    seen = list[int]()
    with chat(llm, BOOK * 2, store=tmp_path, chunk=100, on_progress=lambda done, _: seen.append(done)) as session:
        assert not session.read(stop=lambda: len(seen) == 4)
    llm.reset()
    session = chat(llm, BOOK * 2, store=tmp_path)
    session.ask("one")
    assert (session.reading.restored, session.reading.read) == (400, session.reading.total - 400)


@pytest.mark.parametrize("how", ["stop", "ctrl-c", "leave"])
def test_cut_short_while_writing(llm: Any, how: str) -> None:
    whole = chat(llm, BOOK, n_predict=20).ask("one")
    llm.reset()
    session, got, asked = chat(llm, BOOK, n_predict=20), list[str](), [0]

    def stop() -> bool:
        asked[0] += bool(got)
        if asked[0] == 3 and how == "ctrl-c":
            raise KeyboardInterrupt
        return asked[0] == 3 and how == "stop"

    try:
        for piece in session.say("one", stop=stop):
            got.append(piece)
            if how == "leave" and len(got) == 4:
                break
    except KeyboardInterrupt:
        assert how == "ctrl-c"
    else:
        assert how != "ctrl-c"
    kept = session.messages[1]["content"]
    assert kept.startswith("".join(got))
    assert 0 < len(kept) < len(whole)
    assert session.finish_reason == "interrupted"
    session.ask("two")
    assert session.reading.held >= session.reading.total - len("\nuser: two\nassistant:") - 3
    assert len(session.messages) == 4


def test_an_answer_that_is_overtaken(llm: Any) -> None:
    """Somebody asks again, or takes a turn back, before an answer is finished: it is dropped."""
    session = chat(llm, BOOK)
    session.ask("one")
    for change in (lambda: session.ask("two"), session.undo, session.clear):
        late = session.say("three")
        next(late)
        change()
        before, held = session.messages, llm.n_tokens
        with pytest.raises(Refused, match="given up"):
            list(late)
        assert (session.messages, llm.n_tokens) == (before, held)
        session.ask("four")


def test_sampling_by_llamas_names(llm: Any) -> None:
    likeliest = chat(llm, n_predict=16).ask("one")
    assert chat(llm, n_predict=16, temp=0.9, top_k=1).ask("one") == likeliest
    assert chat(llm, n_predict=16, temp=0.9, top_p=0.0).ask("one") == likeliest
    assert chat(llm, n_predict=16, temp=0.9, min_p=1.0).ask("one") == likeliest
    hot: dict[str, Any] = {"temp": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "n_predict": 16}
    assert len({chat(llm, **hot).ask("one") for _ in range(3)}) > 1
    assert len({chat(llm, **hot, seed=5).ask("one") for _ in range(3)}) == 1
    # a penalty that no logit makes good: each token once, those of the prompt never
    for penalty in ({"presence_penalty": 1e3}, {"frequency_penalty": 1e3}):
        session = chat(llm, n_predict=-1, repeat_last_n=-1, **penalty)
        session.ask("one", n_predict=100)
        prompt, answer = (piece.tokens for piece in session._transcript.pieces)
        assert len(set(answer)) == len(answer) > 50
        assert not set(answer) & set(prompt)
    forgetful = chat(llm, repeat_last_n=4, presence_penalty=1e3, n_predict=100)
    forgetful.ask("one")
    answer = forgetful._transcript.pieces[-1].tokens
    assert len(set(answer)) < len(answer)
    assert all(len(set(answer[i : i + 5])) == 5 for i in range(len(answer) - 4))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"temperature": 1}, "temp"),
        ({"top_k": 2.5}, "counts"),
        ({"temp": "hot"}, "no number"),
        ({"n_predict": 0}, "a tok"),
    ],
)
def test_sampling_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused) as caught:
        Sampling().but(**wrong)
    assert why in caught.value.why


def test_a_reverse_prompt_ends_the_answer(llm: Any) -> None:
    whole = chat(llm, n_predict=60).ask("one")
    at = len(whole) // 2
    end = whole[at : at + 3]
    session = chat(llm, n_predict=60, reverse_prompt=[end])
    assert session.ask("one") == whole[: whole.index(end)]
    assert session.finish_reason == "stop"


def test_the_llama_stays_usable(llm: Any) -> None:
    session = chat(llm, BOOK)
    session.ask("one")
    by_itself = llm.create_completion("a hen", max_tokens=3, temperature=0)["choices"][0]["text"]
    assert session.ask("two")
    assert session.reading.read > 300  # the completion took its place
    llm.reset()
    assert llm.create_completion("a hen", max_tokens=3, temperature=0)["choices"][0]["text"] == by_itself


def test_a_conversation_goes_on_in_a_new_process(model: Path, patched_run: Any, tmp_path: Path) -> None:
    questions = ["one", "two", "three", "four"]
    whole = patched_run(converse, model, questions, False)
    head = patched_run(converse, model, questions[:2], tmp_path, name="a sea / of names")
    tail = patched_run(converse, model, questions[2:], tmp_path, name="a sea / of names", documents=())
    assert head.answers + tail.answers == whole.answers
    assert tail.tokens == whole.tokens
    assert tail.readings[0].restored == len(head.tokens)
    assert tail.readings[0].read < 40
    assert tail.notes == []
    # without the name: the document alone is found
    other = patched_run(converse, model, ["five"], tmp_path)
    assert other.readings[0].restored > 300
    assert other.answers == patched_run(converse, model, ["five"], False).answers


@pytest.fixture
def patched_run() -> Any:
    """A call in a process of its own, on stock."""
    from functools import partial

    from tests.patched import run

    return partial(run, lib=None)


@pytest.mark.parametrize("slow", [True, False])
def test_a_long_reading_is_saved(tmp_path: Path, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it took long as soon as the answer has begun, which nobody waits for longer; else when it is there."""
    monkeypatch.setattr("mrrope_gguf.sessions.reader.SLOW", 0.0 if slow else 1e9)
    llm = open_small(small(tmp_path, n_ctx=4096))
    session = chat(llm, BOOK * 8, store=tmp_path / "s", n_predict=2)
    answer = session.say("one")
    next(answer)
    assert not states(tmp_path / "s")
    if slow:
        next(answer)
        assert len(states(tmp_path / "s")) == 1
    answer.close()  # type: ignore[attr-defined]
    assert len(states(tmp_path / "s")) == 1
    session.close()  # a token more: not worth another file
    first = states(tmp_path / "s")
    assert len(first) == 1
    if slow:  # without a question there is nothing to wait for
        llm.reset()
        assert chat(llm, BOOK * 8, store=tmp_path / "r").read()
        assert len(states(tmp_path / "r")) == 1
    # the longer state takes the place of what it begins with
    llm.reset()
    session = chat(llm, BOOK * 8, store=tmp_path / "s", n_predict=4)
    session.ask("one")
    assert session.reading.restored > 2000
    session.save()
    assert len(states(tmp_path / "s")) == 1
    assert states(tmp_path / "s") != first
    llm.close()
