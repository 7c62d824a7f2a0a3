"""Where `mrrope build` gets its sources: UPSTREAM, the sdists by hash, safe unpacking."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from mrrope_gguf.engine import build, pins
from mrrope_gguf.engine.sdist import check_hash, fetch_sdist, unpack
from mrrope_gguf.errors import EngineTrouble
from tests import toy_llama

A, B = "a" * 40, "b" * 64


def test_the_pins() -> None:
    found = pins.pins()
    assert next(iter(found)) == pins.PIN
    assert len(found) == 3
    assert len({pin.commit for pin in found.values()}) == 3
    assert all(pin.sdist == f"llama_cpp_python-{release}.tar.gz" for release, pin in found.items())


@pytest.mark.parametrize(
    "text", ["0.1 x y", f"0.1 {A[1:]} x {B}", f"0.1 {A} x {B[:-1]}g", f"0.1 {A} x {B}\n0.1 {A} x {B}"]
)
def test_a_damaged_upstream_names_the_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"UPSTREAM line [12] is not"):
        pins.parse(text)


def test_comments_and_empty_lines_are_not_pins() -> None:
    assert list(pins.parse(f"# a comment\n\n0.1 {A} x.tar.gz {B}\n")) == ["0.1"]


def test_a_release_without_a_patch() -> None:
    with pytest.raises(EngineTrouble, match=r"llama-cpp-python 0\.2\.0") as caught:
        pins.pin("0.2.0")
    assert pins.PIN in caught.value.why


def test_the_patch_hash_follows_patch_and_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(pins, "header", lambda: tmp_path / "mrrope.h")
    pin = pins.Pin("1", A, "x", B)
    hashes = []
    for patch, header in (("p", "h"), ("q", "h"), ("p", "i")):
        pin.patch.write_text(patch)
        (tmp_path / "mrrope.h").write_text(header)
        hashes.append(pin.patch_hash)
    assert len(set(hashes)) == 3


def wrong(cache: Path) -> pins.Pin:
    """The toy's pin, with the hash of other bytes."""
    return pins.Pin(toy_llama.RELEASE, A, f"llama_cpp_python-{toy_llama.RELEASE}.tar.gz", B)


