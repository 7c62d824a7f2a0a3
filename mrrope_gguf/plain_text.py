"""Bytes to text: whether they are text at all, in which encoding, and without what commands a terminal."""

from __future__ import annotations

import codecs
import re

_BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# what a page may declare; Python knows codecs that are no encodings of text
_ENCODINGS = re.compile(
    r"(utf|iso-?8859|latin|windows-|cp\d|koi8|x-sjis|s?hift_jis|sjis|euc|gb|big5|us-ascii$|ascii$|mac)", re.IGNORECASE
)
_LATIN = re.compile(r"(iso-?8859-?1|latin-?1|us-ascii|ascii)$", re.IGNORECASE)  # all of them are read as cp1252
_FORMATS = (
    (b"GGUF", "a GGUF model"),
    (b"PK\x03\x04", "a ZIP archive, as .docx, .odt, .epub and .xlsx are"),
    (b"\xd0\xcf\x11\xe0", "an Office document of the old kind (.doc, .xls, .ppt)"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"(\xb5/\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x7fELF", "a program or library"),
    (b"SQLite format 3", "an SQLite database"),
)
_MARKUP = ((b"{\\rtf", "an RTF document"), (b"%!PS", "a PostScript document"))
_SAMPLE = 1 << 16
_START = 8000  # a NUL this early means binary, as git has it
_CONTROLS = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b") + b"\x7f"
_MOST_CONTROLS = 0.01

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_NEWLINES = re.compile(r"\r\n?|[\v\f\x85\u2028\u2029]")


def not_text(data: bytes) -> str | None:
    """What a file that begins with `data` is, where it is no text: "a PNG picture", "a binary file"; else None."""
    start = data.lstrip()[:8]
    for mark, what in _MARKUP:
        if start.startswith(mark):
            return what
    if any(data.startswith(mark) for mark, _ in _BOMS):
        return None
    sample = data[:_SAMPLE]
    controls = len(sample) - len(sample.translate(None, _CONTROLS))
    if b"\0" not in data[:_START] and controls <= _MOST_CONTROLS * len(sample):
        return None
    return next((what for mark, what in _FORMATS if data.startswith(mark)), "a binary file")


def decode(data: bytes, declared: str | None = None) -> tuple[str, list[str]]:
    """The text, and notes on what had to be guessed or was lost.

    A byte order mark decides; then `declared`, what the file says of itself; then UTF-8 if it is; else Windows-1252.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _replacing(data[len(mark) :], encoding)
    if declared and (known := _known(declared)) and known != "utf-8":
        return _replacing(data, known)
    try:
        return data.decode("utf-8"), []
    except UnicodeDecodeError as error:
        return _broken_utf8(data, error)


def _known(declared: str) -> str | None:
    """Python's name of an encoding that a page declares, None for one that cannot be meant."""
    if not _ENCODINGS.match(declared):
        return None
    if _LATIN.match(declared):
        return "cp1252"
    try:
        name = codecs.lookup(declared).name
    except LookupError:
        return None
    # a page whose meta element could be read as ASCII is in no UTF-16
    return "utf-8" if name.startswith(("utf-16", "utf-32", "utf-7", "utf-8")) else name


def _replacing(data: bytes, encoding: str) -> tuple[str, list[str]]:
    try:
        return data.decode(encoding), []
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
        return text, [f"read as {encoding}; {text.count(chr(0xFFFD))} places that are none became U+FFFD"]


def _broken_utf8(data: bytes, error: UnicodeDecodeError) -> tuple[str, list[str]]:
    """UTF-8 where most of what is not ASCII is UTF-8; else Windows-1252, the likeliest of the others."""
    text = data.decode("utf-8", "replace")
    lost = text.count("\ufffd")
    good = sum(1 for char in text if char > "\x7f") - lost
    if good > lost:
        return text, [f"not all UTF-8: {lost} places became U+FFFD, the first at byte {error.start}"]
    text = data.decode("cp1252", "replace")
    return text, [f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): read as Windows-1252 (cp1252)"]


def clean(text: str) -> tuple[str, list[str]]:
    """`text` with newlines alone as line ends and without terminal escapes and control characters; notes on those."""
    text = _NEWLINES.sub("\n", text.removeprefix("\ufeff"))
    text, escapes = _ESCAPE.subn("", text)
    text, controls = _CONTROL.subn("", text)
    found = [f"{n} {what}" for n, what in ((escapes, "terminal escapes"), (controls, "control characters")) if n]
    return text.strip("\n"), [f"{' and '.join(found)} left out"] if found else []
