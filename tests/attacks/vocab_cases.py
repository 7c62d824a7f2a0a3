"""Vocabularies that lie. Only chat hands one to llama.cpp; extend copies it as bytes, inspect and fit never look."""

from __future__ import annotations

from tests.attacks.case import Accepts, Answer, Attack, Refuses, Says
from tests.attacks.sound import PIECES, Parts, f32, i32, llama
from tests.gguf_bytes import ARRAY, F32, F64, I32, STRING, U8, U32, array, string, strings, u32

CASES: dict[str, Attack] = {}
N = len(PIECES)
COPIED = Accepts("a vocabulary is copied as bytes, never read")
LOADS = Says("llama.cpp could not read its vocabulary", "the words are llama.cpp's own")
UNCHECKED = "token array read without an element-type check"
TOKENS = "tokenizer.ggml.tokens"


def add(name: str, parts: Parts, chat: Answer, origin: str = "", note: str = "") -> None:
    answers = {"inspect": COPIED, "extend": COPIED, "extend --in-place": COPIED, "fit": COPIED, "chat": chat}
    assert name not in CASES, name
    CASES[name] = Attack(name, "vocabulary", {"m.gguf": parts.data}, answers, origin=origin, note=note)


def lie(name: str, key: str, kind: int, value: bytes, chat: Answer = LOADS, origin: str = "", note: str = "") -> None:
    parts = llama()
    parts.put(f"tokenizer.ggml.{key}", kind, value)
    add(name, parts, chat, origin, note)


def blamed(parts: Parts) -> Refuses:
    return Refuses(parts.offset(TOKENS), TOKENS)


def add_tokens() -> None:
    lie("tokens-u32", "tokens", ARRAY, array(U32, N, u32(1) * N), origin=UNCHECKED)
    lie("tokens-u8", "tokens", ARRAY, array(U8, N, b"\1" * N), origin=UNCHECKED)
    lie("tokens-string", "tokens", STRING, string("x"))
    for name, pieces in {"empty": [], "one": ["a"], "one-fewer": PIECES[:-1], "one-more": [*PIECES, "zz"]}.items():
        parts = llama()
        parts.put(TOKENS, ARRAY, strings(*pieces))
        add(f"tokens-{name}", parts, blamed(parts))
    parts = llama()
    del parts.kvs[TOKENS]
    add("tokens-missing", parts, LOADS)
    for name, kept in {"without-bytes": 0, "without-bytes-but-newline": 1}.items():
        parts = llama()
        spared = range(13, 13 + kept)  # <0x0A>, which llama.cpp asks for as it loads
        pieces = [piece if i < 3 or i in spared else f"t{i}" for i, piece in enumerate(PIECES)]
        parts.put(TOKENS, ARRAY, strings(*pieces))
        parts.put("tokenizer.ggml.token_type", ARRAY, array(I32, N, i32(*[1] * N)))
        add(f"tokens-{name}", parts, blamed(parts))


def add_companions() -> None:
    lie("scores-strings", "scores", ARRAY, strings(*["a"] * N), origin=UNCHECKED)
    lie("scores-u8", "scores", ARRAY, array(U8, N, b"\1" * N), origin=UNCHECKED)
    lie("scores-f64", "scores", ARRAY, array(F64, N, b"\1" * 8 * N), origin=UNCHECKED)
    lie("scores-short", "scores", ARRAY, array(F32, 1, f32(0.0)))
    lie("scores-scalar", "scores", U32, u32(1))
    lie("token_type-strings", "token_type", ARRAY, strings(*["a"] * N), origin=UNCHECKED)
    lie("token_type-u8", "token_type", ARRAY, array(U8, N, b"\1" * N), origin=UNCHECKED)
    lie("token_type-short", "token_type", ARRAY, array(I32, 1, i32(1)))
    lie("model-u32", "model", U32, u32(1))
    lie("model-unknown", "model", STRING, string("evil"))
    none = Says("the file has no tokenizer", "it is sound, and no chat model")
    lie("model-none", "model", STRING, string("none"), none)
    lie("bos_token_id-string", "bos_token_id", STRING, string("1"))
    parts = llama()
    del parts.kvs["tokenizer.ggml.model"]
    add("model-missing", parts, LOADS)
    parts = llama()
    parts.put("tokenizer.ggml.model", STRING, string("gpt2"))
    parts.put("tokenizer.ggml.merges", ARRAY, array(U32, 4, u32(1) * 4))
    add("merges-u32", parts, LOADS, UNCHECKED)


for _add in (add_tokens, add_companions):
    _add()
