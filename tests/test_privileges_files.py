"""Files in places that others share or look into: who may read what is kept, and whose links are followed (none)."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import extend, fetch, revert, texts
from mrrope_gguf.archives import Archive
from mrrope_gguf.aside import private_folder, written_aside
from mrrope_gguf.engine import sdist, store
from mrrope_gguf.engine.pins import Pin
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.inplace import recover
from mrrope_gguf.gguf.journal import Journal
from mrrope_gguf.gguf.names import journal_path, unfinished_path
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.write import write_in_place
from mrrope_gguf.sessions.named import Named
from mrrope_gguf.user_key import user_key
from tests import edits, tiny, toy_llama
from tests.edits import model, sha256, write
from tests.filesystems import mounted

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and permissions are POSIX's")
NOBODY = 65534
root = pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="needs root to give files away")


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Permissions of the folder and of all folders below it, and those of files."""
    found = {p: stat.S_IMODE(p.lstat().st_mode) for p in [folder, *folder.rglob("*")]}
    named = {p.relative_to(folder.parent).as_posix(): (p.is_dir(), mode) for p, mode in found.items()}
    return {n: m for n, (d, m) in named.items() if d}, {n: m for n, (d, m) in named.items() if not d}


def toy(path: Path) -> tuple[Path, str]:
    """A small archive, and its sha256."""
    archive = toy_llama.sdist(path)
    return archive, fetch.sha256(archive)


@pytest.mark.parametrize("what", ["sources", "engines", "evals"])
def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    archive, digest = toy(tmp_path / "toy.tar.gz")
    monkeypatch.setattr(sdist, "_download", lambda pin, folder: archive.rename(folder / archive.name))
    if what == "sources":
        sdist.fetch_sdist(Pin(toy_llama.RELEASE, "a" * 40, "toy.tar.gz", digest), lambda _: None)
    elif what == "engines":
        with store.lock("some-key"):
            folder = private_folder(store.engines_dir() / "some-key" / "lib").parent
        store.Engine(folder, "some-key", toy_llama.RELEASE, "", "", "cpu", False, False, False, 0.0).save()
        assert store.read_engine(folder)
    else:
        user_key(tmp_path / "cache" / "evals")
    folders, files = modes(tmp_path / "cache")
    assert (set(folders.values()), set(files.values())) == ({0o700}, {0o600})


def test_fetched_files_and_texts_are_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    archive, digest = toy(tmp_path / "toy.tar.gz")
    name, text = next(iter(toy_llama.FILES.items()))
    member = f"llama_cpp_python-{toy_llama.RELEASE}/vendor/llama.cpp/{name}"
    part = fetch.Part(Archive("x==1", archive.name, digest), member)
    resource = fetch.Resource("x.txt", hashlib.sha256(text.encode()).hexdigest(), (part,), "MIT")
    monkeypatch.setattr(fetch, "download", lambda wanted, folder: archive.rename(folder / archive.name))
    fetch.fetch(resource)
    monkeypatch.setitem(texts.TEXTS, "x", texts.Text("x", "x", resource, lambda path: "prose", 5, 1))
    assert texts.save("x").read_text() == "prose"
    folders, files = modes(tmp_path / "cache")
    assert folders == {"cache": 0o700, "cache/files": 0o700, "cache/texts": 0o700}
    assert files == {"cache/files/x.txt": 0o600, "cache/texts/x.txt": 0o600}


def test_a_private_folder_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    private_folder(tmp_path / "shared" / "a" / "b")
    private_folder(tmp_path / "shared")
    assert modes(tmp_path / "shared")[0] == {"shared": 0o755, "shared/a": 0o700, "shared/a/b": 0o700}


def test_conversations_are_the_users_alone(tmp_path: Path) -> None:
    """The data folder too, above the one of sessions."""
    named = Named(tmp_path / "data" / "sessions" / "named", "talk")
    values: dict[str, Any] = {"documents": [], "pieces": [], "sampling": {}, "parts": {}, "messages": []}
    named.save({"system": None, "created": 1.0, "tokens": 0, **values})
    named.close()
    folders, files = modes(tmp_path / "data")
    assert folders == dict.fromkeys(("data", "data/sessions", "data/sessions/named"), 0o700)
    assert set(files) > {"data/sessions/key", "data/sessions/named/talk.json"}
    assert set(files.values()) == {0o600}


@root
def test_a_key_of_another_user_proves_nothing(tmp_path: Path) -> None:
    user_key(tmp_path)
    os.chown(tmp_path / "key", NOBODY, NOBODY)
    with pytest.raises(FileTrouble, match="not ours alone") as caught:
        user_key(tmp_path)
    assert "MRROPE_DATA" in caught.value.fix


