"""A llama.cpp tree that the user names: copied, never changed; merged by git where it is a checkout of git's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.engine.patching import Misfit, apply_patch, does_not_fit, fit
from mrrope_gguf.engine.pins import Pin, pins
from mrrope_gguf.errors import EngineTrouble

# what builds and downloads leave in a tree that git does not know
_NOT_SOURCES = {".git", ".cache", ".venv", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class Checkout:
    """The tree at `path`: its files (relative), its commit where git knows it, and a hash of all their bytes.

    `dirty`: something that git tracks differs from the commit.
    """

    path: Path
    files: tuple[str, ...]
    commit: str | None
    dirty: bool
    digest: str

    @property
    def is_git(self) -> bool:
        return self.commit is not None


def open_checkout(path: Path) -> Checkout:
    """Look at a llama.cpp tree. EngineTrouble if it is none."""
    path = path.resolve()
    if not (path / "src" / "llama-model.cpp").is_file() or not (path / "CMakeLists.txt").is_file():
        inside = path / "vendor" / "llama.cpp"
        raise EngineTrouble(
            f"{path}: this is not a llama.cpp source tree",
            why="there is no CMakeLists.txt with src/llama-model.cpp beside it",
            fix=f"`mrrope build --source {inside}`" if inside.is_dir() else "name the root of a llama.cpp checkout",
        )
    commit = _git(path, "rev-parse", "HEAD") if _is_root(path) else None
    dirty = bool(commit and _git(path, "status", "--porcelain", "--untracked-files=no"))
    files = _tracked(path) if commit else _walked(path)
    return Checkout(path, files, commit, dirty, _digest(path, files))


def _is_root(path: Path) -> bool:
    """Whether git takes this very folder for a checkout, and not one above it."""
    top = _git(path, "rev-parse", "--show-toplevel")
    return top is not None and Path(top).resolve() == path


def _git(path: Path, *words: str) -> str | None:
    """What git says, or None where there is no git or it fails."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(path), *words]
    run = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None


def _environment() -> dict[str, str]:
    """Without what would make git look at another repository, as within a hook, or follow the user's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, "LC_ALL": "C"}


def _tracked(path: Path) -> tuple[str, ...]:
    listed = _git(path, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or ""
    return tuple(sorted({name for name in listed.split("\0") if name and (path / name).is_file()}))


def _walked(path: Path) -> tuple[str, ...]:
    found = []
    for folder, inner, names in os.walk(path):
        inner[:] = [
            name for name in inner if name not in _NOT_SOURCES and not (Path(folder) / name / "CMakeCache.txt").exists()
        ]
        found += [(Path(folder) / name).relative_to(path).as_posix() for name in names if name not in _NOT_SOURCES]
    return tuple(sorted(name for name in found if (path / name).is_file()))


def _digest(path: Path, files: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + b"\0" + hashlib.sha256((path / name).read_bytes()).digest())
    return digest.hexdigest()


def pin_for(checkout: Checkout) -> Pin:
    """The pin whose patch this tree takes: that of its commit, else the one of which the fewest hunks do not fit."""
    known = [pin for pin in pins().values() if pin.patch.is_file()]
    for pin in known:
        if pin.commit == checkout.commit:
            return pin
    return min(known, key=lambda pin: len(fit(checkout.path, pin.patch.read_bytes())[1]))


def copy_and_patch(checkout: Checkout, into: Path, patch: Path) -> None:
    """The tree's copy in the empty folder `into`, patched. The tree itself is only read.

    Raises EngineTrouble naming the hunks that neither fit nor can be merged.
    """
    for name in checkout.files:
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(checkout.path / name, target)
    if not fit(into, patch.read_bytes())[1] or not checkout.is_git:
        apply_patch(into, patch, str(checkout.path))
        return
    _merge(checkout, into, patch)


def _merge(checkout: Checkout, into: Path, patch: Path) -> None:
    """`git apply --3way` in the copy, which borrows the objects of the user's repository."""
    objects = Path(_git(checkout.path, "rev-parse", "--git-path", "objects") or "")
    environment = {**_environment(), "GIT_ALTERNATE_OBJECT_DIRECTORIES": str((checkout.path / objects).resolve())}
    environment.update(GIT_CONFIG_NOSYSTEM="1", GIT_CONFIG_GLOBAL=os.devnull)
    misfits = fit(into, patch.read_bytes())[1]
    try:
        # --3way compares with the index: what the user changed and did not commit counts as the tree's own
        for words in (["init", "--quiet"], ["-c", "core.autocrlf=false", "add", "--all", "--force"]):
            subprocess.run(["git", *words], cwd=into, env=environment, capture_output=True, check=True)
        command = ["git", "-c", "core.autocrlf=false", "apply", "--3way", "--whitespace=nowarn", str(patch.resolve())]
        merged = subprocess.run(command, cwd=into, env=environment, capture_output=True, text=True, check=False)
    except subprocess.CalledProcessError as error:
        raise EngineTrouble(
            f"{checkout.path}: git cannot merge {patch.name}",
            why=error.stderr.decode("utf-8", "replace").strip(),
            fix="name a checkout of one of the commits in patches/UPSTREAM, or leave --source out",
        ) from error
    finally:
        conflicts = [misfit for misfit in misfits if _in_conflict(into, misfit)]
        shutil.rmtree(into / ".git", ignore_errors=True)
    if merged.returncode:
        raise does_not_fit(str(checkout.path), patch, conflicts or misfits)


def _in_conflict(tree: Path, misfit: Misfit) -> bool:
    """Whether git left this hunk's lines between conflict markers."""
    path = tree / misfit.path
    if misfit.hunk is None or not path.is_file():
        return True
    theirs, inside = [], False
    for line in path.read_bytes().splitlines(keepends=True):
        if line.startswith(b">>>>>>> "):
            inside = False
        if inside:
            theirs.append(line)
        if line.startswith(b"=======") and not inside:
            inside = True
    added = {line for line in misfit.hunk.new if line not in misfit.hunk.old and line.strip()}
    return any(line in added for line in theirs)
