"""Conversations by name: what is in them, who holds them, what they outlive; listed, shown and removed."""

from __future__ import annotations

import argparse
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.cli import main
from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.session import ChatSession
from mrrope_gguf.sessions import manage
from mrrope_gguf.sessions.named import Named, named_files, sealed
from mrrope_gguf.sessions.store import Store
from mrrope_gguf.user_key import user_key
from mrrope_gguf.verbs_sessions import sessions
from tests.patched import run
from tests.session_chat import BOOK, GREEDY, open_small, small, states

pytestmark = pytest.mark.engine


def talk(llm: Any, name: str | None, *questions: str, **options: Any) -> ChatSession:
    """A conversation that was asked and closed, in an empty memory."""
    llm.reset()
    with ChatSession(llm, name=name, **{**GREEDY, **options}) as chat:
        for question in questions:
            chat.ask(question)
    return chat


def named_file(folder: Path, name: str) -> Path:
    return folder / "named" / f"{name}.json"


def test_it_is_there_again(llm: Any, folder: Path) -> None:
    first = talk(llm, "book", "one", system="be brief", documents=[("the sea", BOOK), BOOK[::-1]], min_p=0.2)
    llm.reset()
    with ChatSession(llm, name="book", n_predict=3) as chat:
        assert chat.messages == first.messages
        assert (chat.system, chat.documents) == ("be brief", [("the sea", BOOK), ("", BOOK[::-1])])
        assert (chat.sampling.temp, chat.sampling.min_p, chat.sampling.n_predict) == (0, 0.2, 3)
        assert chat.tokens_used == first.tokens_used
        assert chat.read()
        assert chat.reading.restored >= first.tokens_used - 2
    assert stat.S_IMODE(named_file(folder, "book").stat().st_mode) == 0o600
    # the same beginning may be given again, another one may not
    ChatSession(llm, "be brief", name="book").close()
    for other in ({"system": "be long"}, {"documents": [BOOK]}):
        with pytest.raises(Refused, match="another beginning"):
            ChatSession(llm, name="book", **other)
    ChatSession(llm, name="book").close()  # what was refused does not hold the name


def test_every_turn_is_kept_at_once(llm: Any, folder: Path) -> None:
    """A process that dies leaves the conversation as it was after its last answer."""
    llm.reset()
    chat = ChatSession(llm, name="x", **GREEDY)
    for question in ("one", "two"):
        chat.ask(question)
        assert json.loads(named_file(folder, "x").read_text())["messages"] == chat.messages
    next(chat.say("three"))  # left in the middle
    chat.undo()
    chat.drop_oldest()
    assert json.loads(named_file(folder, "x").read_text())["messages"] == chat.messages
    assert [one["content"] for one in chat.messages[::2]] == ["two"]
    chat.clear()
    chat.close()
    assert ChatSession(llm, name="x").messages == []


def open_it(model: Path, name: str) -> str:
    llm = open_small(model)
    try:
        ChatSession(llm, name=name).close()
    except Refused as error:
        return str(error)
    finally:
        llm.close()
    return ""


def test_a_name_is_held_by_one(llm: Any, model: Path, folder: Path) -> None:
    chat = ChatSession(llm, name="mine", **GREEDY)
    chat.ask("one")
    with pytest.raises(Refused, match="open elsewhere"):
        ChatSession(llm, name="mine")
    assert "open elsewhere" in run(open_it, model, "mine", lib=None)
    with pytest.raises(Refused, match="open elsewhere"):
        manage.remove(Store(), ["mine"])
    manage.remove(Store(), ["all"])
    assert named_file(folder, "mine").exists()
    chat.close()
    assert run(open_it, model, "mine", lib=None) == ""


@pytest.mark.parametrize(
    "name", ["", "a" * 81, "a\nb", " a", "all", ".a", "..", "../../x", "-f", "\x1b[31m", "日" * 80]
)
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be a session's name") as caught:
        Named(tmp_path / "named", name)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "a..", "a/../../x", "a b", "Ünï日", "C:\\x", "a%2Fb", "con"])
