"""Undo records as long as they may be, in files of as many tensors: every tensor looked up in every rule took hours."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import Any

from tests.attacks.case import Accepts, Answer, Attack, Refuses, Says
from tests.attacks.sound import Parts
from tests.attacks.table_cases import NO_UNDO, UNDO, extended, packed, rules
from tests.gguf_bytes import STRING, string

CASES: dict[str, Attack] = {}
TENSORS = 8_000  # a header may hold eight times as many, over which llama.cpp itself would take ten seconds
HASH = 2**61 - 1  # Python's hash of its multiples is 0


def tensors(n: int, dims: tuple[int, ...] = (0, 1)) -> Parts:
    """The extended model and n tensors a0, a1, ... without data."""
    parts = extended()
    parts.tensors.update({f"a{i}": (dims, 0, b"") for i in range(n)})
    return parts


def add(name: str, parts: Parts, record: str) -> None:
    parts.put(UNDO, STRING, string(record))
    at = Refuses(parts.offset(UNDO) + 8 + len(UNDO) + 4, "mrrope.undo")
    told = Accepts("inspect describes the file and says that revert cannot", "revert` cannot restore the original")
    answers: dict[str, Answer] = {"inspect": told, "extend": at, "extend --in-place": at, "fit": NO_UNDO}
    answers["chat"] = Says("llama.cpp could not open it", "the words are llama.cpp's own")
    if len(parts.tensors) < TENSORS:
        answers["chat"] = NO_UNDO
    note = "the record is ours: stock skips a key it does not know" if answers["chat"] is NO_UNDO else ""
    name = f"undo-{name}"
    CASES[name] = Attack(name, "table", {"m.gguf": parts.data}, answers, origin="quadratic time", note=note)


def rows(parts: Parts, moved: Iterable[Any]) -> str:
    return packed(rules(n_tensors=len(parts.tensors), rows=list(moved)))


def add_rows() -> None:
    many, wide = tensors(TENSORS), tensors(TENSORS, (0, 2**16))
    add("rules-40000", many, rows(many, ([f"b{i}", [], 1, 2, 2] for i in range(40_000))))
    many = tensors(TENSORS)
    add("rules-16384", many, rows(many, ([f"b{i}", [[0, 1]], 1, 2, 2] for i in range(2**14))))
    many = tensors(TENSORS)
    add("ranges-90000", many, rows(many, [["a{}", [[-2, -2]] * 90_000, 1, 2, 2]]))
    many = tensors(TENSORS)
    add("ranges-16384", many, rows(many, [["a{}", [[4 * i, 4 * i + 2] for i in range(2**14)], 1, 2, 2]]))
    add("heads-of-65536-rows", wide, rows(wide, [["a{}", [[0, TENSORS]], 1, 2**15, 2**16]]))
    wide = tensors(TENSORS, (0, 2**16))
    own = (["a{}", [[i, i]], 1, 2 * i + 2, 2**16] for i in range(2**14))
    add("heads-of-65536-rows-each", wide, rows(wide, own))


def add_json() -> None:
    add("names-of-one-hash", extended(), packed(rules(data=[[i * HASH, 0] for i in range(40_000)])))
    one = tensors(0)
    add("rules-of-one-hash", one, rows(one, ([i * HASH, [], 1, 2, 2] for i in range(2**14))))
    digits = b'{"v":1,"size":' + b"1" * 1_000_000 + b"}\0"  # quadratic, where Python does not refuse by itself (3.10)
    add("number-of-10^6-digits", extended(), base64.b64encode(zlib.compress(digits)).decode())


for _add in (add_rows, add_json):
    _add()
