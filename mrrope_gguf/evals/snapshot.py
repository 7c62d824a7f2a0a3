"""A sequence's keys and values, kept on disk: what many runs share is read by the model once."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from ..errors import EngineTrouble
from .decode import Decoder


def save(decoder: Decoder, path: Path) -> None:
    """Write the tokens that `decoder` holds, as the model sees them, to `path`. An old file is replaced whole."""
    api, ctx = decoder.api, decoder.ctx
    size = api.llama_state_seq_get_size(ctx, 0)
    state = (ctypes.c_uint8 * size)()
    if api.llama_state_seq_get_data(ctx, state, size, 0) != size:
        raise EngineTrouble("the sequence's state was not saved", why=f"llama.cpp wrote less than its {size} bytes")
    whole = path.with_suffix(f".{os.getpid()}")
    try:
        with open(whole, "wb") as file:
            file.write(decoder.n_past.to_bytes(8, "little"))
            file.write(state)
            file.flush()
            os.fsync(file.fileno())  # after a power loss a state is whole or not there
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)  # Ctrl-C, or a full disk


def restore(decoder: Decoder, path: Path) -> None:
    """Put a saved sequence into an empty `decoder`, which goes on from there.

    The context must turn by the table that it had when it was saved.
    Raises EngineTrouble if llama.cpp refuses the state.
    """
    data = bytearray(path.read_bytes())
    state = (ctypes.c_uint8 * (len(data) - 8)).from_buffer(data, 8)
    if decoder.api.llama_state_seq_set_data(decoder.ctx, state, len(state), 0) != len(state):
        raise EngineTrouble(f"{path.name}: the state was not restored", why="llama.cpp refused it")
    decoder.n_past = int.from_bytes(data[:8], "little")