@pytest.mark.parametrize("mode", [0o622, 0o644, 0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_key_that_others_know_or_may_write_proves_nothing(tmp_path: Path, mode: int) -> None:
    key = user_key(tmp_path)
    assert user_key(tmp_path) == key
    (tmp_path / "key").chmod(mode)
    with pytest.raises(FileTrouble, match="not ours alone") as caught:
        user_key(tmp_path)
    assert f"mode {mode:o}" in caught.value.why
    assert f"`chmod 600 {tmp_path / 'key'}`" in caught.value.fix
    (tmp_path / "key").chmod(0o600)
    assert user_key(tmp_path) == key


# -- links --


def test_a_file_written_aside_is_no_ones_guess_and_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "report.md").symlink_to(victim)
    seen = set()
    for _ in range(3):
        with written_aside(tmp_path / "report.md") as aside:
            aside.write_text("new")
            seen.add(aside.name)
            assert stat.S_IMODE(aside.stat().st_mode) == 0o644
    assert len(seen) == 3
    assert victim.read_text() == "mine"
    assert (tmp_path / "report.md").read_text() == "new"
    assert not (tmp_path / "report.md").is_symlink()
    with pytest.raises(OSError, match="full"), written_aside(tmp_path / "report.md"):
        raise OSError("the disk is full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "victim"]


def test_a_name_aside_that_is_taken_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If somebody guessed it after all: no file is opened through their link."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("mrrope_gguf.aside.os.urandom", lambda n: bytes(n))
    (tmp_path / f".mrrope-{bytes(8).hex()}.md").symlink_to(victim)
    with pytest.raises(FileExistsError), written_aside(tmp_path / "report.md"):
        pytest.fail("it was opened")
    assert victim.read_text() == "mine"


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("fs")) as place:
        yield place


def cut_short(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An in-place change of `path` that ends as by a power failure: with its journal beside it."""

    class Ended(BaseException): ...

    def end(*_: Any) -> None:
        raise Ended

    with monkeypatch.context() as patch, Source.open(path) as source:
        patch.setattr(Journal, "apply", end)
        patch.setattr(Journal, "roll_back", end)
        edit = edits.extended(Edit(source))
        with pytest.raises(Ended):
            write_in_place(edit)


@root
@pytest.mark.parametrize("how", ["owner", "mode", "link", "pipe"])
def test_anothers_journal_is_not_written_into_our_file(ext4: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    folder = ext4 / how
    folder.mkdir(mode=0o1777)
    path = write(folder / "m.gguf", model())
    before, journal = sha256(path), journal_path(path)
    cut_short(path, monkeypatch)
    assert journal.exists()
    if how == "owner":
        os.chown(journal, NOBODY, NOBODY)
    elif how == "mode":
        journal.chmod(0o666)
    elif how == "link":
        journal.rename(folder / "elsewhere")
        journal.symlink_to(folder / "elsewhere")
    else:
        journal.unlink()
        os.mkfifo(journal)
    for verb in (recover, revert):
        with pytest.raises(FileTrouble) as caught:
            verb(path)
        assert "journal" in str(caught.value) or "Too many levels of symbolic links" in str(caught.value)
    assert sha256(path) == before
    assert os.path.lexists(journal)


def test_our_own_journal_is_still_rolled_back(ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ext4 / "own").mkdir()
    path = write(ext4 / "own" / "m.gguf", model())
    before = sha256(path)
    cut_short(path, monkeypatch)
    assert recover(path)
    assert sha256(path) == before
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]


def test_a_link_where_the_journal_will_be_is_not_followed(ext4: Path) -> None:
    (ext4 / "planted").mkdir()
    path = write(ext4 / "planted" / "m.gguf", model())
    victim = ext4 / "planted" / "victim"
    victim.write_text("mine")
    unfinished_path(journal_path(path)).symlink_to(victim)
    with Source.open(path) as source:
        assert write_in_place(edits.extended(Edit(source))).how == "in-place insert"
    assert victim.read_text() == "mine"
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.gguf", "victim"]


def test_a_destination_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf")
    victim = tmp_path / "victim.gguf"
    victim.write_text("mine")
    (tmp_path / "dst.gguf").symlink_to(victim)
    with pytest.raises(FileTrouble, match="exists"):
        extend(path, tmp_path / "dst.gguf", scale=2)
    extend(path, tmp_path / "dst.gguf", scale=2, force=True)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "dst.gguf").is_symlink()
