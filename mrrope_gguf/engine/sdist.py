"""The llama.cpp sources of a pin: llama-cpp-python's sdist, fetched by pip, its hash checked before anything else."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mrrope_gguf.archives import Archive, download
from mrrope_gguf.aside import private_folder
from mrrope_gguf.engine.pins import Pin
from mrrope_gguf.engine.store import sources_dir
from mrrope_gguf.errors import EngineTrouble, FileTrouble, MrropeError
from mrrope_gguf.fetch import Say, require_sha256, sha256

# 300 MB is the whole tree; nothing an sdist of this project holds comes near these
MAX_FILE, MAX_TREE = 256 << 20, 2 << 30


def fetch_sdist(pin: Pin, say: Say) -> Path:
    """The pin's archive in the cache, downloaded where it is missing or damaged.

    Raises EngineTrouble if pip cannot bring it or its sha256 is another, FileTrouble if the cache cannot be written.
    """
    path = sources_dir() / pin.sdist
    if path.is_file() and sha256(path) == pin.sha256:
        return path
    say(f"fetching llama-cpp-python {pin.release} (sources, about 75 MB) with pip")
    try:
        with tempfile.TemporaryDirectory(dir=private_folder(path.parent)) as folder:
            archive = _download(pin, Path(folder))
            archive.chmod(0o600)
            os.replace(archive, path)
    except OSError as error:
        raise FileTrouble(
            f"{path.parent}: cannot keep {pin.sdist} there",
            why=str(error),
            fix="free some space, or set MRROPE_CACHE to a folder that can be written",
        ) from error
    return path


def _download(pin: Pin, folder: Path) -> Path:
    try:
        archive = download(Archive(f"llama-cpp-python=={pin.release}", pin.sdist, pin.sha256), folder)
    except MrropeError as error:
        raise EngineTrouble(
            f"llama-cpp-python {pin.release}: pip could not download its sources",
            why=error.why,
            fix=f"{error.fix}, or name a llama.cpp checkout: `mrrope build --source DIR`",
        ) from error
    check_hash(archive, pin)
    return archive


def check_hash(archive: Path, pin: Pin) -> None:
    """EngineTrouble where the archive is not the pin's, byte for byte."""
    require_sha256(archive, pin.sha256, "these are not the sources there is a patch for", EngineTrouble)


def unpack(archive: Path, into: Path) -> None:
    """llama.cpp's tree, out of the sdist, into an empty folder. EngineTrouble for an archive that is none or unsafe."""
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4 and later refuse much of it by themselves
                tar.extraction_filter = tarfile.data_filter
            for member in _tree(tar, archive.name):
                tar.extract(member, into)
    except (tarfile.TarError, EOFError) as error:
        fix = "run the same command again; `mrrope build --remove all` clears what was fetched"
        raise EngineTrouble(f"{archive.name}: cannot be unpacked", why=str(error), fix=fix) from error
    if not (into / "CMakeLists.txt").is_file():
        raise EngineTrouble(
            f"{archive.name}: holds no llama.cpp",
            why="there is no vendor/llama.cpp/CMakeLists.txt in it",
            fix="upgrade mrrope-gguf",
        )


def _tree(tar: tarfile.TarFile, archive: str) -> Iterator[tarfile.TarInfo]:
    """The members under vendor/llama.cpp, renamed to lie in its root; git's own files left out."""
    total = 0
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if len(parts) < 4 or parts[1:3] != ("vendor", "llama.cpp") or parts[3] == ".git":
            continue
        inside = parts[3:]
        total += member.size
        if ".." in inside or any("\\" in part or ":" in part for part in inside):
            raise _unsafe(archive, member, "its name leaves the folder")
        if not (member.isfile() or member.isdir()):
            raise _unsafe(archive, member, "it is neither a file nor a folder, and llama.cpp has nothing else")
        if member.size > MAX_FILE or total > MAX_TREE:
            raise _unsafe(archive, member, f"{member.size} bytes of it, {total} in all, are more than llama.cpp has")
        member.name = "/".join(inside)
        yield member


def _unsafe(archive: str, member: tarfile.TarInfo, why: str) -> EngineTrouble:
    return EngineTrouble(
        f"{archive}: not unpacked, {member.name!r} is unsafe",
        why=why,
        fix="fetch the archive again from a trusted index",
    )
