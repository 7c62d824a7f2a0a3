"""What a window holds: nothing is shifted out of a full one, and a sliding one is not wound back past what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.engine import llama_cpp
from mrrope_gguf.errors import ContextFull
from mrrope_gguf.session import ChatSession
from tests import tiny
from tests.session_chat import BOOK, GREEDY, open_small, small, states

pytestmark = pytest.mark.engine


def chat(llm: Any, *documents: str, **options: Any) -> ChatSession:
    return ChatSession(llm, documents=documents, **{"store": False, **GREEDY, **options})


def test_a_window_is_never_shifted(tmp_path: Path) -> None:
    llm = open_small(small(tmp_path, n_ctx=256))
    session = chat(llm, "the sea " * 20, n_predict=40)

    def talk() -> None:
        for _ in range(9):
            session.ask("a red hen and a tin hat")

    with pytest.raises(ContextFull) as caught:
        talk()
    error = caught.value
    assert error.window == 256 == session.window
    assert str(error.tokens) in error.why
    assert "256" in error.why
    turns = len(session.messages) // 2
    assert turns >= 2
    if session.finish_reason == "window":
        assert llm.n_tokens == 256
        assert session.messages[-1]["content"]
    # what did not fit changed nothing
    before, held = session.messages, llm.input_ids[: llm.n_tokens].tolist()
    with pytest.raises(ContextFull, match="does not fit") as caught:
        session.say("x" * 300)
    assert (session.messages, llm.input_ids[: llm.n_tokens].tolist()) == (before, held)
    assert session.tokens_used <= 256
    # the oldest goes, the opening is not read again
    left = session.drop_oldest(turns - 1)
    assert left < 256
    assert session.messages == before[-2:]
    assert left == session.tokens_used > len(session._opening()) + session.count(before[-1]["content"])
    session.ask("now", n_predict=4)
    assert left <= session.reading.total <= left + len("\nuser: now\nassistant:")
    assert session.reading.held >= len(session._opening()) - 1
    with pytest.raises(ContextFull, match="does not fit") as caught:
        chat(llm, "the sea " * 200).read()
    assert "before the first question" in caught.value.why
    assert "extend" in caught.value.fix
    llm.close()


def test_the_last_token_of_the_window(tmp_path: Path) -> None:
    """A prompt may have all tokens but one; an answer ends with the last one that the window holds, and says so."""
    llm = open_small(small(tmp_path, n_ctx=256))
    session = chat(llm, n_predict=-1)
    question = "a" * (255 - session.count("user: \nassistant:") - 1)
    n = len(session._transcript.for_prompt(session._render([{"role": "user", "content": question}])).tokens)
    question += "a" * (255 - n)
    with pytest.raises(ContextFull, match="does not fit"):
        session.say(question + "a")
    ends = [token for token in range(llm.n_vocab()) if session.vocabulary.ends(token)]
    assert ends == [2]
    pieces = list[str]()
    with pytest.raises(ContextFull, match="filled the context") as caught:
        pieces.extend(session.say(question))
    assert caught.value.tokens == 257
    assert session.reading.total == 255
    assert len(session._transcript.pieces[-1].tokens) == 2
    assert session.finish_reason == "window"
    assert (llm.n_tokens, len(session.messages)) == (256, 2)
    llm.close()


def test_the_error_says_how_many_turns_to_drop(tmp_path: Path) -> None:
    llm = open_small(small(tmp_path, n_ctx=256))
    session = chat(llm, n_predict=10)
    for _ in range(4):
        session.ask("the men ran on in the rain")
    question = "a" * (256 - session.tokens_used)
    with pytest.raises(ContextFull) as caught:
        session.say(question)
    n = int(caught.value.fix.split("drop_oldest(")[1].split(")")[0])
    assert 0 < n < 4
    session.drop_oldest(n)
    session.ask(question, n_predict=1)
    llm.close()


def test_sliding_windows(tmp_path: Path) -> None:
    """Such a memory cannot go back: it is saved where other conversations begin to differ, and used only as it is."""
    llm = open_small(tiny.make(tmp_path / "g.gguf", "gemma3", n_ctx=2048), n_ubatch=32, n_batch=32)
    wanted = [chat(llm, BOOK * 2).ask(question) for question in ("one", "two")]
    for i, question in enumerate(("one", "two")):
        llm.reset()
        session = chat(llm, BOOK * 2, store=tmp_path / "s")
        assert session.ask(question) == wanted[i]
        assert session.reading.restored == (0 if i == 0 else len(session._opening()))
        assert not session._reader.memory.whole
        again = "".join(session.regenerate())
        assert again == wanted[i]
        assert session.save()
    # what ends elsewhere is of no use here, and is not read for nothing
    reader = session._reader
    assert reader.store
    other = [*session._opening(), 3, 4, 5, 6]
    found = reader.store.find(reader.fingerprint(), other, more_than=0, n_ctx=2048)
    assert [one.usable for one in found] == [len(session._opening())]
    assert len(states(tmp_path / "s")) == 3
    llm.close()


def test_a_sliding_window_without_a_guard(tmp_path: Path) -> None:
    """A plain Llama does not know how far such a memory goes back: it is read again."""
    path = tiny.make(tmp_path / "g.gguf", "gemma3", n_ctx=2048)
    settings: dict[str, Any] = {"n_ctx": 2048, "verbose": False, "swa_full": False, "n_batch": 32, "n_ubatch": 32}
    llm = llama_cpp().Llama(str(path), n_threads=1, n_threads_batch=1, **settings)
    session = chat(llm, BOOK)
    session.ask("one")
    second = session.ask("two")
    assert session.reading.held > 300
    session.undo()
    assert session.ask("two") == second
    assert (session.reading.held, session.reading.read) == (0, session.reading.total)
    llm.close()
