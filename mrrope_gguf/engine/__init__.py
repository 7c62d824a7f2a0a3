"""How libllama is found, loaded and listened to. Nothing outside this package knows.

`loaded_library()` says what is loaded, `capture()` keeps llama.cpp's log quiet and at hand.
"""

from __future__ import annotations

from mrrope_gguf.engine.libllama import PIN, Library, binding_version, llama_cpp, loaded_library
from mrrope_gguf.engine.log import Log, capture

__all__ = ["PIN", "Library", "Log", "binding_version", "capture", "llama_cpp", "loaded_library"]
