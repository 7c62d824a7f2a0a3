"""A conversation as the model has read it, text and tokens, so that the same text is always the same tokens.

Text that a model wrote seldom is cut into the tokens it was written with when it is tokenised again. Here what was read
or written keeps its tokens for as long as a prompt begins with its text, and only the rest is tokenised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import engine

if TYPE_CHECKING:
    from llama_cpp import Llama

# enum llama_token_attr: tokens that text may name only in a template
_UNKNOWN, _CONTROL = 1, 8
_SPM = 1  # enum llama_vocab_type
_OPEN, _CLOSE = "\ue000", "\ue001"  # around the number of a control token whose name a message spells out
_SPACE = re.compile(r"\s*")
_MARK = "\x01"  # no piece of a SentencePiece vocabulary has it


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt, as `Vocabulary.shield` left it, or (written) an answer, and its tokens."""

    text: str
    tokens: tuple[int, ...]
    written: bool = False

    def end(self, prompt: str, at: int) -> int:
        """Where this piece ends if `prompt` goes on with it at `at`, else -1.

        Templates trim an answer, or put a space before it, that was none when the model wrote it: its own tokens hold.
        """
        if prompt.startswith(self.text, at):
            return at + len(self.text)
        core, space = self.text.strip(), _SPACE.match(prompt, at)
        if self.written and core and space and prompt.startswith(core, space.end()):
            return space.end() + len(core)
        return -1


class Vocabulary:
    """Text to tokens and back. A message that spells out a control token is read as the letters it consists of."""

    def __init__(self, llm: Llama) -> None:
        self._api = engine.llama_cpp().llama_cpp
        self._vocab = llm._model.vocab
        self.n_vocab: int = llm.n_vocab()
        self._add_bos = bool(self._api.llama_vocab_get_add_bos(self._vocab))
        bos = self._api.llama_vocab_bos(self._vocab)
        self._bos_text = self._name(bos) if bos >= 0 else ""
        self._spm = self._api.llama_vocab_type(self._vocab) == _SPM

    def shield(self, text: str) -> str:
        """Text of a message in which the names of control tokens are out of the template's and tokeniser's reach."""
        if self._names is None:
            return text
        return self._names.sub(lambda match: f"{_OPEN}{self._controls[match[0]]}{_CLOSE}", text)

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Tokens of a prompt with shielded messages; `first`: it begins the conversation, so BOS goes before it."""
        tokens: list[int] = []
        parts = re.split(f"{_OPEN}([0-9]{{1,9}}){_CLOSE}", text)
        if first and self._add_bos and not (self._bos_text and text.startswith(self._bos_text)):
            tokens.append(int(self._api.llama_vocab_bos(self._vocab)))
        plain, special = parts[0], True
        for part in parts[1:]:
            # what stands between two template texts is tokenised by itself
            tokens += self._tokenize(plain, special=special, after=not first)
            first = first and not plain
            plain = self._spelled(part) if special else part
            special = not special
        return tokens + self._tokenize(plain, special=special, after=not first)

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for in an answer; none for a control token."""
        import ctypes

        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = int(self._api.llama_token_to_piece(self._vocab, token, buffer, size, 0, False))
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def ends(self, token: int) -> bool:
        """Whether a token ends the answer."""
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def _spelled(self, number: str) -> str:
        """The name of a control token by its number; what is none, a message had written itself."""
        return self._by_number.get(int(number), f"{_OPEN}{number}{_CLOSE}")

    def _tokenize(self, text: str, *, special: bool, after: bool) -> list[int]:
        if not text:
            return []
        # SentencePiece puts a space before a text; where a text goes on, a mark takes it and is taken off again
        mark = self._mark if after and self._spm else []
        found = self._raw((_MARK if mark else "") + text, special)
        if mark and found[: len(mark)] != mark:
            return self._raw(text, special)
        return found[len(mark) :]

    @cached_property
    def _mark(self) -> list[int]:
        return self._raw(_MARK, False)

    def _raw(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:
            tokens = (self._api.llama_token * size)()
            n = int(self._api.llama_tokenize(self._vocab, data, len(data), tokens, size, False, special))
            if n >= 0:
                return list(tokens[:n])
            size = -n

    def _name(self, token: int) -> str:
        return str(self._api.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))

    @cached_property
    def _controls(self) -> dict[str, int]:
        attr, vocab, wanted = self._api.llama_vocab_get_attr, self._vocab, _UNKNOWN | _CONTROL
        found = {self._name(token): token for token in range(self.n_vocab) if attr(vocab, token) & wanted}
        return {name: token for name, token in found.items() if name}

    @cached_property
    def _by_number(self) -> dict[int, str]:
        return {token: name for name, token in self._controls.items()}

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        names = sorted(self._controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None


class Transcript:
    """The pieces of a conversation so far, in order."""

    def __init__(self, vocabulary: Vocabulary, pieces: Iterable[Piece] = ()) -> None:
        self.vocabulary = vocabulary
        self.pieces = list(pieces)

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    def for_prompt(self, prompt: str) -> Transcript:
        """The transcript of a prompt: pieces it begins with as they are, then the rest of it as one new piece."""
        kept, at = [], 0
        for piece in self.pieces:
            end = piece.end(prompt, at)
            if at == len(prompt) or end < 0:
                break
            kept.append(piece)
            at = end
        if at < len(prompt):
            kept.append(Piece(prompt[at:], tuple(self.vocabulary.encode(prompt[at:], first=at == 0))))
        return Transcript(self.vocabulary, kept)

    def add(self, text: str, tokens: Sequence[int]) -> None:
        """Put the answer to a prompt behind it."""
        self.pieces.append(Piece(self.vocabulary.shield(text), tuple(tokens), written=True))

    def through(self, n: int) -> list[int]:
        """The tokens up to the n-th answer that the model wrote; none where there are fewer of them."""
        for i, piece in enumerate(self.pieces, 1):
            n -= piece.written
            if piece.written and not n:
                return [token for one in self.pieces[:i] for token in one.tokens]
        return []

    def to_json(self) -> list[dict[str, Any]]:
        return [{**vars(piece), "tokens": list(piece.tokens)} for piece in self.pieces]

    @classmethod
    def from_json(cls, vocabulary: Vocabulary, values: object) -> Transcript:
        """What to_json made; an empty transcript of anything else."""
        try:
            pieces = [
                Piece(_text(value["text"]), _tokens(value, vocabulary.n_vocab), bool(value["written"]))
                for value in _list(values)
            ]
        except (KeyError, TypeError, ValueError):
            pieces = []
        return cls(vocabulary, pieces)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _list(values: object) -> list[Mapping[str, object]]:
    if not isinstance(values, list):
        raise TypeError("no list")
    return values


def _tokens(value: Mapping[str, object], n_vocab: int) -> tuple[int, ...]:
    tokens = value["tokens"]
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < n_vocab for token in tokens):
        raise ValueError("no tokens of this model")
    return tuple(tokens)
