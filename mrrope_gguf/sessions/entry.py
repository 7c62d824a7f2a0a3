"""One saved state: llama.cpp's own sequence file, and behind it what it is and a proof that it is whole and ours.

    llama.cpp's sequence file   "qsgg", version, number of tokens (u32 each), the tokens (i32), the state
    facts                       JSON: fingerprint, tokens' sha256, sha256 of every 8 MiB of the above, ...
    footer                      magic, version u32, length of the file u64, of the facts u64, HMAC-SHA256

The proof is keyed: what this user did not write is not read, whatever it looks like. llama.cpp's reader trusts its
input, so nothing reaches it before every byte was checked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..errors import FileTrouble
from ..gguf.copy import read_at, sync_file, write_at

MAGIC, VERSION = b"MRROPES\x00", 1
CHUNK = 8 << 20  # bytes under one sha256; a few are hashed at once
MAX_FACTS = 64 << 20
_FOOTER = struct.Struct("<8sIQQ32s")
_HEAD = struct.Struct("<4sII")
_LLAMA_MAGIC = b"qsgg"  # LLAMA_STATE_SEQ_MAGIC, 'ggsq', as a little-endian number


class Damaged(FileTrouble):
    """A saved state that is not what was written, or not written by this user."""


class OtherVersion(FileTrouble):
    """A saved state of another version of mrrope-gguf."""


@dataclass(frozen=True)
class Head:
    """What a saved state says about itself, its proof checked; the state's own bytes are not, see `check_state`.

    tokens: int32 (n,), as the model read them. whole: every token's keys are in it, so that a part may be used: a
    sliding-window or recurrent memory is of use only as it is. scale: S when it was saved. parts, model: of the
    fingerprint. length: bytes of llama.cpp's file.
    """

    tokens: array[int]
    whole: bool
    scale: float
    parts: Mapping[str, str]
    model: str
    length: int
    chunks: tuple[bytes, ...]


def seal(
    fd: int, key: bytes, tokens: Sequence[int], *, whole: bool, scale: float, parts: Mapping[str, str], model: str
) -> None:
    """Put facts and footer behind llama.cpp's file in `fd` and see all of it onto the disk.

    Raises Damaged where that file does not hold `tokens`, as one that was cut short by a full disk.
    """
    length, wanted = os.fstat(fd).st_size, array("i", tokens)
    if length <= _HEAD.size + 4 * len(wanted) or _tokens(fd, length) != wanted:
        raise Damaged("llama.cpp's file is not whole", why=f"it has {length} bytes", fix="check the disk")
    facts = {
        "whole": whole, "scale": scale, "parts": dict(parts), "model": model,
        "tokens": hashlib.sha256(wanted.tobytes()).hexdigest(),
        "chunks": [digest.hex() for digest in _chunk_digests(fd, length)],
    }  # fmt: skip
    data = json.dumps(facts).encode()
    write_at(fd, data + _footer(key, length, data), length)
    sync_file(fd)


def read_head(fd: int, key: bytes, parts: Mapping[str, str] | None = None) -> Head:
    """The head of the saved state in `fd`; no more of the file is read.

    Raises Damaged, or OtherVersion; also Damaged where the state says it belongs to other `parts`.
    """
    size = os.fstat(fd).st_size
    footer = read_at(fd, _FOOTER.size, max(size - _FOOTER.size, 0))
    if len(footer) < _FOOTER.size:
        raise _damaged(f"it has {size} bytes, fewer than a footer")
    magic, version, length, n_facts, _ = _FOOTER.unpack(footer)
    if magic != MAGIC:
        raise _damaged("its last bytes are no footer")
    if version != VERSION:
        raise OtherVersion("saved by another version", why=f"its version is {version}, this one reads {VERSION}")
    if n_facts > MAX_FACTS or length + n_facts + _FOOTER.size != size:
        raise _damaged(f"it has {size} bytes, its footer speaks of {length + n_facts + _FOOTER.size}")
    data = read_at(fd, n_facts, length)
    if not hmac.compare_digest(_footer(key, length, data), footer):
        raise _damaged("its proof does not fit: its facts were changed, or another user's key made it")
    facts: dict[str, Any] = json.loads(data)
    if parts is not None and facts["parts"] != dict(parts):
        raise _damaged("it belongs to another model, table, cache or engine than its place says")
    tokens = _tokens(fd, length)
    if tokens is None or hashlib.sha256(tokens.tobytes()).hexdigest() != facts["tokens"]:
        raise _damaged("its tokens are not those that were saved")
    chunks = tuple(bytes.fromhex(digest) for digest in facts["chunks"])
    return Head(tokens, facts["whole"], facts["scale"], facts["parts"], facts["model"], length, chunks)


def check_state(fd: int, head: Head) -> None:
    """Read all of llama.cpp's file and raise Damaged unless every byte is as it was saved."""
    for i, (found, wanted) in enumerate(zip(_chunk_digests(fd, head.length), head.chunks, strict=True)):
        if found != wanted:
            start = i * CHUNK
            raise _damaged(
                f"its bytes {start} to {min(start + CHUNK, head.length)} are not those that were saved (sha256)"
            )


def _footer(key: bytes, length: int, facts: bytes) -> bytes:
    start = _FOOTER.pack(MAGIC, VERSION, length, len(facts), b"")[: -hashlib.sha256().digest_size]
    return start + hmac.digest(key, start + facts, "sha256")


def _tokens(fd: int, length: int) -> array[int] | None:
    """The tokens in llama.cpp's own head; None where it is none."""
    head = read_at(fd, _HEAD.size, 0)
    if len(head) < _HEAD.size:
        return None
    magic, _, n = _HEAD.unpack(head)
    if magic != _LLAMA_MAGIC or _HEAD.size + 4 * n > length:
        return None
    data = read_at(fd, 4 * n, _HEAD.size)
    return array("i", data) if len(data) == 4 * n else None


def _chunk_digests(fd: int, length: int) -> list[bytes]:
    """sha256 of each CHUNK bytes, a few at a time: hashing lets other threads run."""

    def digest(start: int) -> bytes:
        size = min(CHUNK, length - start)
        data = read_at(fd, size, start)
        if len(data) != size:
            raise _damaged(f"it ends after {start + len(data)} of {length} bytes")
        return hashlib.sha256(data).digest()

    n_threads = min(4, os.cpu_count() or 1) if hasattr(os, "pread") else 1
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(digest, range(0, length, CHUNK)))


def _damaged(why: str) -> Damaged:
    return Damaged("a saved state is damaged", why=why, fix="nothing to do: what it held is read again")
