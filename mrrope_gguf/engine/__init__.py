"""How libllama is found, loaded and listened to. Nothing outside this package knows.

`loaded_library()` says what is loaded, `capture()` keeps llama.cpp's log quiet and at hand, `set_table` changes the
rope table of a running context, and `set_elastic` lets it follow the conversation.
"""

from __future__ import annotations

from mrrope_gguf.engine.elastic import (
    ElasticState,
    get_elastic,
    has_elastic,
    reserve_elastic,
    set_elastic,
    set_elastic_policy,
)
from mrrope_gguf.engine.libllama import Library, announce, binding_version, llama_cpp, loaded_library, why_stock
from mrrope_gguf.engine.log import Log, capture
from mrrope_gguf.engine.pins import PIN
from mrrope_gguf.engine.rope_table import ActiveTable, get_table, set_factors, set_table, table_size

__all__ = [
    "PIN", "ActiveTable", "ElasticState", "Library", "Log", "announce", "binding_version", "capture", "get_elastic",
    "get_table", "has_elastic", "llama_cpp", "loaded_library", "reserve_elastic", "set_elastic", "set_elastic_policy",
    "set_factors", "set_table", "table_size", "why_stock",
]  # fmt: skip
