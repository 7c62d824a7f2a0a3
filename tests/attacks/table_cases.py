"""Extended files whose own records lie: the table in the mrrope keys, and the undo record for revert."""

from __future__ import annotations

import base64
import json
import zlib
from math import inf, nan
from typing import Any

from tests.attacks.case import READS, Accepts, Answer, Attack, Refuses
from tests.attacks.sound import N_CTX, Parts, f32, llama
from tests.gguf_bytes import ARRAY, F32, STRING, U32, array, string, strings, u32

CASES: dict[str, Attack] = {}
PREFIX = "llama.rope.scaling.mrrope."
UNDO = f"{PREFIX}undo"
NO_UNDO = Accepts("the undo record is for revert and extend")
REPLACED = Accepts("extend replaces the table, whatever it was")
NO_TABLE = Accepts("the table plays no part in memory")
STOCK = Accepts("stock reads rope_freqs.weight, not our keys; the patched engine refuses them")
MIB = 1 << 20


def extended() -> Parts:
    """The sound model with a table of S = 2 that any llama.cpp reads; an undo record is for the caller to add."""
    parts = llama()
    parts.put("llama.context_length", U32, u32(2 * N_CTX))
    parts.put("llama.rope.scaling.original_context_length", U32, u32(N_CTX))
    parts.put(f"{PREFIX}version", U32, u32(1))
    parts.put(f"{PREFIX}method", STRING, string("custom"))
    parts.put(f"{PREFIX}scale", F32, f32(2.0))
    parts.put(f"{PREFIX}attn_factor", F32, f32(1.0))
    parts.put(f"{PREFIX}radix", ARRAY, array(F32, 8, f32(*[1.0] * 7, 2.0)))
    tensors = {"rope_freqs.weight": ((8,), 0, f32(*[1.0] * 8)), **parts.tensors}
    parts.tensors = tensors
    return parts


def undo(name: str, text: str | bytes, kind: int = STRING, origin: str = "") -> None:
    parts = extended()
    parts.put(UNDO, kind, string(text) if kind == STRING else text if isinstance(text, bytes) else b"")
    at = Refuses(parts.offset(UNDO) + 8 + len(UNDO) + 4 + (12 if kind == ARRAY else 0), "mrrope.undo")
    told = Accepts("inspect describes the file and says that revert cannot", "revert` cannot restore the original")
    answers: dict[str, Answer] = {
        "inspect": told,
        "extend": at,
        "extend --in-place": at,
        "fit": NO_UNDO,
        "chat": NO_UNDO,
    }
    note = "the record is ours: stock skips a key it does not know"
    CASES[f"undo-{name}"] = Attack(f"undo-{name}", "table", {"m.gguf": parts.data}, answers, origin=origin, note=note)


def packed(rules: Any, literals: bytes = b"") -> str:
    return base64.b64encode(zlib.compress(json.dumps(rules).encode() + b"\0" + literals, 9)).decode()


def rules(**changes: Any) -> dict[str, Any]:
    """A record of the right form for the extended file; its sha256 fits nothing."""
    parts = extended()
    good: dict[str, Any] = {
        "v": 1, "size": 0, "sha256": "0" * 64, "n_kv": len(parts.kvs), "n_tensors": len(parts.tensors),
        "kv": [[0, 0, len(parts.kvs)]], "inserted": 0, "shift": 0, "gap": [0, 0], "rows": [], "data": [],
    }  # fmt: skip
    return good | changes


def add_undo() -> None:
    undo("u32", u32(1), U32)
    undo("array", strings("a"), ARRAY)
    undo("empty", "")
    undo("not-base64", "!" * 40)
    undo("not-ascii", "\u00e9" * 40)
    undo("not-zlib", base64.b64encode(b"plain" * 9).decode())
    undo("cut-off", packed(rules())[:40])
    undo("zlib-bomb", base64.b64encode(zlib.compress(bytes(300 * MIB), 9)).decode(), origin="decompression bomb")
    undo("json-bomb", packed({"kv": [[0, 0, 1]] * 200_000}), origin="decompression bomb")
    undo("json-nested", base64.b64encode(zlib.compress(b"[" * 900_000 + b"\0")).decode(), origin="stack exhaustion")
    undo("json-number", packed(7))
    undo("unknown-rule", packed(rules() | {"evil": 1}))
    undo("no-version", packed({k: v for k, v in rules().items() if k != "v"}))
    undo("sha256-wrong", packed(rules()))
    undo("copies-without-end", packed(rules(kv=[[0, 0, 20]] * 50_000)), origin="amplification")
    undo("record-2^62", packed(rules(kv=[[0, 2**62, 1]])))
    undo("record-negative", packed(rules(kv=[[0, -1, 5]])))
    undo("literal-2^62", packed(rules(kv=[[2, 2**62]])))
    undo("literal-negative", packed(rules(kv=[[2, -1]])))
    undo("shift-2^63", packed(rules(shift=2**63)))
    undo("shift-negative", packed(rules(shift=-(2**40))))
    undo("gap-2^62", packed(rules(gap=[2**62, 0])))
    undo("gap-string", packed(rules(gap="x")))
    undo("inserted-2^62", packed(rules(inserted=2**62)))
    undo("n_kv-negative", packed(rules(n_kv=-1)))
    undo("rows-2^40", packed(rules(rows=[["blk.{}.attn_q.weight", [[0, 2**40]], 1, 2, 2**40]])))


def table(name: str, word: str, kind: int, value: bytes) -> None:
    """A table that cannot be read: inspect says so, and the patched engine refuses it (tests/test_engine_bad.py)."""
    parts = extended()
    parts.put(PREFIX + word, kind, value)
    key = PREFIX + word
    at = Refuses(parts.offset(key), key)
    reads = dict.fromkeys(READS, REPLACED) | {"fit": NO_TABLE, "chat": STOCK}
    answers: dict[str, Answer] = {**reads}
    if word == "base_factors":  # without which no table can be made
        answers = dict.fromkeys(READS, at)
    CASES[f"table-{name}"] = Attack(
        f"table-{name}", "table", {"m.gguf": parts.data},
        {"inspect": Accepts("inspect describes any sound GGUF and names the record", at.words[:-2]), **answers},
        note="the table is ours: stock skips a key it does not know",
    )  # fmt: skip


def add_tables() -> None:
    table("radix-short", "radix", ARRAY, array(F32, 7, f32(*[1.0] * 7)))
    table("radix-long", "radix", ARRAY, array(F32, 100_000, f32(1.0) * 100_000))
    table("radix-strings", "radix", ARRAY, strings(*["1"] * 8))
    table("radix-scalar", "radix", F32, f32(1.0))
    for name, value in {"nan": nan, "inf": inf, "0": 0.0, "negative": -1.0}.items():
        table(f"radix-{name}", "radix", ARRAY, array(F32, 8, f32(*[1.0] * 7, value)))
        table(f"scale-{name}", "scale", F32, f32(value))
        table(f"attn_factor-{name}", "attn_factor", F32, f32(value))
    table("method-u32", "method", U32, u32(4))
    table("base_factors-nan", "base_factors", ARRAY, array(F32, 8, f32(*[nan] * 8)))


for _add in (add_undo, add_tables):
    _add()
