"""The engines that `mrrope build` installed: one folder each under the user's cache, with lib, bin and engine.json."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mrrope_gguf.aside import private_folder
from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.paths import cache_dir

INFO = "engine.json"
_REMOVED = ".removed-"


@dataclass(frozen=True)
class Engine:
    """A build: `pin` is the llama-cpp-python release whose patch it has, `commit` the llama.cpp it was made from.

    `built` is seconds since 1970. `commit` is empty where --source named a tree that git does not know, and ends in
    -dirty where that tree had changes.
    """

    path: Path
    key: str
    pin: str
    commit: str
    patch_hash: str
    backend: str
    rpc: bool
    server: bool
    tests: bool
    built: float

    @property
    def lib(self) -> Path:
        return self.path / "lib"

    @property
    def bin(self) -> Path:
        return self.path / "bin"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return folder_size(self.path)

    @property
    def ours(self) -> bool:
        """Whether only this user, and root, may put a library there: what lies there is run."""
        folders = [self.path.parent, self.path, self.lib, self.bin]
        return all(map(_ours, [*folders, *self.lib.glob("*"), *self.bin.glob("*")]))

    def save(self) -> None:
        """Write engine.json into the folder, for this user alone."""
        values = {name: value for name, value in asdict(self).items() if name != "path"}
        with open(self.path / INFO, "w", encoding="utf-8", opener=lambda path, how: os.open(path, how, 0o600)) as file:
            file.write(json.dumps(values, indent=2) + "\n")


def _ours(path: Path) -> bool:
    if os.name != "posix":
        return True
    try:
        found = path.stat()
    except OSError:  # a folder that this build has not, or a link that leads nowhere
        return True
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & stat.S_IWOTH


def engines_dir() -> Path:
    return cache_dir() / "engines"


def sources_dir() -> Path:
    """Where fetched archives are kept. Each is good for every backend and every set of flags."""
    return cache_dir() / "sources"


def read_engine(path: Path) -> Engine | None:
    """The build in a folder, or None where there is none that this version can read."""
    try:
        values: dict[str, Any] = json.loads((path / INFO).read_text(encoding="utf-8"))
        engine = Engine(path=path, **{name: values[name] for name in Engine.__dataclass_fields__ if name != "path"})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return engine if engine.lib.is_dir() else None


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, by name. Raises OSError where it cannot be listed."""
    while True:
        with suppress(InterruptedError):  # Python tries an interrupted open again, and no opendir
            return sorted(folder.iterdir())


def installed() -> list[Engine]:
    """All builds, newest first."""
    with suppress(OSError):
        folders = [folder for folder in listed(engines_dir()) if not folder.name.startswith(".")]
        found = [engine for engine in map(read_engine, folders) if engine]
        return sorted(found, key=lambda engine: engine.built, reverse=True)
    return []


def remove(names: list[str]) -> list[Engine]:
    """Delete builds, by key or by a beginning of it that fits only one; "all" for every one and the fetched sources.

    Raises Refused for a name that fits none or several, before anything is deleted, and for one that is being built;
    FileTrouble where it cannot be deleted. A build is all there or does not count as one, whenever that is cut short.
    """
    remove_removed()
    found = installed()
    chosen = found if names == ["all"] else [_named(name, found) for name in names]
    for engine in chosen:
        with lock(engine.key, wait=False):
            removed = engine.path.with_name(f"{_REMOVED}{engine.key}")
            try:
                os.replace(engine.path, removed)
                shutil.rmtree(removed)
            except OSError as error:
                fix = "delete it by hand" if removed.exists() else "check the permissions of its folder, and the disk"
                raise FileTrouble(f"{engine.path}: not removed, or in part", why=str(error), fix=fix) from error
    if names == ["all"]:
        _remove_left(".work-")
        shutil.rmtree(sources_dir(), ignore_errors=True)
    return chosen


def remove_removed() -> None:
    """Delete what a removal that was cut short has left."""
    _remove_left(_REMOVED)


def _remove_left(prefix: str) -> None:
    """Delete the folders of this prefix and a build's key that no process is at."""
    with suppress(OSError):
        for folder in listed(engines_dir()):
            if folder.name.startswith(prefix):
                remove_work(folder, folder.name.removeprefix(prefix))


def remove_work(work: Path, key: str) -> None:
    """Delete the folder that a build was made in, or was, unless another process has its lock."""
    if work.exists():
        with suppress(Refused, FileTrouble), lock(key, wait=False):
            shutil.rmtree(work, ignore_errors=True)


def _named(name: str, found: list[Engine]) -> Engine:
    fitting = [e for e in found if e.key == name] or [e for e in found if name and e.key.startswith(name)]
    if len(fitting) != 1:
        keys = ", ".join(engine.key for engine in fitting or found) or "none"
        raise Refused(
            f"{name!r} names {'several builds' if fitting else 'no build'}",
            why=f"{'it fits' if fitting else 'there are'}: {keys}",
            fix="`mrrope build --list` shows the keys; `mrrope build --remove KEY`",
        )
    return fitting[0]


def folder_size(path: Path) -> int:
    """Bytes of all files below a folder; links count nothing."""
    files = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return sum(file.stat().st_size for file in files if not file.is_symlink())


@contextmanager
def lock(key: str, *, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of one build. The system frees it when a process dies, so none is ever left behind.

    `waiting` is called once if another process holds it. Without `wait`, Refused is raised then.
    """
    path = engines_dir() / f".{key}.lock"
    try:
        private_folder(path.parent)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b")
    except OSError as error:
        fix = "set MRROPE_CACHE to a folder that can be written"
        raise FileTrouble(f"{path.parent}: engines cannot be kept there", why=str(error), fix=fix) from error
    try:
        if not _try_lock(file):
            if not wait:
                raise Refused(
                    f"{key} is being built", why="another process holds its lock", fix="wait until it is done"
                )
            waiting()
            while not _try_lock(file):
                time.sleep(0.2)
        try:
            yield
        finally:
            with suppress(OSError):  # closing it frees it too
                _unlock(file)
    finally:
        with suppress(OSError):
            file.close()


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:

    def _try_lock(file: IO[bytes]) -> bool:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # waiting for it would never end
            raise FileTrouble(
                f"{file.name}: cannot be locked",
                why=str(error),
                fix="set MRROPE_CACHE to a folder on a local disk",
            ) from error
        return True

    def _unlock(file: IO[bytes]) -> None:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
