"""How libllama is found, loaded and listened to. Nothing outside this package knows.

`loaded_library()` says what is loaded, `capture()` keeps llama.cpp's log quiet and at hand, and `set_table` changes the
rope table of a running context.
"""

from __future__ import annotations

from mrrope_gguf.engine.libllama import Library, announce, binding_version, llama_cpp, loaded_library, why_stock
from mrrope_gguf.engine.log import Log, capture
from mrrope_gguf.engine.pins import PIN
from mrrope_gguf.engine.rope_table import ActiveTable, get_table, set_factors, set_table, table_size

__all__ = [
    "PIN", "ActiveTable", "Library", "Log", "announce", "binding_version", "capture", "get_table", "llama_cpp",
    "loaded_library", "set_factors", "set_table", "table_size", "why_stock",
]  # fmt: skip
