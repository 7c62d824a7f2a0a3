"""What a conversation is as text and tokens: templates of every temper, control tokens spelled out, UTF-8 in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import MrropeError, Refused
from mrrope_gguf.session import ChatSession
from mrrope_gguf.sessions.memory import Memory
from mrrope_gguf.sessions.stream import Stream
from mrrope_gguf.sessions.template import ChatTemplate
from mrrope_gguf.sessions.transcript import Piece, Transcript, Vocabulary
from tests import tiny
from tests.session_chat import GREEDY, open_small, small

pytestmark = pytest.mark.engine

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DEAF = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}\n{% endif %}{% endfor %}a:"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    loaded = open_small(small(tmp_path_factory.mktemp("text")))
    yield loaded
    loaded.close()


def with_template(folder: Path, template: str | None) -> Any:
    return open_small(small(folder, extra={"tokenizer.chat_template": template}))


def test_the_first_prompt_is_tokenised_as_llama_does(llm: Any) -> None:
    vocabulary = Vocabulary(llm)
    for text in ("the hen of an inn", "<s>the hen", " two", "\nx", "</s>a", "é日本", ""):
        wanted = llm.tokenize(text.encode(), add_bos=not text.startswith("<s>"), special=True)
        assert vocabulary.encode(text, first=True) == wanted


@pytest.mark.parametrize("cut", [1, 3, 5, 11, 14])
def test_what_goes_on_gets_no_space_of_its_own(llm: Any, cut: int) -> None:
    vocabulary, text = Vocabulary(llm), "a\nthe</s>hen\nin a"
    tokens = vocabulary.encode(text[:cut], first=True) + vocabulary.encode(text[cut:], first=False)
    whole = llm.tokenize(text.encode(), add_bos=True, special=True)
    assert b"".join(map(vocabulary.piece, tokens)) == b"".join(map(vocabulary.piece, whole))
    assert b"".join(map(vocabulary.piece, tokens)).count(b" ") == 3  # after BOS, after </s>, before the last a


def test_control_tokens_spelled_out_are_letters(llm: Any) -> None:
    vocabulary, spelled = Vocabulary(llm), "he said </s> and <s><unk></s>"
    tokens = vocabulary.encode(vocabulary.shield(spelled), first=False)
    assert not {0, 1, 2} & set(tokens)
    assert b"".join(map(vocabulary.piece, tokens)).decode() == spelled
    # the template's own are what they are
    assert vocabulary.encode("a</s>", first=False)[-1] == 2
    # nor can a message bring one about by hiding it in another, or in our own marks
    for sly in ("<</s>/s>", "\ue0002\ue001", "\ue000</s>2\ue001", "\ue00099999999999\ue001"):
        assert not {0, 1, 2} & set(vocabulary.encode(vocabulary.shield(sly), first=False))
    session = ChatSession(llm, documents=["a book with </s> in it"], store=False, **GREEDY)
    session.ask("what is </s>?")
    assert [token for piece in session._transcript.pieces for token in piece.tokens].count(2) == 0


def test_a_template_is_followed(tmp_path: Path) -> None:
    llm = with_template(tmp_path, CHATML)
    session = ChatSession(llm, " be brief ", store=False, **GREEDY)
    answer = session.ask(" one ")
    assert session._transcript.pieces[0].text == "<|system|>be brief</s><|user|>one</s><|assistant|>"
    assert session._transcript.pieces[0].tokens.count(2) == 2
    session.ask("two")
    # the template trims the answer; what the model wrote is kept as it was
    assert "".join(piece.text for piece in session._transcript.pieces).startswith(
        f"<|system|>be brief</s><|user|>one</s><|assistant|>{answer}</s><|user|>two"
    )
    assert session.reading.held == session.reading.total - session.reading.read > 0
    llm.close()


@pytest.mark.parametrize("template", [NO_SYSTEM, DEAF])
def test_a_template_without_system(tmp_path: Path, template: str) -> None:
    llm = with_template(tmp_path, template)
    session = ChatSession(llm, "be brief", ["a book"], store=False, **GREEDY)
    session.ask("one")
    assert "be brief\n\na book\n\none" in session._transcript.pieces[0].text
    session.ask("two")
    assert "".join(piece.text for piece in session._transcript.pieces).count("be brief") == 1
    llm.close()


@pytest.mark.parametrize(
    ("template", "why"),
    [(None, "has no chat template"), ("{{ 1 / 0 }}", "does not work"),
     ("{{ ''.__class__.__mro__ }}", "does not work")],
)  # fmt: skip
def test_plain_lines_where_there_is_no_template(tmp_path: Path, template: str | None, why: str) -> None:
    llm, notes = with_template(tmp_path, template), list[str]()
    session = ChatSession(llm, "be brief", store=False, on_note=notes.append, **GREEDY)
    assert why in notes[0]
    answer = session.ask("one")
    session.ask("two")
    text = "".join(piece.text for piece in session._transcript.pieces)
    assert text.startswith(f"be brief\n\nUser: one\n\nAssistant:{answer}\n\nUser: two\n\nAssistant:")
    assert "\nUser:" in session._template.stops
    with pytest.warns(UserWarning, match=why):
        ChatSession(llm, store=False)
    llm.close()


def test_a_template_that_fails_later(tmp_path: Path) -> None:
    llm = with_template(tmp_path, "{% if messages | length > 2 %}{{ raise_exception('too \x1b many') }}{% endif %}a:")
    session = ChatSession(llm, store=False, **GREEDY)
    session.ask("one")
    with pytest.raises(Refused, match="cannot be used") as caught:
        session.say("two")
    assert "too \\e many" in caught.value.why
    assert len(session.messages) == 2
    llm.close()


def test_a_template_is_asked_for_the_answer(llm: Any) -> None:
    prompt = ChatTemplate(llm).render([{"role": "user", "content": "one"}])
    assert prompt == "user: one\nassistant:"


def test_pieces_of_a_transcript(llm: Any) -> None:
    vocabulary = Vocabulary(llm)
    first = Transcript(vocabulary).for_prompt("u: the\na:")
    first.add(" hen ", [5, 6])
    assert [piece.text for piece in first.for_prompt("u: the\na: hen \nu: x").pieces] == [
        "u: the\na:",
        " hen ",
        "\nu: x",
    ]
    trimmed = first.for_prompt("u: the\na:hen\nu: x")
    assert trimmed.pieces[1].tokens == (5, 6)
    assert trimmed.pieces[2].text == "\nu: x"
    assert [piece.text for piece in first.for_prompt("u: the\na:").pieces] == ["u: the\na:"]
    other = first.for_prompt("u: the\na: cow")
    assert [piece.text for piece in other.pieces] == ["u: the\na:", " cow"]
    assert first.for_prompt("u: a").pieces[0].tokens == tuple(vocabulary.encode("u: a", first=True))
    again = Transcript.from_json(vocabulary, first.to_json())
    assert again.pieces == first.pieces
    assert Piece("a", (1,)) != Piece("a", (1,), written=True)
    wrong: list[object] = [None, {}, [1], [{"text": 1, "tokens": [], "written": False}]]
    wrong += [[{"text": "a", "tokens": [token], "written": True}] for token in (True, -1, 300, "1")]
    for bad in (*wrong, [{"text": "a", "tokens": [5]}]):
        assert Transcript.from_json(vocabulary, bad).pieces == []


@pytest.mark.parametrize("text", ["naïve 日本語 🦔", "\ud7ff", "ab\nUser", "a\nUser:b", "\nUser: x"])
def test_any_split_streams_the_same(text: str) -> None:
    data, whole = text.encode(), text.split("\nUser:")[0]
    for size in range(1, len(data) + 1):
        stream = Stream(["\nUser:"])
        shown = [stream.push(data[at : at + size]) for at in range(0, len(data), size)]
        shown.append(stream.push(b"", last=True))
        assert "".join(shown) == stream.text == whole
        assert stream.whole == text
        assert stream.cut == ("\nUser:" in text)


def test_bytes_that_are_no_text() -> None:
    stream = Stream()
    assert stream.push(b"a\xf0\x9f") == "a"
    assert stream.push(b"b") == "\ufffdb"
    assert stream.push(b"\xe6", last=True) == "\ufffd"
    assert stream.text == "a\ufffdb\ufffd"


def test_an_answer_in_bytes_is_text(llm: Any) -> None:
    """Most tokens of this vocabulary are single bytes: an answer is full of broken characters, and still one text."""
    session = ChatSession(llm, store=False, temp=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, n_predict=200)
    pieces = list(session.say("one"))
    data = b"".join(map(session.vocabulary.piece, session._transcript.pieces[-1].tokens))
    assert "".join(pieces) == session.messages[-1]["content"] == data.decode("utf-8", "replace")
    used = session.tokens_used
    assert used > 100
    session.ask("two", n_predict=1)
    assert session.reading.held >= used - 1


def test_an_encoder_cannot_chat(tmp_path: Path) -> None:
    llm = open_small(tiny.make(tmp_path / "e.gguf", "eurobert", n_ctx=256), embedding=True)
    with pytest.raises(MrropeError, match="cannot chat"):
        Memory(llm)
    llm.close()
