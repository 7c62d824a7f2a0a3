"""The text of a PDF, page by page, through pypdf (extra `chat`)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from .errors import MrropeError, Refused
from .progress import Progress
from .text import printable

INSTALL = "pip install 'mrrope-gguf[chat]'"
_SPACE_ENDS = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANKS = re.compile(r"\n{3,}")


def pdf_text(file: IO[bytes], name: str, *, most: int, progress: Progress | None = None) -> tuple[str, int, list[str]]:
    """The text, the number of pages, and notes. `name` is for messages, `most` a limit in characters.

    progress(done, total) counts pages. Raises MrropeError without pypdf, Refused for a PDF that is encrypted, damaged,
    longer than `most` or without text.
    """
    try:
        import pypdf
    except ImportError:
        raise MrropeError(f"{name}: reading a PDF needs pypdf", why="it is not installed", fix=INSTALL) from None
    with _quiet():
        try:
            reader = pypdf.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                raise _encrypted(name, "it asks for a password")
            total = len(reader.pages)
            texts, bad = _pages(reader, total, name, most, progress)
        except MrropeError:
            raise
        except pypdf.errors.DependencyError as error:
            raise Refused(
                f"{name}: this PDF is encrypted by AES",
                why=f"pypdf cannot undo that by itself: {error}",
                fix="pip install cryptography, which is enough if it opens without a password",
            ) from None
        except RecursionError:
            raise _damaged(name, "its objects are nested without end") from None
        except Exception as error:  # damaged files raise KeyError, TypeError, ... all over pypdf
            raise _damaged(name, f"{type(error).__name__}: {error}") from None
    return "\n\n".join(filter(None, texts)), total, _notes(name, texts, bad)


def _pages(
    reader: Any, total: int, name: str, most: int, progress: Progress | None
) -> tuple[list[str], dict[int, str]]:
    """The text of each page, and what went wrong on which (counted from 1)."""
    texts: list[str] = []
    bad: dict[int, str] = {}
    size = 0
    for number in range(total):
        try:
            text = reader.pages[number].extract_text()
        except Exception as error:  # one bad page must not cost the others
            text, bad[number + 1] = "", f"{type(error).__name__}: {error}"
        texts.append(_BLANKS.sub("\n\n", _SPACE_ENDS.sub("", text)).strip())
        size += len(texts[-1])
        if size > most:
            raise Refused(
                f"{name}: its text is too long",
                why=f"the first {number + 1} of {total} pages have {size} characters, and {most} are read at most",
                fix="take some pages out of it: qpdf IN.pdf --pages . 1-100 -- OUT.pdf",
            )
        if progress:
            progress(number + 1, total)
    return texts, bad


def _notes(name: str, texts: list[str], bad: dict[int, str]) -> list[str]:
    silent = [number for number, text in enumerate(texts, 1) if not text and number not in bad]
    if not any(texts):
        if bad:
            number, reason = next(iter(bad.items()))
            raise _damaged(name, f"none of its {len(texts)} pages could be read; page {number}: {reason}")
        raise no_text(name, len(texts))
    notes = [f"no text on {_numbers(silent)}: empty or scanned"] if silent else []
    if bad:
        first = printable(next(iter(bad.values())), limit=80)
        notes.append(f"{_numbers(list(bad))} could not be read ({first})")
    return notes


def no_text(name: str, pages: int) -> Refused:
    return Refused(
        f"{name}: this PDF holds no text",
        why=f"pages: {pages}, and none has any that can be read; it is probably scanned",
        fix="recognise the text first: ocrmypdf IN.pdf OUT.pdf",
    )


def _numbers(pages: list[int]) -> str:
    """Page numbers with runs written short.

    >>> _numbers([2]), _numbers([1, 2, 3, 7, 9, 10])
    ('page 2', 'pages 1-3, 7, 9-10')
    """
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][-1] == page - 1:
            runs[-1][1:] = [page]
        else:
            runs.append([page])
    return f"page{'s' * (len(pages) > 1)} " + ", ".join("-".join(map(str, run)) for run in runs)


def _encrypted(name: str, why: str) -> Refused:
    fix = "save a copy without one: qpdf --password=... --decrypt IN.pdf OUT.pdf"
    return Refused(f"{name}: this PDF is encrypted", why=why, fix=fix)


def _damaged(name: str, why: str) -> Refused:
    return Refused(f"{name}: cannot be read as a PDF", why=printable(why, limit=300), fix="save or download it again")


@contextmanager
def _quiet() -> Iterator[None]:
    """pypdf logs each oddity of a file; the reader has its text."""
    logger = logging.getLogger("pypdf")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
