"""Documents for a chat: plain text, Markdown, HTML and PDF read as text, and the tokens each will take.

What a file is, its content says; its name is asked only where the content leaves it open. What cannot be read is one
error that says what the file is instead.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from .errors import FileTrouble, MrropeError, Refused
from .plain_text import clean, decode, not_text
from .progress import Progress
from .text import printable
from .vocab import Tokenizer, counter

Kind = Literal["text", "markdown", "html", "pdf"]

MOST_BYTES = 32 << 20  # of text or HTML: some 8 million tokens, more than any context holds
MOST_PDF_BYTES = 1 << 30  # a PDF is read page by page, and most of it is pictures
_HEAD = 1 << 16
_MARKDOWN = re.compile(r"^(#{1,6} \S|```|~~~|\[[^\]\n]+\]: \S)", re.MULTILINE)
_LINK = re.compile(r"\[[^\]\n]+\]\([^)\s]+\)")


@dataclass(frozen=True)
class Document:
    """A document as text. `name` is safe to print, `pages` is None but for a PDF, `notes` say what was guessed or lost.

    `text` is not empty, its lines end in newlines, and no character of it commands a terminal. It may spell out a
    model's control tokens: tokenize it with special=False.
    """

    name: str
    kind: Kind
    text: str
    pages: int | None = None
    notes: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Document:
    """The document in a file, or in a pipe such as a shell's <(command).

    progress(done, total) counts the pages of a PDF.
    Raises FileTrouble for what is missing, a directory or unreadable; Refused for what is empty, binary, too large, or
    a PDF that is encrypted, damaged or without text; MrropeError for a PDF where pypdf is missing.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read(file, path, progress)
    except OSError as error:
        raise _trouble(path, error) from None


def read_all(paths: Iterable[str | os.PathLike[str]], *, progress: Progress | None = None) -> list[Document]:
    """Every document, in order; a file named twice is read once, and names that would be the same get their folder.

    One that cannot be read stops all of them: its error is raised, or one error that lists them all.
    """
    files = list({os.path.realpath(path): Path(path) for path in paths}.values())
    found: list[Document] = []
    errors: list[MrropeError] = []
    for path in files:
        try:
            found.append(read(path, progress=progress))
        except MrropeError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = [f"{error.what} ({error.why})" for error in errors]
        raise MrropeError(
            f"{len(errors)} of {len(files)} documents cannot be read",
            why="\n       ".join(lines),
            fix="; ".join(dict.fromkeys(error.fix for error in errors)),
        )
    return _told_apart(found, files)


def tokens_of(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[int]:
    """The tokens that the text of each document takes by itself, without BOS.

    tokenizer: a vocab.Vocab, which needs no weights, or a llama_cpp.Llama. Takes 1 s for 1 to 3 MB of text.
    """
    count = counter(tokenizer)
    return [count(document.text.encode()) for document in documents]


def _read(file: IO[bytes], path: Path, progress: Progress | None) -> Document:
    name = printable(path.name)
    regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    size = os.fstat(file.fileno()).st_size
    head = _take(file, _HEAD)
    if not head:
        raise _empty(name, "it has no bytes")
    if _is_pdf(head, path.suffix):
        if size > MOST_PDF_BYTES:
            raise _too_large(name, size, MOST_PDF_BYTES)
        whole = file if regular else io.BytesIO(head + _take(file, MOST_PDF_BYTES - len(head)))
        return _pdf(whole, name, progress)
    if what := not_text(head):
        raise Refused(
            f"{name}: this is {what}, not a text",
            why="plain text, Markdown, HTML and PDF are read",
            fix="open it in the program it belongs to and save it as one of those",
        )
    if regular and size > MOST_BYTES:
        raise _too_large(name, size, MOST_BYTES)
    data = head + _take(file, MOST_BYTES + 1 - len(head))
    if len(data) > MOST_BYTES:
        raise _too_large(name, len(data), MOST_BYTES)
    return _text(data, name, path.suffix)


def _take(file: IO[bytes], most: int) -> bytes:
    """Up to `most` bytes, however small the pieces are that a pipe gives."""
    return file.read(most) if most > 0 else b""


def _is_pdf(head: bytes, suffix: str) -> bool:
    return head.lstrip().startswith(b"%PDF-") or (suffix.lower() == ".pdf" and b"%PDF-" in head[:1024])


def _pdf(file: IO[bytes], name: str, progress: Progress | None) -> Document:
    from .pdf_text import no_text, pdf_text

    file.seek(0)
    text, pages, notes = pdf_text(file, name, most=MOST_BYTES, progress=progress)
    text, lost = clean(text.encode("utf-8", "replace").decode())  # fonts may map to half a surrogate pair
    if not text.strip():  # or to control characters alone
        raise no_text(name, pages)
    return Document(name, "pdf", text, pages, (*notes, *lost))


def _text(data: bytes, name: str, suffix: str) -> Document:
    from .html_text import charset, html_text, is_html

    page = is_html(data[:_HEAD], suffix)
    text, notes = decode(data, charset(data) if page else None)
    text, lost = clean(text)
    if not text.strip():
        raise _empty(name, "there is nothing in it but blanks")
    if not page:
        kind: Kind = "markdown" if _is_markdown(text, suffix) else "text"
        return Document(name, kind, text, None, (*notes, *lost))
    text = clean(html_text(text))[0]  # entities may spell out what was left out above
    if not text.strip():
        raise _empty(name, "it is a page whose text a script would have to fetch")
    return Document(name, "html", text, None, (*notes, *lost))


def _is_markdown(text: str, suffix: str) -> bool:
    if suffix.lower() in (".md", ".markdown", ".mkd"):
        return True
    return len(_MARKDOWN.findall(text[:_HEAD])) > 1 and bool(_LINK.search(text[:_HEAD]) or "```" in text)


def _told_apart(documents: list[Document], paths: list[Path]) -> list[Document]:
    names = [document.name for document in documents]
    return [
        replace(document, name=printable(str(path))) if names.count(document.name) > 1 else document
        for document, path in zip(documents, paths, strict=True)
    ]


def _empty(name: str, why: str) -> Refused:
    return Refused(
        f"{name}: this document is empty", why=why, fix="leave it out, or see whether the right file is named"
    )


def _too_large(name: str, size: int, most: int) -> Refused:
    return Refused(
        f"{name}: too large for a document",
        why=f"{size / 1e6:.0f} MB, and {most / 1e6:.0f} MB are read at most; a context of 1M tokens holds some 4 MB",
        fix="take the part that matters: head -c 4M, split -C 4M",
    )


def _trouble(path: Path, error: OSError) -> FileTrouble:
    name = printable(str(path))
    if error.errno == errno.ENOENT:
        return FileTrouble(f"{name}: no such file", why=_nearby(path), fix="check the name")
    if error.errno == errno.EISDIR or path.is_dir():  # Windows says that it may not be read
        return FileTrouble(f"{name}: this is a directory", why="documents are files", fix="name the files in it")
    return FileTrouble(f"{name}: cannot be read", why=error.strerror or str(error), fix="check its permissions")


def _nearby(path: Path) -> str:
    """What is there instead of a missing file."""
    parent = path.parent
    try:
        names = os.listdir(parent)
    except OSError:
        return f"there is no folder {printable(str(parent))}"
    like = difflib.get_close_matches(path.name, names, n=1)
    return f"{printable(str(parent.absolute()))} has none" + (f"; it has {printable(like[0])}" if like else "")
