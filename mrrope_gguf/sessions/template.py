"""Messages as the text a model was trained on: the chat template of its file, or plain lines where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import engine
from ..errors import Refused
from ..text import printable

if TYPE_CHECKING:
    from llama_cpp import Llama

Message = dict[str, str]

_PROBE = "4f1c2a"


class ChatTemplate:
    """Renders messages to a prompt that the assistant answers.

    `note` says, in a line, what the file's template cannot do, if anything; `stops` are texts that end an answer
    besides the tokens that do.
    """

    def __init__(self, llm: Llama) -> None:
        self.note, self.stops = "", tuple[str, ...]()
        self._formatter = self._of_file(llm)
        if self._formatter is None:
            self.stops = ("\nUser:",)
        self._takes_system = self._shows_system()

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt. Raises Refused where the template does, with its words."""
        given = list(messages) if self._takes_system else _folded(messages)
        if self._formatter is None:
            return _plain(given)
        try:
            return str(self._formatter(messages=given).prompt)
        except Exception as error:  # a template is a program: it may fail in any way
            raise Refused(
                "the chat template of this model's file cannot be used",
                why=printable(f"{type(error).__name__}: {error}"),
                fix="load a file with another template, or remove it (tokenizer.chat_template)",
            ) from None

    def _of_file(self, llm: Llama) -> Any:
        text = llm.metadata.get("tokenizer.chat_template")
        if not text:
            self.note = "the file has no chat template: messages are given as plain lines, 'User:' and 'Assistant:'"
            return None
        from .. import chat_jinja  # jinja2 comes with llama-cpp-python

        chat_jinja.bind(engine.llama_cpp())
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            formatter = Jinja2ChatFormatter(text, eos_token=_text(llm, "eos"), bos_token=_text(llm, "bos"))
            formatter(messages=[{"role": "user", "content": _PROBE}])
        except Exception as error:
            self.note = f"the file's chat template does not work ({printable(str(error))}): messages are plain lines"
            return None
        return formatter

    def _shows_system(self) -> bool:
        """Whether a system message reaches the prompt; some templates raise, and some leave it out."""
        self._takes_system = True
        try:
            return _PROBE in self.render([{"role": "system", "content": _PROBE}, {"role": "user", "content": "1"}])
        except Refused:
            return False


def _folded(messages: Sequence[Message]) -> list[Message]:
    """The system's words at the head of the first user message."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, first = messages[0]["content"], messages[1]
    return [{**first, "content": f"{system}\n\n{first['content']}"}, *messages[2:]]


def _plain(messages: Sequence[Message]) -> str:
    lines = []
    for message in messages:
        name = {"user": "\nUser: ", "assistant": "\nAssistant:"}.get(message["role"], "")
        lines.append(f"{name}{message['content']}\n")
    return "".join(lines).lstrip("\n") + "\nAssistant:"


def _text(llm: Llama, name: str) -> str:
    token = llm.token_eos() if name == "eos" else llm.token_bos()
    return str(llm._model.token_get_text(token)) if token >= 0 else ""
