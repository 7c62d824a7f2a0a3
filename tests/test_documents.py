"""Documents for a chat: every kind as text, encodings as they come, and one clear error for what cannot be read."""

from __future__ import annotations

import io
import os
import re
import threading
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrrope_gguf import documents
from mrrope_gguf.documents import Document, read, read_all, tokens_of
from mrrope_gguf.errors import FileTrouble, MrropeError, Refused
from mrrope_gguf.vocab import Vocab, counter
from tests import tiny
from tests.pdf_bytes import PICTURE, aes_encrypted, encrypted, pdf, text_page

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and links as POSIX has them")
PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>The Sea &amp; the Sky</title>
<style>p { color: red }</style><script>var a = "<p>not text</p>";</script></head>
<body><nav hidden><div>menu</div></nav>
<h1>Of  the
sea</h1><p>Salt &amp; foam,<br>caf&eacute; &#8212; <b>bo</b>ld.<p>Unclosed.
<ul><li>one<li>two <i>2</i></ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre>  keep
    this</pre><svg><text>drawn</text></svg><noscript>switch it on</noscript>
<ul><li><button>Light</button><li><button>Dark</button></ul><img src="x.png" alt="a whale"></body></html>"""
PAGE_TEXT = """The Sea & the Sky

# Of the sea

Salt & foam,
café — bold.

Unclosed.

- one
- two 2

a | b
1 | 2

  keep
    this

- Light
- Dark

