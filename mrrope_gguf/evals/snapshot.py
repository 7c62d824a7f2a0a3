"""A sequence's keys and values, kept on disk: what many runs share is read by the model once."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import os
from pathlib import Path

from ..aside import NEW
from ..errors import EngineTrouble
from ..text import printable
from ..user_key import user_key
from .decode import Decoder

_PROOF = hashlib.sha256().digest_size


def save(decoder: Decoder, path: Path) -> None:
    """Write the tokens that `decoder` holds, as the model sees them, to `path`. An old file is replaced whole.

    Behind the state stands a proof, under the key in the same folder, that it is whole and this user's.
    """
    api, ctx = decoder.api, decoder.ctx
    size = api.llama_state_seq_get_size(ctx, 0)
    state = (ctypes.c_uint8 * size)()
    if api.llama_state_seq_get_data(ctx, state, size, 0) != size:
        raise EngineTrouble("the sequence's state was not saved", why=f"llama.cpp wrote less than its {size} bytes")
    n_past = decoder.n_past.to_bytes(8, "little")
    whole = path.with_suffix(f".{os.urandom(8).hex()}.tmp")
    try:
        with os.fdopen(os.open(whole, NEW, 0o600), "wb") as file:
            file.write(n_past)
            file.write(state)
            file.write(_proof(path, n_past, state))
            file.flush()
            os.fsync(file.fileno())  # after a power loss a state is whole or not there
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)  # Ctrl-C, or a full disk


def restore(decoder: Decoder, path: Path) -> None:
    """Put a saved sequence into an empty `decoder`, which goes on from there.

    The context must turn by the table that it had when it was saved.
    Raises EngineTrouble if the file is not what this user wrote, of which llama.cpp sees nothing then, or if llama.cpp
    refuses the state.
    """
    data = bytearray(path.read_bytes())
    n_state = len(data) - 8 - _PROOF
    if n_state < 0 or not hmac.compare_digest(_proof(path, memoryview(data)[:-_PROOF]), data[-_PROOF:]):
        raise EngineTrouble(
            f"{printable(path.name)}: the state was not restored",
            why="it was cut short or changed since it was written, or another user's key made it",
            fix="nothing to do: what it held is read again",
        )
    state = (ctypes.c_uint8 * n_state).from_buffer(data, 8)
    if decoder.api.llama_state_seq_set_data(decoder.ctx, state, len(state), 0) != len(state):
        raise EngineTrouble(f"{path.name}: the state was not restored", why="llama.cpp refused it")
    decoder.n_past = int.from_bytes(data[:8], "little")


def _proof(path: Path, *parts: bytes | memoryview | ctypes.Array[ctypes.c_uint8]) -> bytes:
    made = hmac.new(user_key(path.parent), digestmod="sha256")
    for part in parts:
        made.update(part)
    return made.digest()
