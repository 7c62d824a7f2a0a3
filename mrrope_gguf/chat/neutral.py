"""Text of a model made safe to show as it streams: it may hold terminal escape sequences, on purpose or by chance."""

from __future__ import annotations

import re

from ..text import printable

# controls but for newline and tab; marks that reorder or hide text. Joiners stay: scripts and emoji need them
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)
_LINE_ENDS = str.maketrans({"\r": None, "\u2028": "\n", "\u2029": "\n"})


def neutral(text: str) -> str:
    """`text` with every character that could command a terminal, or disguise text, written out.

    Each character by itself, so that a stream may be cut anywhere. Unlike text.printable it keeps lines and letters.

    >>> neutral("a\\x1b[2Jb\\r\\n\\u202ec")
    'a\\\\e[2Jb\\n\\\\u202ec'
    """
    return _UNSAFE.sub(lambda found: printable(found[0]), text.translate(_LINE_ENDS))
