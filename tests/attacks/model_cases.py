"""Sound GGUF files whose headers lie about the model: numbers looped over, divided by, allocated, asserted on."""

from __future__ import annotations

import struct
from math import inf, nan

from tests.attacks.case import READS, Accepts, Answer, Attack, Refuses, Says
from tests.attacks.sound import Parts, f32, i32, llama
from tests.gguf_bytes import ARRAY, F32, F64, I32, STRING, U16, U32, U64, array, string, strings, u32, u64

CASES: dict[str, Attack] = {}
DESCRIBED = "inspect describes any sound GGUF and says why it cannot be extended"
HUGE = 2**32 - 1


def add(
    name: str, parts: Parts, answers: dict[str, Answer], origin: str = "", note: str = "", group: str = "model"
) -> None:
    assert name not in CASES, name
    CASES[name] = Attack(name, group, {"m.gguf": parts.data}, answers, origin=origin, note=note)


def lie(name: str, key: str, kind: int, value: bytes, *, origin: str = "", note: str = "", blamed: str = "") -> None:
    """A record with a wrong value or type, for which every command that reads a model blames it (or `blamed`)."""
    parts = llama()
    parts.put(key, kind, value)
    refuse(name, parts, blamed or key, origin=origin, note=note)


def refuse(name: str, parts: Parts, key: str, *, origin: str = "", note: str = "") -> None:
    at = Refuses(parts.offset(key), key)
    told = Accepts(DESCRIBED, f"{key} at byte {at.offset}")
    add(name, parts, {"inspect": told, **dict.fromkeys(READS, at)}, origin, note)


def missing(name: str, key: str) -> None:
    parts = llama()
    del parts.kvs[key]
    refuse(name, parts, key)


ASSERTS = "stock ends the process (GGML_ASSERT)"
POSITIONS = "positions are int32: no token beyond 2^31 could be placed"
ANGLES = "angles of NaN, infinity or 0: the model would load and write nonsense"


def add_architecture() -> None:
    missing("architecture-missing", "general.architecture")
    lie("architecture-u32", "general.architecture", U32, u32(1))
    lie("architecture-array", "general.architecture", ARRAY, strings("llama"))
    for name, value in {"empty": "", "unknown": "llama\u202egguf", "escapes": "\x1b[2Jllama"}.items():
        parts = llama()
        parts.put("general.architecture", STRING, string(value))
        said = Says("unknown architecture", "an architecture of the future is no damage; inspect shows the name")
        add(
            f"architecture-{name}",
            parts,
            {"inspect": Accepts(DESCRIBED, "unknown architecture"), **dict.fromkeys(READS, said)},
        )


def add_counts() -> None:
    missing("context_length-missing", "llama.context_length")
    key = "llama.context_length"
    lie("context_length-0", key, U32, u32(0), note="no token could be placed")
    lie("context_length-u64", key, U64, u64(8))
    lie("context_length-string", key, STRING, string("8"))
    lie("context_length-array", key, ARRAY, array(U32, 1, u32(8)))
    lie("context_length-2^31", key, U32, u32(2**31), note=POSITIONS)
    lie("context_length-2^32-1", key, U32, u32(HUGE), note=POSITIONS)
    for value in (0, 513, 2**31, HUGE):
        lie(f"block_count-{value}", "llama.block_count", U32, u32(value), note=ASSERTS)
    lie("block_count-i32", "llama.block_count", I32, u32(1))
    lie("block_count-string", "llama.block_count", STRING, string("1"))
    for value in (2, HUGE):
        lie(f"nextn_predict_layers-{value}", "llama.nextn_predict_layers", U32, u32(value), blamed="llama.block_count")
    lie("expert_count-2^32-1", "llama.expert_count", U32, u32(HUGE), note=ASSERTS)
    lie("expert_count-without-used", "llama.expert_count", U32, u32(8), blamed="llama.expert_used_count")
    lie("expert_used_count-2^32-1", "llama.expert_used_count", U32, u32(HUGE), note=ASSERTS)
    lie("expert_used_count-string", "llama.expert_used_count", STRING, string("2"))
    lie("expert_group_count-2^32-1", "llama.expert_group_count", U32, u32(HUGE), note=ASSERTS)


