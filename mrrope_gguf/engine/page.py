"""llama-server's web page, built with npm from the sources that the engine was made from, and kept beside the engine.

llama.cpp compiles its page into the server. Here it is a folder of the build instead, which `mrrope serve` names with
--path: an engine gets its page, or gets it later, without compiling anything again. The page is built as one file,
because with an API key llama-server guards every other file of such a folder, and a browser has no key for them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from mrrope_gguf.aside import private_folder
from mrrope_gguf.engine import store
from mrrope_gguf.engine.cmake import stopped_with_us
from mrrope_gguf.engine.pins import pin
from mrrope_gguf.engine.programs import PAGE, page_of
from mrrope_gguf.engine.sdist import fetch_sdist, unpack
from mrrope_gguf.engine.toolchain import find
from mrrope_gguf.errors import MrropeError
from mrrope_gguf.fetch import Say
from mrrope_gguf.paths import cache_dir
from mrrope_gguf.text import printable

SOURCES = Path("tools") / "ui"
CONFIG = "svelte.config.js"
_SINGLE, _INLINE = "bundleStrategy: 'single'", "bundleStrategy: 'inline'"
# npm waits minutes for a network that is not there otherwise
_NPM = ("--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=60000", "--loglevel=error")


def pages_dir() -> Path:
    """Where built pages are kept, each under the hash of its sources."""
    return cache_dir() / "pages"


def has_npm() -> bool:
    return find("npm") is not None and find("node") is not None


def add_page(engine: store.Engine, source: Path | None, say: Say) -> Path | None:
    """The web page of a build with llama-server, built first where it is not there; None where it cannot be.

    source: the llama.cpp tree the engine was made from, None for the pin's own. A page is no reason to fail: what
    hinders it is said, and the server works without. What npm downloads (700 MB on disk) is deleted afterwards.
    """
    if there := page_of(engine):
        return there
    if not has_npm():
        say("llama-server's web page is left out: npm builds it, and Node.js is not here. Its API is complete; once")
        say("Node.js 20.19 or later is installed, the same command adds the page and compiles nothing again")
        return None
    try:
        with store.lock(f"page-{engine.key}", waiting=lambda: say("another process is building the page: waiting")):
            return page_of(engine) or _add(engine, source, say)
    except (MrropeError, OSError) as error:
        what = error.what if isinstance(error, MrropeError) else str(error)
        why = error.why if isinstance(error, MrropeError) else ""
        say(f"llama-server's web page is left out: {printable(what, 400)}{f': {why}' if why else ''}")
        return None


def _add(engine: store.Engine, source: Path | None, say: Say) -> Path:
    work = pages_dir() / f".work-{engine.key}"
    shutil.rmtree(work, ignore_errors=True)
    private_folder(pages_dir())
    work.mkdir()
    try:
        if source is None:
            unpack(fetch_sdist(pin(engine.pin), say), work / "tree")
            source = work / "tree"
        page = _built(source / SOURCES, work, say)
        new = engine.path / f".{PAGE}"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(page, new)
        os.replace(new, engine.path / PAGE)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return engine.path / PAGE


def _built(sources: Path, work: Path, say: Say) -> Path:
    """The page made from `sources`, out of the cache or by npm."""
    page = pages_dir() / _digest(sources)
    if (page / "index.html").is_file():
        return page
    say("building llama-server's web page with npm (downloads 1000 packages, about 2 minutes; --no-page leaves it out)")
    start = time.monotonic()
    out, tree = work / "out", work / "ui"
    skip = shutil.ignore_patterns("node_modules", "dist", ".svelte-kit")
    shutil.copytree(sources, tree, ignore=skip)
    _as_one_file(tree / CONFIG)
    _npm(["ci", *_NPM], tree, out)
    _npm(["run", "build"], tree, out)
    if not (out / "index.html").is_file():
        raise MrropeError("npm built no page", why=f"there is no index.html in {out}")
    shutil.rmtree(page, ignore_errors=True)
    os.replace(out, page)
    say(f"built the web page in {time.monotonic() - start:.0f} s")
    return page


def _digest(sources: Path) -> str:
    """A hash of all that a page is made of."""
    digest = hashlib.sha256(_INLINE.encode())
    files = sorted(path for path in sources.rglob("*") if path.is_file() and "node_modules" not in path.parts)
    if sources / CONFIG not in files:
        raise MrropeError("this llama.cpp holds no sources of a page", why=f"{sources / CONFIG} is not there")
    for path in files:
        name = path.relative_to(sources).as_posix()
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _as_one_file(config: Path) -> None:
    text = config.read_text(encoding="utf-8")
    if text.count(_SINGLE) != 1:
        raise MrropeError("the page's sources are not those this version knows", why=f"{CONFIG} has no {_SINGLE}")
    config.write_text(text.replace(_SINGLE, _INLINE), encoding="utf-8")


def _npm(words: Sequence[str], tree: Path, out: Path) -> None:
    """One run of npm in `tree`, the page going to `out`. MrropeError with what it says if it fails."""
    environment = {**os.environ, "LLAMA_UI_OUT_DIR": str(out), "LLAMA_BUILD_NUMBER": "0", "CI": "1"}
    process = subprocess.Popen(
        [find("npm") or "npm", *words], cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=60)
    with process, stopped_with_us(process):
        for line in process.stdout or ():
            tail.append(line.strip())
        code = process.wait()
    if code:
        lines = [line for line in tail if line] or [f"it ended with {code}"]
        said = "; ".join([line for line in lines if "error" in line.lower()][:3]) or lines[-1]
        raise MrropeError(f"npm {' '.join(word for word in words if word[0] != '-')} failed", why=printable(said, 300))