def test_names_that_can(name: str, tmp_path: Path) -> None:
    kept = Named(tmp_path / "named", name)
    kept.save({"messages": []})
    kept.close()
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / "named"]
    assert [found for found, _ in named_files(tmp_path / "named")] == [name]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": 2}', b"\xff\xfe", b'{"version": 1, "messages": [1]}',
     b'{"version": 1, "messages": [{"role": "user"}]}', b'{"version": 1, "messages": []}',
     b'{"version": 1, "messages": [{"role": "assistant", "content": "x"}]}',
     b'{"version": 1, "messages": [], "system": 1, "documents": [], "pieces": [], "sampling": {}, "parts": {},'
     b'"created": 1}',
     b'{"version": 1, "messages": [], "system": null, "documents": [["a"]], "pieces": [], "sampling": {}, "parts": {},'
     b'"created": 1, "saved": 1, "tokens": 1}'],
)  # fmt: skip
def test_a_damaged_one_is_left_alone(llm: Any, folder: Path, content: bytes) -> None:
    talk(llm, "x", "one")
    content = sealed(content, user_key(folder)) if content.endswith(b"}") else content
    named_file(folder, "x").write_bytes(content)
    for _ in range(2):
        with pytest.raises(FileTrouble, match="cannot be read") as caught:
            ChatSession(llm, name="x")
        assert "sessions rm x" in caught.value.fix
    assert named_file(folder, "x").read_bytes() == content
    listed = manage.sessions(Store())
    assert [one.name for one in listed if one.trouble] == ["x"]
    assert manage.remove(Store(), ["x"]) == ["x"]
    assert not named_file(folder, "x").exists()


@pytest.mark.parametrize("change", ["word", "token", "no proof", "another user's"])
def test_what_was_changed_by_others_is_refused_and_left_as_it_is(llm: Any, folder: Path, change: str) -> None:
    talk(llm, "x", "one")
    path = named_file(folder, "x")
    text = path.read_text()
    if change == "another user's":
        (folder / "key").write_bytes(bytes(32))
    else:
        values = json.loads(text)
        values["messages"][0]["content"] += " " * (change == "word")
        values["pieces"][0]["tokens"][0] ^= change == "token"
        if change == "no proof":
            del values["proof"]
        path.write_text(json.dumps(values))
    before = path.read_bytes()
    with pytest.raises(FileTrouble, match="cannot be read") as caught:
        ChatSession(llm, name="x")
    assert "its proof does not fit" in caught.value.why
    assert path.read_bytes() == before
    assert [one.trouble for one in manage.sessions(Store()) if one.name == "x"] == ["damaged, or of another version"]


def test_tokens_of_another_vocabulary_are_not_used(llm: Any, folder: Path) -> None:
    chat = talk(llm, "x", "one")
    path = named_file(folder, "x")
    values = json.loads(path.read_text())
    values["pieces"][0]["tokens"][3] = 10**6
    del values["proof"]
    path.write_bytes(sealed(json.dumps(values).encode(), user_key(folder)))
    again = talk(llm, "x", "two")
    assert again.messages[:2] == chat.messages
    assert again.finish_reason


def test_another_model_reads_it_again(llm: Any, folder: Path, tmp_path: Path) -> None:
    talk(llm, "x", "one", documents=[BOOK])
    other, notes = open_small(small(tmp_path, "other", seed=1)), list[str]()
    chat = ChatSession(other, name="x", on_note=notes.append)
    assert "its model was" in notes[0]
    assert chat._transcript.pieces == []
    chat.ask("two")
    assert chat.reading.restored == 0
    assert len(chat.messages) == 4
    chat.close()
    other.close()


