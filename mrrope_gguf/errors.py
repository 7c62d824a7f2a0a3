"""The errors a user can meet, each with what happened, why (with the numbers) and the fix.

MrropeError
├── BadFile           the bytes are not a GGUF that llama.cpp would read; names offset and field
├── Refused           the file is sound, but what was asked of it cannot be done, or not without --force
│   └── ContextFull   a conversation has outgrown the context; nothing was dropped
├── FileTrouble       the file system said no: exists, missing, full, read-only, in use
├── DoesNotFit        the model and its context do not fit in memory
└── EngineTrouble     no libllama, or one that cannot do what the file needs
"""

from __future__ import annotations


class MrropeError(Exception):
    """An error to show as three lines: what, why, fix. The CLI prints it and exits with 1."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class BadFile(MrropeError):
    """The bytes are not a GGUF that llama.cpp would read; `offset` and `field`, which `why` begins with, say where."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", offset: int = 0, field: str = "") -> None:
        super().__init__(what, why=f"{field} at byte {offset}: {why}" if field else why, fix=fix)
        self.offset = offset
        self.field = field


class Refused(MrropeError):
    """The file is sound, but what was asked cannot be done, or not without --force."""


class ContextFull(Refused):
    """A conversation of `tokens` tokens has outgrown its context of `window`; nothing of it was dropped."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", tokens: int = 0, window: int = 0) -> None:
        super().__init__(what, why=why, fix=fix)
        self.tokens = tokens
        self.window = window


class FileTrouble(MrropeError):
    """The file system said no: the file exists, is missing, full, read-only or in use."""


class DoesNotFit(MrropeError):
    """The model and its context do not fit in this machine's memory."""


class EngineTrouble(MrropeError):
    """No libllama, or one that cannot do what the file needs."""
