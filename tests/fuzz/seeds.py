"""Where fuzzing of GGUF files begins: malformed files, odd ones, and the headers of real models cut to a few KB.

`python -m tests.fuzz.seeds DIR` writes them to DIR.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from mrrope_gguf import fetch
from mrrope_gguf.gguf.index import KV, GGUFIndex, open_gguf
from mrrope_gguf.gguf.types import ValueType, padded
from tests.bad_gguf import CASES, ODD
from tests.gguf_bytes import ARRAY, STRING, U32, gguf, kv, string, strings, tensor, u32

LARGEST = 4096
_ITEMS, _TENSORS, _TEXT = 3, 6, 200  # of arrays, of the file, of a string


def seeds(real: list[Path]) -> dict[str, bytes]:
    """Files by name, from tests/bad_gguf.py and of the models in `real`."""
    out = {f"bad-{name}": case.data for name, case in CASES.items()} | {f"odd-{n}": data for n, data in ODD.items()}
    out["extendable"] = extendable()
    for path in real:
        with open_gguf(path) as index:
            out[f"real-{index.arch}"] = trimmed(index)
    return {name: data for name, data in out.items() if len(data) <= LARGEST}


def extendable() -> bytes:
    """A model of a few hundred bytes that can be extended, with a vocabulary of three words."""
    kvs = [
        kv("general.architecture", STRING, string("llama")),
        kv("llama.context_length", U32, u32(64)),
        kv("llama.block_count", U32, u32(1)),
        kv("llama.embedding_length", U32, u32(16)),
        kv("llama.attention.head_count", U32, u32(2)),
        kv("tokenizer.ggml.tokens", ARRAY, strings("a", "b", "c")),
    ]
    return gguf(
        kvs, [tensor("token_embd.weight", (8,)), tensor("blk.0.attn_q.weight", (4, 2), 0, 32)], [b"\1" * 32] * 2
    )


def trimmed(index: GGUFIndex) -> bytes:
    """A small file with every metadata record of a real one: arrays and texts cut short, a few tensors of one row."""
    kvs = []
    for old in index.kvs.values():
        record = bytes(index.raw(old.start, old.value))
        if old.type is ValueType.ARRAY:
            count = min(old.count, _ITEMS)
            record = record[:-8] + struct.pack("<Q", count) + _items(index, old, count)
        elif old.type is ValueType.STRING:
            record += string(bytes(index.raw(old.value + 8, old.end))[:_TEXT])
        else:
            record += bytes(index.raw(old.value, old.end))
        kvs.append(record)
    infos, data, offset = [], [], 0
    for one in list(index.tensors.values())[:_TENSORS]:
        small = one.nbytes <= 64
        dims, kind = (one.dims, one.type) if small else ((8, *(1 for _ in one.dims[1:])), 0)
        infos.append(tensor(one.name, dims, kind, offset))
        data.append(b"\1" * (one.nbytes if small else 32))
        offset += padded(len(data[-1]), index.alignment)
    return gguf(kvs, infos, data, alignment=index.alignment)


def _items(index: GGUFIndex, kv: KV, wanted: int) -> bytes:
    """The bytes of an array's first items."""
    raw, at = index.raw(kv.value, kv.end), 0
    if kv.item_type is not ValueType.STRING:
        return bytes(raw[: wanted * (len(raw) // max(kv.count, 1))])
    for _ in range(wanted):
        at += 8 + int(struct.unpack_from("<Q", raw, at)[0])
    return bytes(raw[:at])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds([fetch.fetch(fetch.SMOLLM2), fetch.fetch(fetch.GEMMA3)]).items():
        (folder / name.replace("/", "_")).write_bytes(data)
    print(f"{len(list(folder.iterdir()))} files in {folder}")