def add_heads() -> None:
    key, rot = "llama.attention.head_count", "llama.rope.dimension_count"
    lie("head_count-3", key, U32, u32(3), blamed=rot)
    lie("head_count-strings", key, ARRAY, strings("2"))
    lie("head_count-negative", key, ARRAY, array(I32, 1, i32(-5)), blamed=rot)
    lie("embedding_length-2^32-1", "llama.embedding_length", U32, u32(HUGE), blamed=rot)
    lie("embedding_length-u64", "llama.embedding_length", U64, u64(32))
    no_rope = Says("this model has no RoPE", "a model without heads is no damage to any one field")
    for name, record in {"0": (U32, u32(0)), "2^32-1": (U32, u32(HUGE)), "empty": (ARRAY, array(U32, 0, b""))}.items():
        parts = llama()
        parts.put(key, *record)
        stock = Says("llama.cpp could not open it", "the words are llama.cpp's own")
        add(
            f"head_count-{name}", parts,
            {"inspect": Accepts(DESCRIBED, "no RoPE"), "extend": no_rope, "extend --in-place": no_rope, "chat": stock,
             "fit": Accepts("without keys, the cache is empty and the weights are what they are")},
        )  # fmt: skip
    for name, value in {"odd": 7, "2^32-2": HUGE - 1, "more-than-the-head": 32, "less-than-the-head": 8}.items():
        lie(f"dimension_count-{name}", rot, U32, u32(value))
    parts = llama()
    parts.put("llama.attention.key_length", U32, u32(2**20))
    parts.put(rot, U32, u32(2**20))
    refuse("dimension_count-2^20", parts, rot, note="half a million angles take hours to search; no model has over 576")


def add_floats() -> None:
    bad = {"nan": nan, "inf": inf, "0": 0.0, "negative": -1.0}
    for name, value in bad.items():
        lie(f"freq_base-{name}", "llama.rope.freq_base", F32, f32(value), note=ANGLES)
    lie("freq_base-f64", "llama.rope.freq_base", F64, struct.pack("<d", 1e4))
    lie("freq_base-string", "llama.rope.freq_base", STRING, string("1e4"))
    for key in ("factor", "attn_factor"):
        for name, value in bad.items():
            if (key, name) != ("factor", "0"):  # which llama.cpp takes for 1
                lie(f"scaling-{key}-{name}", f"llama.rope.scaling.{key}", F32, f32(value), note=ANGLES)
    for name, value in {"nan": nan, "inf": inf, "negative": -1.0}.items():
        note = "every number after such a norm is NaN" if name == "inf" else ASSERTS
        lie(f"epsilon-{name}", "llama.attention.layer_norm_rms_epsilon", F32, f32(value), note=note)
    lie("scaling-type-unknown", "llama.rope.scaling.type", STRING, string("evil"), note=ASSERTS)
    lie("scaling-type-u32", "llama.rope.scaling.type", U32, u32(2))
    lie(
        "original_context_length-0",
        "llama.rope.scaling.original_context_length",
        U32,
        u32(0),
        note="nothing divides by 0",
    )


def add_rope_freqs() -> None:
    def tensor(name: str, dims: tuple[int, ...], kind: int, data: bytes, at_data: bool = False, note: str = "") -> None:
        parts = llama()
        parts.tensors["rope_freqs.weight"] = (dims, kind, data)
        start = len(parts.data) - 32 if at_data else parts.tensor_offset("rope_freqs.weight")
        at = Refuses(start, "rope_freqs.weight")
        answers: dict[str, Answer] = dict.fromkeys(READS, at)
        add(f"rope_freqs-{name}", parts, {"inspect": Accepts(DESCRIBED, at.words[:-2]), **answers}, note=note)

    tensor("short", (4,), 0, f32(*[1.0] * 4))
    tensor("f16", (8,), 1, b"\0<" * 8)
    tensor("no-dims", (), 0, f32(1.0))
    tensor("two-dims", (8, 2), 0, f32(*[1.0] * 16))
    tensor("q8_0", (32,), 8, b"\0" * 34)
    for name, value in {"nan": nan, "inf": inf, "0": 0.0, "negative": -1.0}.items():
        tensor(name, (8,), 0, f32(*[value] * 8), at_data=True, note=ANGLES)


def add_split_keys() -> None:
    for name, record in {
        "string": (STRING, string("3")),
        "u32": (U32, u32(3)),
        "array": (ARRAY, array(U16, 1, b"\3\0")),
    }.items():
        parts = llama()
        parts.put("split.count", *record)
        at = Refuses(parts.offset("split.count") + 8 + 11 + 4 + (12 if name == "array" else 0), "split.count")
        add(f"split.count-{name}", parts, dict.fromkeys(("inspect", *READS), at))
    parts = llama()
    parts.put("split.count\0x", STRING, string("3"))  # keys end at a NUL for ggml
    at = Refuses(parts.offset("split.count\0x") + 8 + 13 + 4, "split.count")
    add("split.count-with-nul", parts, dict.fromkeys(("inspect", *READS), at))


for _add in (add_architecture, add_counts, add_heads, add_floats, add_rope_freqs, add_split_keys):
    _add()
