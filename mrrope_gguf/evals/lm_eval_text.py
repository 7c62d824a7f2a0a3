"""Text to tokens and back as lm-evaluation-harness wants it, from a llama_cpp.Llama's own vocabulary and template."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from .. import engine
from ..errors import Refused
from ..text import printable

TEMPLATE = "tokenizer.chat_template"
Messages = list[dict[str, str]]


class Vocabulary:
    """The vocabulary of a model, with the conventions of Hugging Face tokenizers that the harness counts on.

    Names of control tokens in a text become those tokens. add_bos: whether texts begin with BOS; None is the file's
    own word. `name` is the model's, for errors.
    """

    def __init__(self, llm: Any, name: str, add_bos: bool | None = None) -> None:
        self._llm, self._name = llm, name
        self._api = engine.llama_cpp()
        self._vocab = self._api.llama_model_get_vocab(llm.model)
        self.bos: int = self._api.llama_vocab_bos(self._vocab)
        self.eos: int = self._api.llama_vocab_eos(self._vocab)
        self._adds = self._api.llama_vocab_get_add_bos(self._vocab) if add_bos is None else add_bos
        self.template: str | None = llm.metadata.get(TEMPLATE)

    @property
    def prefix(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none. Raises Refused without either."""
        if self.bos < 0 and self.eos < 0:
            raise Refused(
                f"{self._name}: nothing can stand before a text without context",
                why="its vocabulary has neither BOS nor EOS",
                fix="leave out tasks with empty contexts and rolling likelihoods",
            )
        return self.bos if self.bos >= 0 else self.eos

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """The tokens of a text. bos: begin with BOS as the model's texts do, or not at all; None adds no second one."""
        tokens = list(self._llm.tokenize(text.encode(errors="replace"), add_bos=False, special=True))
        wanted = self._adds and bos is not False and self.bos >= 0
        twice = bos is None and tokens[:1] == [self.bos]
        return [self.bos, *tokens] if wanted and not twice else tokens

    def piece(self, token: int, control: bool = False) -> bytes:
        """A token as UTF-8, which may be part of a character; a control token is empty, or its name with `control`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._api.llama_token_to_piece(self._vocab, token, buffer, size, 0, control)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without control tokens. What is not UTF-8 becomes U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode(errors="replace")

    def chat_template(self) -> str:
        """The file's own template. Raises Refused where it has none."""
        if not self.template:
            raise Refused(
                f"{self._name}: there is no chat template to apply",
                why=f"the file has no {TEMPLATE}, as base models have none",
                fix="leave out --apply-chat-template (in Python: apply_chat_template=True)",
            )
        return self.template

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """A conversation as the text the model was trained on, by the file's template in Jinja's sandbox.

        Without add_generation_prompt the last message is one to go on with: the text ends where its content does.
        A template that refuses a system message is given the rest, as the harness does. Raises Refused where there is
        no template, or where it fails.
        """
        try:
            return self._render(messages, add_generation_prompt)
        except Refused:
            rest = [message for message in messages if message["role"] != "system"]
            if len(rest) in (0, len(messages)):
                raise
            return self._render(rest, add_generation_prompt)

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        bos, eos = (self.piece(token, True).decode(errors="replace") if token >= 0 else "" for token in self._ends())
        template = self.chat_template()
        try:
            formatter = Jinja2ChatFormatter(template, eos, bos, add_generation_prompt)
            text = str(formatter(messages=messages).prompt)
        except (TemplateError, ValueError, TypeError) as error:
            raise Refused(
                f"{self._name}: its chat template could not be applied",
                why=f"{type(error).__name__}: {printable(str(error))}",
                fix="leave out --apply-chat-template, or the system prompt and examples that it does not take",
            ) from error
        return text if add_generation_prompt else _open(text, messages[-1]["content"])

    def _ends(self) -> tuple[int, int]:
        return self.bos, self.eos


def _open(text: str, content: str) -> str:
    """A rendered conversation up to the end of its last message, which a template may have stripped.

    >>> _open("user: hi\\nassistant: The answer is\\n", "The answer is ")
    'user: hi\\nassistant: The answer is'
    """
    at = text.rfind(content.strip())
    return text if at < 0 else text[: at + len(content.strip())]


class Until:
    """A condition for trie.Prompt.stop: the text so far, names of control tokens included, holds one of `stops`."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._stops = [stop.encode(errors="replace") for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._tail = b""

    def __call__(self, said: Sequence[int]) -> bool:
        before = b"" if len(said) == 1 else self._tail
        text = before + self._vocabulary.piece(said[-1], control=True)
        self._tail = text[-self._longest :]
        return any(stop in text for stop in self._stops)
