"""Conversations without a terminal: commands, a context that fills up, interruptions, errors that end nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.chat.prompt import is_open, shorten
from mrrope_gguf.chat.window import meter, warning
from mrrope_gguf.session import ChatSession
from tests.chat import Listener, speak, talk_about
from tests.session_chat import BOOK, open_small, small

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    llm = open_small(small(tmp_path_factory.mktemp("chat")))
    yield llm
    llm.close()


@pytest.fixture
def llm(loaded: Any) -> Any:
    loaded.reset()
    return loaded


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MRROPE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_conversation(llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Listener()
    speaker = speak(llm, talk, documents=[("book", BOOK)])
    used = speaker.used
    talk_about(speaker, ["one", "", "two"])
    answers = [one["content"] for one in speaker.session.messages[1::2]]
    assert len(answers) == 2
    assert capsys.readouterr().out == "".join(f"{text}\n" if not text.endswith("\n") else text for text in answers)
    assert talk.said[0] == meter(used, 2048, 1.0)
    assert talk.said[-1] == meter(speaker.used, 2048, 1.0)
    llm.reset()
    alone = ChatSession(llm, documents=[("book", BOOK)], store=False, temp=0, n_predict=8)
    assert [alone.ask(text) for text in ("one", "two")] == answers


def test_commands(llm: Any, tmp_path: Path) -> None:
    (tmp_path / "a note.txt").write_text("a red hen\n")
    (tmp_path / "b.txt").write_text("a tin hat\n")
    talk = Listener()
    speaker = speak(llm, talk, system="Be brief.", documents=[("book", BOOK)])
    commands = ["/help", "/set temp 0.5", "/set top-k 3", "/set n 4", "/set reverse_prompt zz", "/set"]
    talk_about(speaker, [*commands, "one", "two", "/regen", "/show"])
    for name in ("help", "read", "regen", "undo", "drop", "clear", "set", "show", "save", "load", "exit"):
        assert f"  /{name}" in talk.text
    sampling = speaker.session.sampling
    assert (sampling.temp, sampling.top_k, sampling.n_predict, sampling.reverse_prompt) == (0.5, 3, 4, ("zz",))
    assert "top_k = 3" in talk.text
    shown = talk.text[talk.text.index("a model") :]
    for part in ("system: Be brief.", "document: book, ", "  1  ", "tokens  two", "n_predict = 4"):
        assert part in shown
    before = speaker.session.messages
    talk_about(speaker, ["/undo"])
    assert speaker.session.messages == before[:2]
    talk_about(speaker, [f"/read {tmp_path}/a note.txt", f'/read "{tmp_path}/a note.txt" {tmp_path}/b.txt', "what"])
    asked = speaker.session.messages[-2]["content"]
    assert asked == "# a note.txt\n\na red hen\n\n# a note.txt\n\na red hen\n\n# b.txt\n\na tin hat\n\nwhat"
    talk_about(speaker, ["again"])
    assert speaker.session.messages[-2]["content"] == "again"
    talk_about(speaker, ["/drop 2", "/exit", "never"])
    assert [one["content"] for one in speaker.session.messages[::2]] == ["again"]
    talk_about(speaker, ["/clear"])
    assert speaker.session.messages == []
    assert speaker.session.documents


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/nothing", "no such command"),
        ("/set temp hot", "no number"),
        ("/set top_k 1.5", "no number"),
        ("/set warmth 1", "no sampling parameter"),
        ("/undo", "no such turn"),
        ("/regen", "no such turn"),
        ("/drop 3", "no such turn"),
        ("/drop x", "no such turn"),
        ("/read", "needs a file"),
        ("/read nowhere.txt", "no such file"),
        ("/read 'a", "quotation"),
        ("/load", "needs a name"),
        ("/load nobody", "no session"),
        ("/save all", "cannot be a session's name"),
        ("a " * 4000, "forgetting turns would not make room"),
    ],
)
def test_errors_end_nothing(llm: Any, data: Path, line: str, error: str) -> None:
    talk = Listener()
    speaker = speak(llm, talk, store=data / "sessions")
    talk_about(speaker, [line, "one"])
    assert error in talk.text
    assert len(speaker.session.messages) == 2
    assert speaker.session.messages[0]["content"] == "one"


def test_a_path_is_a_question(llm: Any) -> None:
    speaker = speak(llm, Listener())
    talk_about(speaker, ["/etc/passwd holds what?", "/ alone"])
    assert len(speaker.session.messages) == 4


def test_documents_that_cannot_be_read(llm: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "long.txt").write_text("the sea " * 3000)
    talk = Listener()
    speaker = speak(llm, talk)
    talk_about(speaker, [f"/read {tmp_path / name}" for name in ("empty.txt", "picture.png", "long.txt")])
    assert "this document is empty" in talk.text
    assert "PNG" in talk.text
    assert "does not fit in the context any more" in talk.text
    talk_about(speaker, ["one"])
    assert speaker.session.messages[0]["content"] == "one"


def test_save_and_load(llm: Any, data: Path) -> None:
    def opened(name: str) -> ChatSession:
        return ChatSession(llm, name=name, store=data / "sessions", on_note=talk.note, temp=0, n_predict=8)

    talk = Listener()
    speaker = speak(llm, talk, store=data / "sessions", documents=[("book", BOOK)])
    talk_about(speaker, ["one", "/save sea", "two"], opened)
    sea = speaker.session.messages
    talk_about(speaker, ["/save other", "three"], opened)
    talk_about(speaker, ["/load sea"], opened)
    assert speaker.session.name == "sea"
    assert speaker.session.messages == sea
    assert speaker.session.documents == [("book", BOOK)]
    talk_about(speaker, ["/load sea", "/save other", "/load other", "/undo"], opened)
    assert "is open already" in talk.text
    assert "is there already" in talk.text
    assert speaker.session.name == "other"
    assert speaker.session.messages == sea
    speaker.session.close()


def full_context(tmp_path: Path, answers: Any) -> tuple[Any, Listener, Any]:
    llm = open_small(small(tmp_path, n_ctx=256))
    talk = Listener(answers)
    return llm, talk, speak(llm, talk, documents=[("", "the sea " * 10)], n_predict=24)


QUESTIONS = ["the men of the inn", "a red hen", "a tin hat", "rain on the inn", "on and on"]


def test_a_full_context_is_never_shifted_without_asking(tmp_path: Path) -> None:
    llm, talk, speaker = full_context(tmp_path, lambda _: "n")
    talk_about(speaker, QUESTIONS)
    assert "% of the context is used" in talk.text.replace(" %", "%")
    assert talk.text.count("of the context is used") == 1
    assert "the context is full" in talk.text
    assert "Forget" in talk.asked[0]
    assert "nothing was dropped" in talk.text
    assert speaker.session.messages[0]["content"] == QUESTIONS[0]
    llm.close()


def test_a_full_context_makes_room_if_asked_to(tmp_path: Path) -> None:
    llm, talk, speaker = full_context(tmp_path, lambda _: "")
    talk_about(speaker, QUESTIONS)
    left = [one["content"] for one in speaker.session.messages[::2]]
    assert left == QUESTIONS[-len(left) :]
    assert 0 < len(left) < len(QUESTIONS)
    assert QUESTIONS[0] in talk.text
    # what comes before all turns was not read again
    assert speaker.session.reading.held >= len("the sea " * 10) // 8
    llm.close()


def test_interrupted_reading(llm: Any) -> None:
    talk = Listener()
    speaker = speak(llm, talk, chunk=64)

    def stopped() -> str:
        wanted = speaker.interrupt.wanted
        speaker.interrupt.wanted = lambda: True  # type: ignore[method-assign]
        restore.append(wanted)
        return "the red hen " * 30

    def typed() -> str:
        speaker.interrupt.wanted = restore[0]  # type: ignore[method-assign]
        return "the red hen " * 30

    restore = list[Any]()
    talk_about(speaker, [stopped, typed])
    assert "stopped: 0 of " in talk.text
    assert len(speaker.session.messages) == 2


def test_the_warning_comes_at_80_percent() -> None:
    assert warning(799, 1000) == ""
    assert warning(800, 1000).startswith("80 % of the context is used, 200 tokens are left")


def test_blocks() -> None:
    assert is_open('"""one\ntwo')
    assert not is_open('"""one\ntwo"""')
    assert not is_open('say """ here')


def test_a_long_history_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("".join(f"\n# 2026-01-01 00:00:{i:02}\n+line {i}\n" for i in range(1000)))
    shorten(path, 4096)
    text = path.read_text()
    assert len(text) <= 2048
    assert text.startswith("\n# 2026")
    assert text.endswith("+line 999\n")
    assert path.stat().st_mode & 0o077 == 0
    shorten(path, 4096)
    assert path.read_text() == text


def test_a_long_reading_is_told_and_a_few_tokens_are_not(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrrope_gguf.chat.speaker._LONG", 0.0)
    talk = Listener()
    talk_about(speak(llm, talk), ["the red hen " * 30, "one"])
    told = [line for line in talk.said if line.startswith("read ")]
    assert len(told) == 1
    assert " tokens in " in told[0]
    assert int(told[0].split()[1]) > 200
