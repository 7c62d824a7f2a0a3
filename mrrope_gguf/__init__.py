"""mrrope-gguf: a longer memory for any GGUF model, by mixed-radix RoPE. See README.md.

Names are imported when first used, so that `mrrope --help` and `mrrope extend` never load numpy or llama_cpp.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .bound import bound, min_base
    from .errors import BadFile, ContextFull, DoesNotFit, EngineTrouble, FileTrouble, MrropeError, Refused
    from .extend import extend
    from .fit import fit
    from .inspect import inspect
    from .kernels import nll, rope
    from .model import load
    from .revert import revert
    from .session import ChatSession
    from .tables import METHODS, RopeTable, rope_table

_HOMES = {
    "bound": "bound", "min_base": "bound", "extend": "extend", "fit": "fit", "inspect": "inspect", "nll": "kernels",
    "rope": "kernels", "load": "model", "revert": "revert", "METHODS": "tables", "RopeTable": "tables",
    "rope_table": "tables", "BadFile": "errors", "DoesNotFit": "errors", "EngineTrouble": "errors",
    "FileTrouble": "errors", "MrropeError": "errors", "Refused": "errors", "ContextFull": "errors",
    "ChatSession": "session",
}  # fmt: skip

__all__ = [
    "METHODS", "BadFile", "ChatSession", "ContextFull", "DoesNotFit", "EngineTrouble", "FileTrouble", "MrropeError",
    "Refused", "RopeTable", "bound", "extend", "fit", "inspect", "load", "min_base", "nll", "revert", "rope",
    "rope_table",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `fit` the function when the module `fit` is imported: the import system would bind the module over it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
