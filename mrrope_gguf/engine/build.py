"""`mrrope build`: llama.cpp, patched, compiled and installed under the user's cache. The second call is instant."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mrrope_gguf.engine import store
from mrrope_gguf.engine.checkout import Checkout, copy_and_patch, open_checkout, pin_for
from mrrope_gguf.engine.cmake import Recipe, compile_targets, configure
from mrrope_gguf.engine.libllama import ROPE_TABLE_SYMBOL, binding_version
from mrrope_gguf.engine.patching import apply_patch
from mrrope_gguf.engine.pins import PIN, Pin, added_hash, header, pin, pins
from mrrope_gguf.engine.sdist import fetch_sdist, unpack
from mrrope_gguf.engine.toolchain import choose, default_jobs, require_tools
from mrrope_gguf.errors import EngineTrouble, FileTrouble
from mrrope_gguf.fetch import Say
from mrrope_gguf.progress import Progress


def _silent(_: str) -> None:
    pass


def build(
    *, backend: str = "auto", rpc: bool = True, server: bool = True, tests: bool = False, native: bool = True,
    release: str | None = None, source: str | os.PathLike[str] | None = None, jobs: int | None = None,
    say: Say = _silent, progress: Progress | None = None,
) -> store.Engine:  # fmt: skip
    """The patched llama.cpp these settings describe, compiled first where the cache lacks it.

    backend: auto, cpu, cuda, metal, vulkan or rocm. rpc: with the RPC backend and its server. server: with llama.cpp's
    own programs. tests: with its architecture test. native: for this machine's CPU. release: whose llama.cpp (default:
    the installed llama-cpp-python's, so that Python can use it). source: a llama.cpp tree to take instead; only read.
    jobs: compilers at once. say(line) before anything slow; progress(done, total) while compiling.

    Raises EngineTrouble for tools that are missing, sources that are not the expected ones, hunks that do not fit and
    what the compiler refuses; FileTrouble where the cache cannot be written.
    """
    recipe = Recipe(choose(backend), rpc=rpc, server=server, tests=tests, native=native)
    checkout = open_checkout(Path(source)) if source is not None else None
    job = plan(recipe, _pin(release, checkout), checkout)
    if engine := _there(job):
        store.remove_work(job.work, job.key)  # of a build that was killed when it had just been done
        return engine
    require_tools()
    store.remove_removed()
    with store.lock(job.key, waiting=lambda: say(f"another process is building {job.key}: waiting for it")):
        engine = _there(job)
        if engine is None:
            try:
                engine = _make(job, jobs or default_jobs(), say, progress)
            except OSError as error:
                raise FileTrouble(
                    f"{job.target}: the engine cannot be put there", why=str(error),
                    fix="free some space, or set MRROPE_CACHE to a folder that can be written",
                ) from error  # fmt: skip
    return engine


def _there(job: _Job) -> store.Engine | None:
    """The build, if it is there and nobody else may have put something into it."""
    engine = store.read_engine(job.target)
    return engine if engine and engine.ours else None


def _pin(release: str | None, checkout: Checkout | None) -> Pin:
    if release is not None:
        return pin(release)
    if checkout is not None:
        return pin_for(checkout)
    installed = binding_version()
    return pin(installed if installed in pins() else PIN)


@dataclass(frozen=True)
class _Job:
    """One build. Patch and header are read once: a build takes minutes, and these files may change meanwhile."""

    recipe: Recipe
    pin: Pin
    checkout: Checkout | None
    patch: bytes
    header: bytes

    @cached_property
    def patch_hash(self) -> str:
        return added_hash(self.patch, self.header)

    @property
    def commit(self) -> str:
        if self.checkout is None:
            return self.pin.commit
        return f"{self.checkout.commit or ''}{'-dirty' if self.checkout.dirty else ''}"

    @cached_property
    def key(self) -> str:
        """A folder's name: what a reader wants to know, and a hash of everything that makes the build what it is."""
        recipe = self.recipe
        origin = self.checkout.digest if self.checkout else self.pin.sha256
        everything = "\n".join([origin, self.patch_hash, *recipe.flags(), *recipe.targets(), *_compilers()])
        parts = {"rpc": recipe.rpc, "tools": recipe.server, "tests": recipe.tests}
        words = [self.pin.release if self.checkout is None else "source", recipe.backend]
        words += [word for word, there in parts.items() if there]
        return "-".join([*words, hashlib.sha256(everything.encode()).hexdigest()[:10]])

    @property
    def target(self) -> Path:
        return store.engines_dir() / self.key

    @property
    def work(self) -> Path:
        """Kept when a build fails, so that the next try goes on where it stopped."""
        return store.engines_dir() / f".work-{self.key}"


