"""HTML to text with Python's own parser: blocks become paragraphs, what a reader does not see is dropped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_DROPPED = frozenset(
    ("script", "style", "noscript", "template", "svg", "iframe", "object", "canvas", "audio", "video", "select")
)
_BLOCKS = frozenset(
    (
        "address", "article", "aside", "blockquote", "body", "button", "caption", "dd", "details", "dialog", "div",
        "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head",
        "header", "hr", "html", "legend", "li", "main", "menu", "nav", "ol", "optgroup", "option", "p", "pre",
        "section", "summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul",
    )
)  # fmt: skip
_CONTAINERS = frozenset(("article", "aside", "div", "footer", "form", "header", "main", "nav", "section", "span", "ul"))
_CLOSE = frozenset(("button", "caption", "dd", "dt", "li", "option", "tr"))  # lines of one block, not paragraphs
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_SPACES = re.compile(r"[ \t\n\r\f]+")
_START = re.compile(
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
_TAG = re.compile(rb"</?[a-z][a-z0-9]*[\s/>]", re.IGNORECASE)
_CHARSET = re.compile(
    rb"""<meta[^>]*?charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)""", re.IGNORECASE
)
_HEAD = 4096  # bytes within which a page must say its encoding; browsers read 1024


def is_html(head: bytes, suffix: str) -> bool:
    """Whether a file that begins with `head` is a page: it starts as one, or is named as one and has a tag."""
    head = head.replace(b"\0", b"").removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff").removeprefix(b"\xef\xbb\xbf")
    return bool(_START.match(head)) or (suffix.lower() in (".html", ".htm", ".xhtml") and bool(_TAG.search(head)))


def charset(data: bytes) -> str | None:
    """The encoding that a page declares in a meta element or an XML declaration."""
    found = _CHARSET.search(data[:_HEAD])
    return (found[1] or found[2]).decode("ascii") if found else None


def html_text(page: str) -> str:
    """The text of a page: its title, then its blocks, a blank line between them.

    Headings get Markdown's #, items of lists a dash, cells of a row a bar between them; `pre` keeps its lines.
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return reader.text()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._blocks: list[str] = []  # finished, each with the newlines that go before it
        self._line: list[str] = []
        self._gap = ""
        self._mark = ""  # "# " or "- ", for the next text
        self._hidden: list[str] = []  # open elements from the outermost dropped one inwards
        self._pre = 0
        self._title: list[str] | None = None
        self._titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden:
            if tag == self._hidden[0]:
                self._hidden.append(tag)
            return
        if tag in _DROPPED or (tag in _CONTAINERS and any(name == "hidden" for name, _ in attrs)):
            self._hidden.append(tag)
            return
        if tag == "br":
            self._end("\n")
        elif tag in ("td", "th"):
            if any(part.strip() for part in self._line):
                self._line.append(" | ")
        elif tag == "img":
            self._line.append(next((f" {value} " for name, value in attrs if name == "alt" and value), ""))
        elif tag in _BLOCKS:
            self._open(tag)

    def _open(self, tag: str) -> None:
        self._end("\n" if tag in _CLOSE else "\n\n")
        if tag == "pre":
            self._pre += 1
        elif tag == "title" and not self._titles:
            self._title = []
        elif tag == "li":
            self._mark = "- "
        elif tag in _HEADINGS:
            self._mark = _HEADINGS[tag] + " "

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag == self._hidden[0]:
                self._hidden.pop()
            return
        if tag == "title" and self._title is not None:
            self._titles.append(_SPACES.sub(" ", "".join(self._title)).strip())
            self._title = None
        if tag in _BLOCKS:
            self._end("\n" if tag in _CLOSE else "\n\n")
            self._mark = ""
        if tag == "pre":
            self._pre = max(0, self._pre - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag in _DROPPED and self._hidden:
            self._hidden.pop()

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._title is not None:
            self._title.append(data)
        elif self._pre:
            self._line.append(data)
        else:
            self._line.append(_SPACES.sub(" ", data))

    def _end(self, gap: str) -> None:
        """The line so far becomes a block; the next one is kept `gap` apart from it."""
        text = "".join(self._line)
        text = text.strip("\n") if self._pre else re.sub(" {2,}", " ", text).strip()
        self._line.clear()
        if text.strip():
            self._blocks.append(self._gap + self._mark + text if self._blocks else self._mark + text)
            self._mark, self._gap = "", ""
        self._gap = max(self._gap, gap)

    def text(self) -> str:
        """Everything read; what an unclosed title swallowed is text."""
        if self._title is not None:
            self._line = self._title
        self._end("\n\n")
        body = "".join(self._blocks)
        title = self._titles[0] if self._titles else ""
        first = body.split("\n", 1)[0].lstrip("# ")
        return f"{title}\n\n{body}".strip() if title and title != first else body
