"""The llama.cpp trees there is a patch for: patches/UPSTREAM, and what belongs to each of its lines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mrrope_gguf.errors import EngineTrouble

# the release whose llama.cpp the facts in this package were read from
PIN = "0.3.36"
_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parents[1]


@dataclass(frozen=True)
class Pin:
    """A release of llama-cpp-python: the commit of the llama.cpp it vendors, its sdist, and that archive's sha256."""

    release: str
    commit: str
    sdist: str
    sha256: str

    @property
    def patch(self) -> Path:
        return data_dir() / f"llama-cpp-python-{self.release}.patch"

    @property
    def patch_hash(self) -> str:
        """That of the patch and mrrope.h as they are now."""
        return added_hash(self.patch.read_bytes(), header().read_bytes())


def added_hash(patch: bytes, header: bytes) -> str:
    """12 hex digits of what is added to a tree."""
    return hashlib.sha256(patch + header).hexdigest()[:12]


def data_dir() -> Path:
    """The folder with UPSTREAM and the patches: the checkout's, where this is one, else the installed package's."""
    return _CHECKOUT / "patches" if _is_checkout() else _HERE / "patches"


def header() -> Path:
    """mrrope.h, which goes into the patched tree as it is."""
    return _CHECKOUT / "native" / "mrrope.h" if _is_checkout() else _HERE / "patches" / "mrrope.h"


def _is_checkout() -> bool:
    # an editable install keeps older copies beside the compiled core; the sources are the truth
    return (_CHECKOUT / "patches" / "UPSTREAM").is_file() and (_CHECKOUT / "native" / "mrrope.h").is_file()


@cache
def pins() -> dict[str, Pin]:
    """Every pin by its release, newest first."""
    return parse((data_dir() / "UPSTREAM").read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, Pin]:
    """The pins of an UPSTREAM file. ValueError names the line that is not one.

    >>> parse("0.1 " + "a" * 40 + " x.tar.gz " + "b" * 64)["0.1"].sdist
    'x.tar.gz'
    """
    found: dict[str, Pin] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 4 or not (_hex(words[1], 40) and _hex(words[3], 64)) or words[0] in found:
            raise ValueError(f"UPSTREAM line {number} is not 'release commit sdist sha256': {line!r}")
        found[words[0]] = Pin(*words)
    return found


def _hex(word: str, digits: int) -> bool:
    return len(word) == digits and set(word) <= set("0123456789abcdef")


def pin(release: str) -> Pin:
    """The pin of that release of llama-cpp-python. EngineTrouble where there is no patch for it."""
    found = pins().get(release)
    if found is None:
        raise EngineTrouble(
            f"there is no patch for the llama.cpp of llama-cpp-python {release}",
            why=f"this version of mrrope-gguf has patches for {', '.join(pins())}",
            fix=f"`pip install llama-cpp-python=={PIN}`, or `mrrope build --pin {PIN}` for llama.cpp's own programs",
        )
    return found


def commits_differ(a: str, b: str) -> bool:
    """Whether two names of commits, each perhaps short or followed by -dirty or -mrrope, name different ones.

    >>> commits_differ("0c1e570-dirty", "0c1e57098bba"), commits_differ("unknown", "0c1e57")
    (False, False)
    >>> commits_differ("ab12", "ab13")
    True
    """
    a, b = a.partition("-")[0], b.partition("-")[0]
    known = all(len(word) >= 4 and set(word) <= set("0123456789abcdef") for word in (a, b))
    return known and not (a.startswith(b) or b.startswith(a))