def plan(recipe: Recipe, pin: Pin, checkout: Checkout | None = None) -> _Job:
    """The build that a recipe, a patch and sources make. EngineTrouble where the package lacks the patch."""
    try:
        return _Job(recipe, pin, checkout, pin.patch.read_bytes(), header().read_bytes())
    except OSError as error:
        what = f"the patch for llama-cpp-python {pin.release} is not here"
        raise EngineTrouble(what, why=str(error), fix="reinstall mrrope-gguf") from error


def _compilers() -> list[str]:
    """The variables by which users choose compilers and their flags."""
    names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def _make(job: _Job, jobs: int, say: Say, progress: Progress | None) -> store.Engine:
    start = time.monotonic()
    tree, out = job.work / "tree", job.work / "build"
    if not tree.is_dir():
        shutil.rmtree(job.work, ignore_errors=True)
        _prepare(job, job.work / "unpacked", say)
        os.replace(job.work / "unpacked", tree)
    parts = " + ".join(["libraries", *(["llama.cpp's programs"] if job.recipe.server else [])])
    say(f"compiling llama.cpp {job.commit[:9]} for {job.recipe.backend} ({parts}), {jobs} at a time")
    configure(job.recipe, tree, out, f"{job.commit[:9] or 'unknown'}-mrrope")
    compile_targets(job.recipe, out, jobs, progress)
    engine = _install(job, out, say)
    say(f"built in {time.monotonic() - start:.0f} s, {engine.size / 1e6:.0f} MB in {engine.path}")
    shutil.rmtree(job.work, ignore_errors=True)
    return engine


def _prepare(job: _Job, tree: Path, say: Say) -> None:
    """The patched sources in `tree`."""
    tree.mkdir(parents=True)
    patch = job.work / job.pin.patch.name
    patch.write_bytes(job.patch)
    if job.checkout:
        say(f"patching a copy of {job.checkout.path}")
        copy_and_patch(job.checkout, tree, patch)
    else:
        archive = fetch_sdist(job.pin, say)
        say(f"unpacking and patching llama.cpp {job.commit[:9]}")
        unpack(archive, tree)
        apply_patch(tree, patch, job.pin.sdist)
    (tree / "src" / "mrrope.h").write_bytes(job.header)


def _install(job: _Job, out: Path, say: Say) -> store.Engine:
    """Copy libraries and programs to a new folder and give it its name once it is whole."""
    produced = out / "bin" / "Release"
    produced = produced if produced.is_dir() else out / "bin"
    new = job.work / "new"
    shutil.rmtree(new, ignore_errors=True)
    programs = {*job.recipe.targets()}
    for path in store.listed(produced):
        library = ".so" in path.suffixes or path.suffix in (".dylib", ".dll")
        if library:
            _copy(path, new / "lib")
        # Windows looks for a program's libraries beside it
        if (path.stem in programs and not library) or path.suffix == ".dll":
            _copy(path, new / "bin")
    _check(new / "lib", say)
    recipe = job.recipe
    engine = store.Engine(
        path=new, key=job.key, pin=job.pin.release, commit=job.commit, patch_hash=job.patch_hash,
        backend=recipe.backend, rpc=recipe.rpc, server=recipe.server, tests=recipe.tests, built=time.time(),
    )  # fmt: skip
    engine.save()
    if job.target.exists():  # a folder that read_engine did not take for a build
        shutil.rmtree(job.target)
    os.replace(new, job.target)
    return replace(engine, path=job.target)


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, folder / path.name, follow_symlinks=False)


_TRY = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
sys.exit(0 if hasattr(lib, sys.argv[2]) else 3)
"""


def _check(lib: Path, say: Say) -> None:
    """Load the library in another process. A GPU's driver may be missing where one only builds: said, not refused."""
    file = library_file(lib)
    if file is None:
        raise EngineTrouble(
            "the build left no libllama", why=f"nothing of that name in {lib}", fix="`mrrope build` again"
        )
    run = subprocess.run(
        [sys.executable, "-c", _TRY, str(file), ROPE_TABLE_SYMBOL], capture_output=True, text=True, check=False
    )
    if run.returncode == 3:
        raise EngineTrouble(
            "the library was built without the patch", why=f"it does not export {ROPE_TABLE_SYMBOL}",
            fix="report this with the log of `mrrope build`",
        )  # fmt: skip
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        say(f"note: it does not load on this machine: {reason}")


def library_file(lib: Path) -> Path | None:
    """libllama in a folder, by the name this system gives it."""
    names = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}
    return next((lib / name for name in names.get(sys.platform, ("libllama.so",)) if (lib / name).exists()), None)