a whale"""


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refused(path: Path, what: str, kind: type[MrropeError] = Refused) -> MrropeError:
    """The error that reading `path` gives: of its kind, naming the file, with a reason and a fix."""
    with pytest.raises(kind) as caught:
        read(path)
    assert what in caught.value.what
    assert caught.value.why
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ("Zoë’s œuvre".encode(), ""),
        ("Zoë’s œuvre".encode("utf-8-sig"), ""),
        ("\ufeffZoë’s œuvre".encode("utf-16-le"), ""),
        ("\ufeffZoë’s œuvre".encode("utf-16-be"), ""),
        ("\ufeffZoë’s œuvre".encode("utf-32-le"), ""),
        ("\ufeffZoë’s œuvre".encode("utf-32-be"), ""),
        ("Zoë’s œuvre".encode("cp1252"), "not UTF-8 (byte 2 is 0xeb): read as Windows-1252 (cp1252)"),
    ],
)
def test_encodings(tmp_path: Path, data: bytes, note: str) -> None:
    found = read(put(tmp_path, "a.txt", data))
    assert found == Document("a.txt", "text", "Zoë’s œuvre", None, (note,) if note else ())


def test_one_broken_byte_does_not_make_utf8_another_encoding(tmp_path: Path) -> None:
    found = read(put(tmp_path, "a.txt", "déjà vu ".encode() * 9 + b"\xff!"))
    assert found.text == "déjà vu " * 9 + "\ufffd!"
    assert found.notes == ("not all UTF-8: 1 places became U+FFFD, the first at byte 90",)


def test_utf16_cut_in_a_character(tmp_path: Path) -> None:
    found = read(put(tmp_path, "a.txt", "\ufeffwell".encode("utf-16-le")[:-1]))
    assert found.text == "wel\ufffd"
    assert "1 places" in found.notes[0]


def test_line_ends_escapes_and_controls(tmp_path: Path) -> None:
    raw = "one\r\ntwo\rthree\x0cfour\x1b[31mred\x1b[0m \x1b]0;title\x07b\x08ell\x07\ttab \x9b1m é" + "x" * 900
    found = read(put(tmp_path, "log.txt", raw))
    assert found.text.rstrip("x") == "one\ntwo\nthree\nfourred bell\ttab 1m é"
    assert found.notes == ("3 terminal escapes and 3 control characters left out",)


def test_a_name_cannot_command_the_terminal(tmp_path: Path) -> None:
    name = "no\x1b[2Jte\u202e.txt"
    assert read(put(tmp_path, name, "text")).name == "no\\e[2Jte\\u202e.txt"
    assert "\x1b" not in str(refused(put(tmp_path, "\x1b[2J.txt", ""), "empty"))
    assert "\x1b" not in str(refused(tmp_path / "\x1b[3J.txt", "no such file", FileTrouble))


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("notes.md", "just a line", "markdown"),
        ("notes", "# Title\n\nSee [this](http://x).\n\n## More\n", "markdown"),
        ("notes.txt", "# a comment\nx = 1\n", "text"),
        ("page.txt", PAGE, "html"),
        ("page.html", "<p>a fragment</p>", "html"),
        ("list.html", "2 < 3 and 4 > 1", "text"),
        ("saved", "<?xml version='1.0'?>\n<!-- saved -->\n<HTML><p>x</HTML>", "html"),
    ],
)
def test_the_content_says_what_it_is(tmp_path: Path, name: str, text: str, kind: str) -> None:
    assert read(put(tmp_path, name, text)).kind == kind


def test_html(tmp_path: Path) -> None:
    assert read(put(tmp_path, "sea.html", PAGE)) == Document("sea.html", "html", PAGE_TEXT)


@pytest.mark.parametrize("encoding", ["iso-8859-1", "shift_jis", "utf-16", "koi8-r", "windows-1252"])
def test_html_says_its_encoding(tmp_path: Path, encoding: str) -> None:
    words = {"shift_jis": "日本語", "koi8-r": "Привет"}.get(encoding, "“déjà vu”")
    page = f'<html><head><meta http-equiv="Content-Type" content="text/html; charset={encoding}"></head><p>{words}'
    data = page.encode("cp1252" if encoding == "iso-8859-1" else encoding)  # as browsers understand that name
    found = read(put(tmp_path, "a.html", data))
    assert (found.kind, found.text, found.notes) == ("html", words, ())


@pytest.mark.parametrize("wrong", ["rot13", "unicode_escape", "hex", "nonsense", "utf-16"])
def test_html_that_says_nonsense_of_its_encoding(tmp_path: Path, wrong: str) -> None:
    assert read(put(tmp_path, "a.html", f"<html><meta charset={wrong}><p>caf\u00e9 \\x41")).text == "café \\x41"


def test_html_left_open_and_hostile(tmp_path: Path) -> None:
    """Ends that never come lose nothing that a reader would see, and entities bring no escapes back."""
    page = "<html><title>T &lt; U</title><body><div><p>a&#27;[31m&#x7;b<b>c<li hidden>d"
    assert read(put(tmp_path, "a.html", page)).text == "T < U\n\na[31mbc\n- d"
    deep = "<html>" + "<div>" * 20000 + "x" + "</div>" * 20000
    assert read(put(tmp_path, "deep.html", deep)).text == "x"


def test_pdf(tmp_path: Path) -> None:
    data = pdf(text_page("Call me Ishmael.", "Some years ago"), text_page("Page two."))
    seen: list[tuple[int, int]] = []
    found = read(put(tmp_path, "moby.pdf", data), progress=lambda done, total: seen.append((done, total)))
    assert found == Document("moby.pdf", "pdf", "Call me Ishmael.\nSome years ago\n\nPage two.", 2)
    assert seen == [(1, 2), (2, 2)]
    assert read(put(tmp_path, "no-suffix", data)).pages == 2
    assert read(put(tmp_path, "junk.pdf", b"mail header\n" + data)).pages == 2


def test_pdf_with_scanned_pages_among_the_others(tmp_path: Path) -> None:
    found = read(put(tmp_path, "a.pdf", pdf(PICTURE, text_page("words"), "", PICTURE)))
    assert (found.text, found.pages) == ("words", 4)
    assert found.notes == ("no text on pages 1, 3-4: empty or scanned",)


def test_pdf_of_scans_alone(tmp_path: Path) -> None:
    error = refused(put(tmp_path, "scan.pdf", pdf(PICTURE, PICTURE)), "scan.pdf: this PDF holds no text")
    assert error.why.startswith("pages: 2")
    assert "ocrmypdf" in error.fix


def test_encrypted_pdf(tmp_path: Path) -> None:
    data = pdf(text_page("a secret"))
    assert "qpdf" in refused(put(tmp_path, "a.pdf", encrypted(data, "word")), "a.pdf: this PDF is encrypted").fix
    assert read(put(tmp_path, "b.pdf", encrypted(data, ""))).text == "a secret"


def test_pdf_under_aes_asks_for_what_undoes_it(tmp_path: Path) -> None:
    path = put(tmp_path, "a.pdf", aes_encrypted())
    if find_spec("cryptography") or find_spec("Crypto"):
        assert read(path).text == "a secret"
    else:
        assert "pip install cryptography" in refused(path, "a.pdf: this PDF is encrypted by AES").fix


@pytest.mark.parametrize("cut", [9, 200, 400])
def test_damaged_pdf(tmp_path: Path, cut: int) -> None:
    refused(put(tmp_path, "a.pdf", pdf(text_page("x"))[:cut]), "a.pdf: ")


def test_pdf_without_pypdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    error = refused(put(tmp_path, "a.pdf", pdf(text_page("x"))), "needs pypdf", MrropeError)
    assert error.fix == "pip install 'mrrope-gguf[chat]'"


SEEDS = (pdf(text_page("some words"), PICTURE), PAGE.encode(), b"\xef\xbb\xbf# T\n", b"\xff\xfe<\0h\0t\0m\0l\0>\0")


@given(seed=st.sampled_from(SEEDS), at=st.integers(0, 1500), new=st.binary(max_size=40), cut=st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_document_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, seed: bytes, at: int, new: bytes, cut: int
) -> None:
    at = at % (len(seed) + 1)
    path = put(tmp_path_factory.getbasetemp(), "any-document", seed[:at] + new + seed[at + cut :])
    found: Document | MrropeError
    try:
        found = read(path)
    except MrropeError as error:
        found = error
    if isinstance(found, MrropeError):
        assert found.why
        assert found.fix
    else:
        assert found.text.strip()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", found.text)
        assert found.text.encode()


def _docx() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("word/document.xml", "<w>words</w>")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (_docx(), "a ZIP archive, as .docx"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG picture"),
        (b"GGUF\x03\0\0\0", "a GGUF model"),
        (b"{\\rtf1 words}", "an RTF document"),
        (b"text and\0a NUL", "a binary file"),
        (bytes(range(1, 32)) * 9, "a binary file"),
    ],
)
def test_binary_files_are_named(tmp_path: Path, data: bytes, what: str) -> None:
    refused(put(tmp_path, "notes.txt", data), f"notes.txt: this is {what}")


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"<html><script>go()</script></html>"])
def test_empty(tmp_path: Path, data: bytes) -> None:
    refused(put(tmp_path, "a.txt", data), "a.txt: this document is empty")


def test_missing_directory_and_unreadable(tmp_path: Path) -> None:
    put(tmp_path, "chapter-1.txt", "x")
    assert "it has chapter-1.txt" in refused(tmp_path / "chapter1.txt", "no such file", FileTrouble).why
    assert "there is no folder" in refused(tmp_path / "no" / "a.txt", "no such file", FileTrouble).why
    refused(tmp_path, "this is a directory", FileTrouble)


@POSIX
def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "cannot be read", FileTrouble)
    closed = put(tmp_path, "closed.txt", "x")
    closed.chmod(0)
    if not os.access(closed, os.R_OK):  # root reads everything
        assert "ermission" in refused(closed, "cannot be read", FileTrouble).why


def test_too_large_is_known_before_it_is_read(tmp_path: Path) -> None:
    huge = put(tmp_path, "dump.txt", "a line\n" * 20000)
    os.truncate(huge, 300_000_000)  # the rest is a hole, no bytes on the disk
    assert refused(huge, "dump.txt: too large").why.startswith("300 MB, and 34 MB are read at most")


def test_a_pdf_with_too_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 100)
    error = refused(put(tmp_path, "a.pdf", pdf(*[text_page("w" * 60)] * 3)), "its text is too long")
    assert "the first 2 of 3 pages have 120 characters, and 100" in error.why


@POSIX
@pytest.mark.parametrize("data", [b"words\n" * 30000, pdf(text_page("words"))])
def test_a_pipe(tmp_path: Path, data: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    found = read(pipe)
    writer.join()
    assert found.text.split() == ["words"] * (30000 if found.kind == "text" else 1)


@POSIX
def test_a_pipe_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 100_000)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def pour() -> None:
        with suppress(BrokenPipeError), open(pipe, "wb", buffering=0) as out:
            while True:
                out.write(b"words " * 1000)

    writer = threading.Thread(target=pour)
    writer.start()
    refused(pipe, "too large")
    writer.join()


def test_several_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = put(tmp_path / "a", "notes.txt", "one"), put(tmp_path / "b", "notes.txt", "two")
    third = put(tmp_path, "page.html", PAGE)
    found = read_all([first, third, second, third])
    assert [d.name for d in found] == [str(first), "page.html", str(second)]
    assert [d.kind for d in found] == ["text", "html", "text"]


def test_several_of_which_some_cannot_be_read(tmp_path: Path) -> None:
    good, bad = put(tmp_path, "a.txt", "x"), put(tmp_path, "b.txt", "")
    with pytest.raises(Refused, match=r"b\.txt: this document is empty"):
        read_all([good, bad])
    with pytest.raises(MrropeError) as caught:
        read_all([bad, good, tmp_path / "c.txt"])
    assert caught.value.what == "2 of 3 documents cannot be read"
    assert "b.txt: this document is empty" in caught.value.why
    assert "c.txt: no such file" in caught.value.why


@pytest.mark.engine
def test_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    import llama_cpp

    model = tiny.make(tmp_path / "tiny.gguf")
    found = [Document("a", "text", "the then </s> é"), Document("b", "html", "in the tin " * 500)]
    llm = llama_cpp.Llama(str(model), n_ctx=64, verbose=False)
    expected = [len(llm.tokenize(d.text.encode(), add_bos=False, special=False)) for d in found]
    with Vocab(model) as vocab:
        assert tokens_of(vocab, found) == tokens_of(llm, found) == expected
        for special in (False, True):
            tokens = vocab.tokenize(found[0].text.encode(), True, special)
            assert tokens == llm.tokenize(found[0].text.encode(), True, special)
            assert (2 in tokens) == special  # </s>
    llm.close()


def test_a_tokenizer_of_any_kind() -> None:
    from tests.eval_text import Bytes

    assert counter(Bytes())("é</s>".encode()) == 6


@pytest.mark.engine
def test_vocab_of_a_split_model_and_of_none(tmp_path: Path) -> None:
    first = tiny.make(tmp_path / "split.gguf", split=2)
    second = Path(str(first).replace("00001-of", "00002-of"))
    with Vocab(second) as vocab:
        assert vocab.count(b"the", add_bos=False) == len(vocab.tokenize(b"the", add_bos=False)) == 1
    model = tiny.make(tmp_path / "none.gguf", extra={"tokenizer.ggml.model": "none", "vocab_size": tiny.N_VOCAB})
    with pytest.raises(MrropeError, match="the file has no tokenizer"):
        Vocab(model)


@pytest.mark.engine
@pytest.mark.real
def test_tokens_of_a_book_before_any_weight_is_read(smollm2: Path, tmp_path: Path) -> None:
    from mrrope_gguf import texts

    book = read(texts.save("doctor-moreau"))
    with Vocab(smollm2) as vocab:
        assert tokens_of(vocab, [book]) == [texts.TEXTS["doctor-moreau"].tokens - 1]  # its last newline
