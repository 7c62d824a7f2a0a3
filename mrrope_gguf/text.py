"""Strings from files, made safe to show: a GGUF's metadata may hold terminal escape sequences."""

from __future__ import annotations

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"}


def printable(text: str, limit: int = 200) -> str:
    """`text` with every control, format and surrogate character written out, cut after `limit` characters.

    Right-to-left overrides and zero-width characters are written out too, since they can disguise a name.

    >>> printable("\\x1b[31mred\\x07")
    '\\\\e[31mred\\\\x07'
    """
    shown = "".join(char if char.isprintable() else _written_out(char) for char in text[:limit])
    return shown + "..." if len(text) > limit else shown


def _written_out(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that was not UTF-8
        code -= 0xDC00
    return _ESCAPES.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