def test_pip_refuses_another_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index serves other bytes under the right name: pip itself says no, and nothing of them runs or stays."""
    index = tmp_path / "index"
    index.mkdir()
    toy_llama.sdist(index / f"llama_cpp_python-{toy_llama.RELEASE}.tar.gz")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EngineTrouble, match="could not download its sources") as caught:
        fetch_sdist(wrong(tmp_path), lambda _: None)
    assert "HASH" in caught.value.why.upper()
    assert list((tmp_path / "cache" / "sources").iterdir()) == []


def test_a_release_the_index_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EngineTrouble, match="could not download") as caught:
        fetch_sdist(wrong(tmp_path), lambda _: None)
    assert "--source DIR" in caught.value.fix


def test_the_hash_is_checked_here_too(tmp_path: Path) -> None:
    archive = toy_llama.sdist(tmp_path / "x.tar.gz")
    with pytest.raises(EngineTrouble, match="not the sources there is a patch for") as caught:
        check_hash(archive, wrong(tmp_path))
    assert hashlib.sha256(archive.read_bytes()).hexdigest()[:16] in caught.value.why


def test_what_is_cached_and_whole_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path))
    sha256 = toy_llama.put_sdist(tmp_path)
    said: list[str] = []
    pin = pins.Pin(toy_llama.RELEASE, A, f"llama_cpp_python-{toy_llama.RELEASE}.tar.gz", sha256)
    assert fetch_sdist(pin, said.append).is_file()
    assert said == []


def test_only_the_tree_is_unpacked(tmp_path: Path) -> None:
    archive = toy_llama.sdist(tmp_path / "x.tar.gz")
    unpack(archive, tmp_path / "tree")
    found = {
        path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*") if path.is_file()
    }
    assert found == set(toy_llama.FILES)


def tar_of(path: Path, name: str, **fields: object) -> Path:
    """An archive with one harmless member and one named `name`."""
    with tarfile.open(path, "w:gz") as tar:
        for member in ("root/vendor/llama.cpp/CMakeLists.txt", name):
            info = tarfile.TarInfo(member)
            if member == name:
                for field, value in fields.items():
                    setattr(info, field, value)
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("root/vendor/llama.cpp/../../../../evil", {"size": 1}),
        ("root/vendor/llama.cpp/src/../../../evil", {"size": 1}),
        ("root/vendor/llama.cpp/C:\\evil", {"size": 1}),
        ("root/vendor/llama.cpp/src\\..\\..\\evil", {"size": 1}),
        ("root/vendor/llama.cpp/link", {"type": tarfile.SYMTYPE, "linkname": "/etc"}),
        ("root/vendor/llama.cpp/link", {"type": tarfile.SYMTYPE, "linkname": "src"}),
        ("root/vendor/llama.cpp/link", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
        ("root/vendor/llama.cpp/CMakeLists.txt/../../../../../etc/evil", {"size": 1}),
        ("root/vendor/llama.cpp/src/x", {"type": tarfile.SYMTYPE, "linkname": "../../../../.."}),
        ("root/vendor/llama.cpp/x", {"type": tarfile.LNKTYPE, "linkname": "root/vendor/llama.cpp/CMakeLists.txt"}),
        ("root/vendor/llama.cpp/tty", {"type": tarfile.CHRTYPE}),
        ("root/vendor/llama.cpp/pipe", {"type": tarfile.FIFOTYPE}),
        ("root/vendor/llama.cpp/disk", {"type": tarfile.BLKTYPE}),
    ],
)
def test_an_unsafe_member_stops_it(tmp_path: Path, name: str, fields: dict[str, object]) -> None:
    archive = tar_of(tmp_path / "x.tar.gz", name, **fields)
    (tmp_path / "deep" / "tree").mkdir(parents=True)
    with pytest.raises(EngineTrouble, match="is unsafe"):
        unpack(archive, tmp_path / "deep" / "tree")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["CMakeLists.txt", "deep", "tree", "x.tar.gz"]


def test_a_member_too_large_for_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrrope_gguf.engine.sdist.MAX_FILE", 1000)
    archive = tar_of(tmp_path / "x.tar.gz", "root/vendor/llama.cpp/bomb", size=1001)
    with pytest.raises(EngineTrouble, match="is unsafe") as caught:
        unpack(archive, tmp_path / "tree")
    assert "1001 bytes" in caught.value.why


def test_many_members_that_are_too_large_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrrope_gguf.engine.sdist.MAX_TREE", 1000)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for i in range(30):
            info = tarfile.TarInfo(f"root/vendor/llama.cpp/{i}")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    (tmp_path / "tree").mkdir()
    with pytest.raises(EngineTrouble, match="is unsafe"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "tree")
    assert sum(path.stat().st_size for path in (tmp_path / "tree").iterdir()) <= 1000


@pytest.mark.parametrize("name", ["/etc/mrrope-evil", "/root/vendor/llama.cpp/evil", "//x/vendor/llama.cpp/evil"])
def test_absolute_names_lead_nowhere(tmp_path: Path, name: str) -> None:
    """What is not below the archive's vendor/llama.cpp is left out; what is lands in the folder, whatever its root."""
    archive = tar_of(tmp_path / "x.tar.gz", name, size=1)
    (tmp_path / "tree").mkdir()
    unpack(archive, tmp_path / "tree")
    assert {path.name for path in (tmp_path / "tree").rglob("*")} <= {"CMakeLists.txt", "evil"}
    assert not Path(name).exists()


def test_nothing_is_unpacked_before_the_hash_was_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds other bytes under the right name, and the index serves none: the build ends there."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    toy_llama.put_sdist(tmp_path / "cache")
    monkeypatch.setattr(build, "unpack", lambda *_: pytest.fail("it was unpacked"))
    monkeypatch.setattr(build, "pin", lambda release: wrong(tmp_path))
    monkeypatch.setattr(build, "header", lambda: tmp_path / "mrrope.h")
    (tmp_path / "mrrope.h").write_text("")
    monkeypatch.setattr(pins, "data_dir", lambda: tmp_path)
    (tmp_path / f"llama-cpp-python-{toy_llama.RELEASE}.patch").write_text("")
    with pytest.raises(EngineTrouble, match="could not download its sources"):
        build.build(backend="cpu", server=False, release=toy_llama.RELEASE)


@pytest.mark.parametrize("content", [b"a proxy's login page", b"\x1f\x8b\x08\x00damaged", b""])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(EngineTrouble, match=r"x\.tar\.gz: cannot be unpacked"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "tree")


def test_an_archive_without_llama_cpp(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("root/pyproject.toml"))
    with pytest.raises(EngineTrouble, match=r"holds no llama\.cpp"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "tree")
