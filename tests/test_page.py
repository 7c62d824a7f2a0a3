"""llama-server's web page beside an engine: built by npm from a toy, kept by its sources' hash, no reason to fail."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from mrrope_gguf.cli import main
from mrrope_gguf.engine import page, store
from mrrope_gguf.engine.pins import PIN, pin
from mrrope_gguf.engine.programs import page_of, server_program
from mrrope_gguf.errors import EngineTrouble

CONFIG = "export default { kit: { output: { bundleStrategy: 'single' } } };\n"
# what vite is told is what the page says
BUILD = (
    "const fs = require('fs'); const out = process.env.LLAMA_UI_OUT_DIR; fs.mkdirSync(out);"
    "fs.writeFileSync(out + '/index.html', '<html>' + fs.readFileSync('svelte.config.js'));"
)
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MRROPE_ENGINE", raising=False)
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    return tmp_path / "cache"


def engine(key: str, *, program: bool = True, age: float = 0, **fields: str) -> store.Engine:
    """A folder as `mrrope build` leaves it, with nothing in its programs."""
    known = pin(PIN)
    made = store.Engine(
        path=store.engines_dir() / key, key=key, pin=PIN, commit=known.commit, backend=fields.get("backend", "cpu"),
        patch_hash=fields.get("patch_hash", known.patch_hash), rpc=True, server=program, tests=False,
        built=time.time() - age,
    )  # fmt: skip
    made.lib.mkdir(parents=True)
    made.bin.mkdir()
    if program:
        (made.bin / ("llama-server.exe" if os.name == "nt" else "llama-server")).touch()
    made.save()
    return made


def sources(tree: Path, build: str = BUILD, config: str = CONFIG) -> Path:
    """A llama.cpp tree that has the toy page alone."""
    folder = tree / page.SOURCES
    folder.mkdir(parents=True)
    package = {"name": "toy", "version": "1.0.0", "scripts": {"build": "node build.cjs"}}
    lock = {"name": "toy", "version": "1.0.0", "lockfileVersion": 3, "packages": {"": package}}
    for name, text in {
        "package.json": json.dumps(package), "package-lock.json": json.dumps(lock), "build.cjs": build,
        "svelte.config.js": config,
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    return tree


@needs_npm
def test_a_page_is_built_once_and_belongs_to_its_engine(tmp_path: Path) -> None:
    tree, said = sources(tmp_path / "tree"), list[str]()
    first = engine("a")
    found = page.add_page(first, tree, said.append)
    assert found == page_of(first) == first.path / "page"
    assert "bundleStrategy: 'inline'" in (found / "index.html").read_text()
    assert (tree / page.SOURCES / "svelte.config.js").read_text() == CONFIG
    assert len(said) == 2
    assert page.add_page(engine("b"), tree, said.append)  # out of the cache
    assert page.add_page(first, None, said.append) == found  # without looking at sources at all
    assert len(said) == 2
    (tree / page.SOURCES / "build.cjs").write_text(BUILD + "// changed")
    assert page.add_page(engine("c"), tree, said.append)
    assert len(said) == 4
    assert sorted(path.name.startswith(".") for path in page.pages_dir().iterdir()) == [False, False]


@needs_npm
@pytest.mark.parametrize(
    ("build", "config", "says"),
    [
        ("console.error('error: no colour'); process.exit(3)", CONFIG, "npm run build failed: error: no colour"),
        ("", CONFIG, "npm built no page"),
        (BUILD, "export default {};", "svelte.config.js has no bundleStrategy"),
    ],
    ids=["npm fails", "nothing built", "other sources"],
)  # fmt: skip
def test_what_hinders_is_said_and_nothing_is_left(tmp_path: Path, build: str, config: str, says: str) -> None:
    said: list[str] = []
    made = engine("a")
    assert page.add_page(made, sources(tmp_path / "tree", build, config), said.append) is None
    assert "web page is left out" in said[-1]
    assert says in said[-1]
    assert page_of(made) is None
    assert list(page.pages_dir().iterdir()) == []


@needs_npm
def test_a_package_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a network: npm's own reason is passed on."""
    tree, said = sources(tmp_path / "tree"), list[str]()
    file = tree / page.SOURCES / "package-lock.json"
    lock = json.loads(file.read_text())
    gone = "http://127.0.0.1:1/gone/-/gone-1.0.0.tgz"
    lock["packages"][""]["dependencies"] = {"gone": "1.0.0"}
    lock["packages"]["node_modules/gone"] = {"version": "1.0.0", "resolved": gone}
    file.write_text(json.dumps(lock))
    package = {"name": "toy", "version": "1.0.0", "dependencies": {"gone": "1.0.0"}}
    file.with_name("package.json").write_text(json.dumps(package))
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "10")
    assert page.add_page(engine("a"), tree, said.append) is None
    assert "npm ci" in said[-1]
    assert "ECONNREFUSED" in said[-1]


def test_without_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(page, "find", lambda name: None)
    assert page.add_page(engine("a"), None, said.append) is None
    assert "npm builds it, and Node.js is not here" in said[0]


def test_which_server_is_taken() -> None:
    with pytest.raises(EngineTrouble, match="needs the patched llama-server, and none is built") as caught:
        server_program(PIN)
    assert (caught.value.why, caught.value.fix) == ("no engine is built at all", "`mrrope build`")
    engine("old", patch_hash="0" * 12)
    with pytest.raises(EngineTrouble) as caught:
        server_program(PIN)
    assert caught.value.why == "of 1 builds none is of this version's patch"
    engine("library", program=False)
    with pytest.raises(EngineTrouble) as caught:
        server_program(None)  # without llama-cpp-python too
    assert caught.value.why == "built without programs (--no-server): library"
    engine("cpu", age=10)
    newest = engine("cpu-2", age=5)
    assert server_program(PIN).engine == newest
    with_page = engine("cpu-3", age=20)
    (with_page.path / "page").mkdir()
    (with_page.path / "page" / "index.html").touch()
    assert server_program(PIN).page == with_page.path / "page"
    gpu = engine("gpu", age=99, backend="cuda")
    assert server_program(PIN).engine == gpu
    assert server_program(PIN).on_gpu


def test_an_engine_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine("library", program=False)
    for word, says in (("library", "has no llama-server"), ("nothing", "there is no such engine")):
        monkeypatch.setenv("MRROPE_ENGINE", word)
        with pytest.raises(EngineTrouble, match=says):
            server_program(PIN)


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("script", "why"),
    [("echo '--rope-scaling {none,linear,yarn}'", "it has no --rope-elastic"), ("echo broken >&2; exit 4", "broken")],
)
def test_a_named_folder_with_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    stock = tmp_path / "bin" / "llama-server"
    stock.parent.mkdir()
    stock.write_text(f"#!/bin/sh\n{script}\n")
    stock.chmod(0o755)
    monkeypatch.setenv("MRROPE_ENGINE", str(tmp_path))
    with pytest.raises(EngineTrouble, match="this is not the patched llama-server") as caught:
        server_program(PIN)
    assert why in caught.value.why


def test_the_list_names_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    made = engine("a")
    (made.path / "page").mkdir()
    (made.path / "page" / "index.html").touch()
    assert main(["build", "--list"]) == 0
    assert "rpc, server, web page" in capsys.readouterr().out
