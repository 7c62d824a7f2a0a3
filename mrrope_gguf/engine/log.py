"""llama.cpp's log, collected instead of printed: nobody reads it until something fails."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mrrope_gguf.engine.libllama import llama_cpp

# enum ggml_log_level
WARN, ERROR, CONTINUED = 3, 4, 5
KEEP = 2000


class Log:
    """The last `KEEP` pieces of log, each with its level; `text` joins them, `problems` picks warnings and errors."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, str]] = deque(maxlen=KEEP)

    def add(self, level: int, text: str) -> None:
        if level == CONTINUED and self._pieces:
            level = self._pieces[-1][0]
        self._pieces.append((level, text))

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self._pieces)

    def problems(self, level: int = ERROR) -> list[str]:
        """Whole lines at `level` or above, oldest first."""
        joined = "".join(piece for at, piece in self._pieces if at >= level)
        return [line.strip() for line in joined.splitlines() if line.strip()]

    def why(self) -> str:
        """The last few errors as one line; warnings where there are no errors; else what there is."""
        lines = self.problems() or self.problems(WARN)
        return "; ".join(lines[-3:]) or "llama.cpp gave no reason"


@contextmanager
def capture() -> Iterator[Log]:
    """Collect everything llama.cpp logs inside the block; the callback that was there before comes back after it."""
    api = llama_cpp().llama_cpp
    log = Log()

    def add(level: int, text: bytes, _user: object) -> None:
        log.add(level, text.decode("utf-8", "replace"))

    listen = api.llama_log_callback(add)
    before, user = api.llama_log_callback(), ctypes.c_void_p()
    api.llama_log_get(ctypes.byref(before), ctypes.byref(user))
    api.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        api.llama_log_set(before, user)