def test_what_cannot_be_saved_is_said_and_goes_on(llm: Any, folder: Path) -> None:
    llm.reset()
    notes = list[str]()
    chat = ChatSession(llm, name="x", on_note=notes.append, **GREEDY)
    chat.ask("one")
    assert notes == []
    before = named_file(folder, "x").read_bytes()
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        chat.ask("two")
        assert not chat.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(chat.messages) == 4
    assert "the session was not saved" in notes[0]
    assert named_file(folder, "x").read_bytes() == before
    assert chat.save()
    assert json.loads(named_file(folder, "x").read_text())["messages"] == chat.messages
    chat.close()
    with pytest.raises(Refused, match="needs a store"):
        ChatSession(llm, name="x", store=False)


def test_listed_shown_removed(llm: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(*words: str, **more: Any) -> list[str]:
        values = {"action": words[0], "name": words[-1], "names": list(words[1:]), "json": False, **more}
        assert sessions(argparse.Namespace(**values)) == 0
        return capsys.readouterr().out.splitlines()

    assert verb("list") == []
    talk(llm, "sea", "one", documents=[BOOK])
    talk(llm, "rain", "two", documents=[BOOK[::-1]])
    talk(llm, None, "three", documents=["a tin hen " * 60])
    assert len(states(folder)) == 3
    lines = verb("list")
    assert [line.split()[0] for line in lines[:2]] == ["rain", "sea"]
    assert "m.gguf" in lines[0]
    listed = json.loads("\n".join(verb("list", json=True)))
    assert [one["named"] for one in listed] == [True, True, False]
    sizes = sum(path.stat().st_size for path in [*states(folder), *folder.glob("named/*.json")])
    assert sum(one["size"] for one in listed) == sizes
    assert listed[1]["tokens"] > 300
    shown = verb("show", "sea")
    assert shown[:2] == ["user:", "one"]
    whole = json.loads("\n".join(verb("show", "sea", json=True)))
    assert whole["documents"] == [["", BOOK]]
    nameless = listed[2]["name"]
    assert json.loads("\n".join(verb("show", nameless, json=True)))["model"] == "m.gguf"
    for unknown in ("s", "nothing", "*"):
        with pytest.raises(Refused, match="names no session"):
            manage.remove(Store(), ["sea", unknown])
    assert named_file(folder, "sea").exists()
    verb("rm", "sea", nameless)
    assert [one.name for one in manage.sessions(Store())] == ["rain"]
    assert len(states(folder)) == 1
    verb("rm", "all")
    assert manage.sessions(Store()) == []
    assert states(folder) == []


def test_what_a_terminal_gets_is_printable(llm: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk(llm, "x", "a \x1b[31m red \u202e hen")
    path = named_file(folder, "x")
    values = json.loads(path.read_text())
    values["model"] = "\x1b]0;owned\x07"
    del values["proof"]
    path.write_bytes(sealed(json.dumps(values).encode(), user_key(folder)))
    os.rename(path, path.with_name("x%1B[2J.json"))
    for action in ("list", "show"):
        sessions(argparse.Namespace(action=action, name="x\x1b[2J", names=[], json=False))
    said = capsys.readouterr()
    assert "\\e[31m red \\u202e hen" in said.out
    for text in (said.out, said.err):
        assert not any(ord(char) < 32 and char != "\n" for char in text)


def test_the_command(llm: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk(llm, "sea", "one")
    assert main(["sessions"]) == 0
    assert capsys.readouterr().out.startswith("sea ")
    assert main(["sessions", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "sea"
    assert main(["sessions", "show", "sea"]) == 0
    assert capsys.readouterr().out.startswith("user:\none\n")
    assert main(["sessions", "rm", "river"]) == 1
    assert "names no session" in capsys.readouterr().err
    assert main(["sessions", "rm", "sea"]) == 0
    assert main(["sessions", "list"]) == 0
    assert capsys.readouterr().out == ""
