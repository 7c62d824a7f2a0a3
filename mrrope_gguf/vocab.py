"""A model's vocabulary alone: tokens are counted in a fraction of a second, before any weight is read."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from . import engine
from .errors import BadFile, EngineTrouble
from .gguf.index import KV, GGUFIndex, open_gguf, open_split
from .gguf.source import require_no_journal
from .gguf.types import ValueType
from .text import printable

_CHUNK, _OVERLAP = 1 << 14, 13  # bytes read at once, and one less than the longest token looked for
_MOST_KEYS = 4096  # models have about fifty
# a token is its length in 8 bytes and its text; after a first byte looked ahead, as one may lie within another
_SPELLED = re.compile(rb"\x06(?=\0{7}<0x([0-9A-F]{2})>)")
_ITSELF = re.compile(rb"\x01(?=\0{7}(.))", re.DOTALL)
_CHAT = "take a file that a text model was converted to"


class Tokenizer(Protocol):
    """What counts tokens: a Vocab or a llama_cpp.Llama."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...


class Vocab:
    """The vocabulary of a GGUF file, loaded without its weights. A context manager; `close` gives it up.

    SmolLM2's (49152 tokens) takes 0.1 s, Gemma 3's (262144) 0.7 s.
    Raises EngineTrouble where there is no libllama or it cannot open the file, FileTrouble, BadFile.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        require_no_journal(Path(path))
        path = open_split(path)[0]
        with open_gguf(path) as index:
            check(index)
        self._api = api = engine.llama_cpp().llama_cpp
        with engine.capture() as log:
            api.llama_backend_init()
            params = api.llama_model_default_params()
            params.vocab_only = True
            self._model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise EngineTrouble(
                f"{printable(Path(path).name)}: llama.cpp could not read its vocabulary",
                why=log.why(),
                fix="`mrrope inspect` checks the file",
            )
        self._vocab = api.llama_model_get_vocab(self._model)
        if api.llama_vocab_type(self._vocab) == api.LLAMA_VOCAB_TYPE_NONE:
            self.close()
            name = printable(Path(path).name)
            raise EngineTrouble(f"{name}: the file has no tokenizer", why="tokenizer.ggml.model says none", fix=_CHAT)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """The tokens of UTF-8 text; with `special`, names of control tokens in it become those tokens."""
        n = self.count(text, add_bos, special)
        tokens = (ctypes.c_int32 * n)()
        found = self._api.llama_tokenize(self._vocab, text, len(text), tokens, n, add_bos, special)
        return list(tokens[:found])

    def count(self, text: bytes, add_bos: bool = True, special: bool = False) -> int:
        """How many tokens `tokenize` gives, in half the time and without making them."""
        return _count(self._api, self._vocab, text, add_bos, special)

    def close(self) -> None:
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Vocab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(index: GGUFIndex) -> None:
    """Raise BadFile for a vocabulary with which llama.cpp would load, and end the process at the first text.

    Also for more metadata records than llama.cpp reads in a second: it compares each key with all before it.
    """
    if len(index.kvs) > _MOST_KEYS:
        raise BadFile(
            f"{printable(index.path.name)}: the file holds more metadata than any model",
            why=f"{len(index.kvs)} records, at most {_MOST_KEYS}; llama.cpp would compare each with all others",
            fix="convert or download the model again",
            offset=16,
            field="n_kv",
        )
    tokens, embedding = index.find("tokenizer.ggml.tokens"), index.tensors.get("token_embd.weight")
    if tokens is None or tokens.item_type is not ValueType.STRING:
        return  # llama.cpp says what is wrong, if anything is
    if embedding is not None and len(embedding.dims) > 1 and tokens.count != embedding.dims[1]:
        raise _bad(index, tokens, f"it holds {tokens.count} tokens, and token_embd.weight {embedding.dims[1]} rows")
    if index.get("tokenizer.ggml.model", most=0) == "llama":
        missing = _missing_byte(index, tokens)
        if missing is not None:
            raise _bad(index, tokens, f"it has no token for byte 0x{missing:02X}, at which llama.cpp ends the process")


def _missing_byte(index: GGUFIndex, tokens: KV) -> int | None:
    """A byte that is no token, neither as <0x41> nor as itself: a SentencePiece vocabulary falls back on bytes."""
    wanted = set(range(256))
    for pattern, base in ((_SPELLED, 16), (_ITSELF, 0)):
        # they stand near the beginning, so that reading all of a large vocabulary is the exception
        for at in range(tokens.value, tokens.end, _CHUNK):
            text = bytes(index.raw(at, min(at + _CHUNK + _OVERLAP, tokens.end)))
            wanted.difference_update(int(found, base) if base else found[0] for found in set(pattern.findall(text)))
            if not wanted:
                return None
    return min(wanted)


def _bad(index: GGUFIndex, tokens: KV, why: str) -> BadFile:
    return BadFile(
        f"{printable(index.path.name)}: llama.cpp could not use this vocabulary",
        why=why,
        fix="convert or download the model again",
        offset=tokens.start,
        field=tokens.key,
    )


def counter(tokenizer: Tokenizer) -> Callable[[bytes], int]:
    """A function that counts the tokens of ordinary text, without BOS, the fastest way the tokenizer has."""
    if isinstance(tokenizer, Vocab):
        return partial(tokenizer.count, add_bos=False, special=False)
    inner = getattr(tokenizer, "_model", None)  # of a Llama, which tokenizes twice whatever is longer than its context
    vocab = getattr(inner, "vocab", None)
    if vocab is not None:
        return partial(_count, engine.llama_cpp().llama_cpp, vocab, add_bos=False, special=False)
    return lambda text: len(tokenizer.tokenize(text, add_bos=False, special=False))


def _count(api: Any, vocab: Any, text: bytes, add_bos: bool, special: bool) -> int:
    """llama_tokenize with room for none says, as a negative number, how many there are."""
    return abs(int(api.llama_tokenize(vocab, text, len(text), None, 0, add_bos, special)))
