"""Mutations of JSON by its structure: a value replaced, a key dropped or doubled, nested deeper, its text broken."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**400,
    0.0, -0.0, 1.5, 1e-45, 3.5e38, 1e308, float("inf"), float("-inf"), float("nan"), "", "a", "\x1b[2J", "\udcff", "\0",
    "llama", "mrrope-uni", [], {}, [[]], [0, 0], {"a": 1}, "a" * 300, [1.0] * 32, [2, 0], [0, 0, 1], [1, 0, 4],
]  # fmt: skip


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Other bytes, at most `most` of them: of JSON and what follows a NUL, or of anything."""
    rng = random.Random(seed)
    head, nul, rest = data.partition(b"\0")
    try:
        value = json.loads(head)
    except (ValueError, RecursionError):
        return _bytes(rng, data)[:most]
    try:  # nested as deep as the reader takes, a value is beyond what copying and writing do
        for _ in range(rng.randint(1, 3)):
            value = _changed(rng, value)
        text = json.dumps(value, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return data[:most]
    if rng.random() < 0.1:
        text = _bytes(rng, text)
    if rng.random() < 0.2:
        rest = _bytes(rng, rest)
    return (text + (nul or rng.choice([b"", b"", b"\0"])) + rest)[:most]


def _changed(rng: random.Random, value: Any) -> Any:
    """`value` with one place in it changed; the deeper it goes, the likelier."""
    if isinstance(value, (list, dict)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        inner = value[key]
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1 if isinstance(value, list):
                value.insert(key, copy.deepcopy(inner))
            case 1 if isinstance(value, dict):
                value[rng.choice(["a", "lead", "scale", "rows", "long_factor", "rope_scaling"])] = copy.deepcopy(inner)
            case _:
                value[key] = _changed(rng, inner)
        return value
    return _other(rng, value)


def _other(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or rng.random() < 0.4:
        return rng.choice([copy.deepcopy(rng.choice(_VALUES)), [value], _nested(rng.choice([2, 20, 3000]))])
    if rng.random() < 0.5:
        return rng.choice(_NUMBERS)
    if value - value != 0 or abs(value) > 1e200:  # no number, or beyond what floats hold
        return 1
    return rng.choice([value + 1, value - 1, -value, value * 2, value * 1e10, int(value) ^ 1 << rng.randrange(40)])


_NUMBERS = [value for value in _VALUES if isinstance(value, (int, float)) and not isinstance(value, bool)]


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(min(depth, 400)):  # json.dumps recurses too; deeper ones are in the corpus
        value = [value]
    return value


def _bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    match rng.randrange(4):
        case 0:
            return data[:at] + data[at + rng.randint(1, 9) :]
        case 1:
            return data[:at] + rng.choice([b"[" * 3000, b"\0", b'"', b"1e999", b"NaN", b"{", b"\xff"]) + data[at:]
        case 2:
            return data[:at] + data[at : at + 20] * 2 + data[at + 20 :]
        case _:
            return data[:at] + rng.randbytes(1) + data[at + 1 :]
