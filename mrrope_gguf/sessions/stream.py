"""An answer as it is written: bytes that may end inside a character, and texts at which it is to end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Stream:
    """Turns pieces of bytes into text to show. `text` is the answer, `whole` also holds what a stop text cut off.

    >>> stream = Stream(["\\nUser:"])
    >>> [stream.push(b"caf\\xc3"), stream.push(b"\\xa9\\nUs"), stream.push(b"er: more")], stream.cut
    (['caf', 'é', ''], True)
    >>> stream.text, stream.whole
    ('café', 'café\\nUser: more')
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self.text = self.whole = ""
        self._shown = 0
        self.cut = False

    def push(self, data: bytes, *, last: bool = False) -> str:
        """What can be shown now; the rest of an answer with last=True."""
        self.whole += self._decoder.decode(data, last)
        if not self.cut:
            # a stop text may begin in what was shown of it only if that was none of its beginnings: it was not
            found = [at for stop in self._stops if (at := self.whole.find(stop, self._shown)) >= 0]
            self.cut = bool(found)
            end = min(found) if found else len(self.whole) - (0 if last else self._may_be_stop())
            self.text, self._shown, start = self.whole[:end], end, self._shown
            return self.whole[start:end]
        return ""

    def _may_be_stop(self) -> int:
        """How many characters at the end could be the beginning of a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self.whole) - self._shown), 0, -1):
            if any(stop.startswith(self.whole[-n:]) for stop in self._stops):
                return n
        return 0
