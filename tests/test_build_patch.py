"""The patches: each applies cleanly to its pin's tree, merges into a changed checkout, or names the hunk in the way."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from mrrope_gguf.engine import pins
from mrrope_gguf.engine.checkout import copy_and_patch, open_checkout, pin_for
from mrrope_gguf.engine.patching import Hunk, apply_patch, fit, parse_patch
from mrrope_gguf.engine.sdist import fetch_sdist
from mrrope_gguf.errors import EngineTrouble

RELEASES = list(pins.pins())
# what open_checkout looks for
SIGNS = ("CMakeLists.txt", "src/llama-model.cpp")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each pin's pristine tree, as far as any patch touches it, out of the sdist that pip fetched; never written to."""
    wanted = {file.path for pin in pins.pins().values() for file in parse_patch(pin.patch.read_bytes())} | {*SIGNS}
    found = {}
    for release, pin in pins.pins().items():
        found[release] = tmp_path_factory.mktemp(release)
        root = f"llama_cpp_python-{release}/vendor/llama.cpp/"
        with tarfile.open(fetch_sdist(pin, print)) as tar:
            for member in tar:
                name = member.name.removeprefix(root)
                source = tar.extractfile(member) if member.name != name and name in wanted else None
                if source:
                    (found[release] / name).parent.mkdir(parents=True, exist_ok=True)
                    (found[release] / name).write_bytes(source.read())
    return found


@pytest.mark.real
@pytest.mark.parametrize("release", RELEASES)
def test_it_applies_cleanly(trees: dict[str, Path], release: str) -> None:
    """Every hunk at the very line it names: the tree is known byte for byte."""
    patch = pins.pin(release).patch.read_bytes()
    changed, misfits = fit(trees[release], patch)
    assert misfits == []
    for file in parse_patch(patch):
        old = (trees[release] / file.path).read_bytes() if not file.creates else b""
        lines = old.splitlines(keepends=True)
        for hunk in file.hunks:
            assert lines[hunk.start : hunk.start + len(hunk.old)] == hunk.old, f"{file.path}: {hunk}"
        assert changed[trees[release] / file.path] != old


@pytest.mark.real
@pytest.mark.parametrize("release", RELEASES)
def test_git_makes_the_same_of_it(trees: dict[str, Path], release: str, tmp_path: Path) -> None:
    patch = pins.pin(release).patch
    mine, gits = (part_of(trees[release], patch, tmp_path / name) for name in ("mine", "gits"))
    apply_patch(mine, patch, "mine")
    subprocess.run(["git", "apply", "--whitespace=nowarn", str(patch)], cwd=gits, check=True)
    for file in parse_patch(patch.read_bytes()):
        assert (mine / file.path).read_bytes() == (gits / file.path).read_bytes(), file.path


@pytest.mark.parametrize("release", RELEASES)
def test_what_it_leaves_alone(release: str) -> None:
    """No architecture's file, no kernel, no struct by value: only what the README of patches/ says."""
    paths = [file.path for file in parse_patch(pins.pin(release).patch.read_bytes())]
    assert [path for path in paths if path.startswith(("src/models/", "ggml/"))] == []
    assert "src/mrrope.h" not in paths  # it goes in verbatim


@pytest.mark.parametrize("release", RELEASES)
def test_blobs_are_named_in_full(release: str) -> None:
    """`git apply --3way` looks them up in the user's repository: few digits may fit several (diff --full-index)."""
    lines = [line.split()[1] for line in pins.pin(release).patch.read_text().splitlines() if line.startswith("index ")]
    assert lines
    assert {len(line) for line in lines} == {82}


def part_of(tree: Path, patch: Path, into: Path) -> Path:
    """The files that the patch touches, and those that make a folder a llama.cpp tree."""
    touched = [file.path for file in parse_patch(patch.read_bytes()) if not file.creates]
    for name in {*touched, *SIGNS}:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / name, into / name)
    return into


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.autocrlf=false"]
    run = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return run.stdout.strip()


@pytest.fixture
def checkout(trees: dict[str, Path], tmp_path: Path) -> Path:
    """A checkout as a user has one: the newest pin's tree, committed."""
    folder = part_of(trees[pins.PIN], pins.pin(pins.PIN).patch, tmp_path / "checkout")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "upstream")
    return folder


def patch_of_newest() -> Path:
    return pins.pin(pins.PIN).patch


def hunk_with_room() -> tuple[str, Hunk]:
    """A hunk whose first line of context is at least two lines away from what it changes."""
    for file in parse_patch(patch_of_newest().read_bytes()):
        for hunk in file.hunks:
            if len(hunk.old) > 6 and hunk.old[:3] == hunk.new[:3] and hunk.old[0].strip():
                return file.path, hunk
    raise AssertionError("no such hunk")


def replace_line(path: Path, line: bytes, number: int) -> None:
    """Change the line at or after `number` that reads `line`."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i in range(number, len(lines)) if lines[i] == line)
    lines[at] = b"/* mine */ " + line
    path.write_bytes(b"".join(lines))


@pytest.mark.real
def test_a_pristine_checkout(checkout: Path, tmp_path: Path) -> None:
    copy_and_patch(open_checkout(checkout), tmp_path / "copy", patch_of_newest())
    for file in parse_patch(patch_of_newest().read_bytes()):
        for hunk in file.hunks:
            assert b"".join(hunk.new) in (tmp_path / "copy" / file.path).read_bytes()
    assert git(checkout, "status", "--short") == ""
    assert not (tmp_path / "copy" / ".git").exists()


@pytest.mark.real
def test_an_unrelated_change_is_kept(checkout: Path, tmp_path: Path) -> None:
    """Committed, and above the hunks of a file the patch touches: everything moves by a line."""
    path, _ = hunk_with_room()
    (checkout / path).write_bytes(b"// a line of mine\n" + (checkout / path).read_bytes())
    git(checkout, "commit", "--all", "--quiet", "-m", "mine")
    assert not open_checkout(checkout).dirty
    copy_and_patch(open_checkout(checkout), tmp_path / "copy", patch_of_newest())
    assert (tmp_path / "copy" / path).read_bytes().startswith(b"// a line of mine\n")


@pytest.mark.real
def test_a_change_beside_a_hunk_is_merged(checkout: Path, tmp_path: Path) -> None:
    """An uncommitted change of a hunk's context: no exact fit, but git can merge it."""
    path, hunk = hunk_with_room()
    replace_line(checkout / path, hunk.old[0], hunk.start)
    assert fit(checkout, patch_of_newest().read_bytes())[1]
    assert open_checkout(checkout).dirty
    copy_and_patch(open_checkout(checkout), tmp_path / "copy", patch_of_newest())
    merged = (tmp_path / "copy" / path).read_bytes()
    assert b"/* mine */ " + hunk.old[0] in merged
    assert b"".join(hunk.new[1:]) in merged
    assert b"<<<<<<<" not in merged


@pytest.mark.real
def test_a_conflict_names_the_hunk(checkout: Path, tmp_path: Path) -> None:
    path, hunk = hunk_with_room()
    before = (checkout / path).read_bytes()
    changed = next(i for i, (old, new) in enumerate(zip(hunk.old, hunk.new, strict=False)) if old != new)
    # the line at which the patch inserts or which it replaces, and the one before it
    for i in (changed - 1, changed):
        replace_line(checkout / path, hunk.old[i], hunk.start + i)
    with pytest.raises(EngineTrouble, match="does not apply") as caught:
        copy_and_patch(open_checkout(checkout), tmp_path / "copy", patch_of_newest())
    assert f"{path}: hunk {hunk.number} (line {hunk.start + 1}" in caught.value.why
    assert ";" not in caught.value.why.replace("; and", "")  # that hunk and no other
    git(checkout, "checkout", path)
    assert (checkout / path).read_bytes() == before


@pytest.mark.real
def test_a_tree_without_git(trees: dict[str, Path], tmp_path: Path) -> None:
    folder = part_of(trees[pins.PIN], patch_of_newest(), tmp_path / "tree")
    copy_and_patch(open_checkout(folder), tmp_path / "copy", patch_of_newest())
    path, hunk = hunk_with_room()
    replace_line(folder / path, hunk.old[0], hunk.start)
    with pytest.raises(EngineTrouble) as caught:
        copy_and_patch(open_checkout(folder), tmp_path / "other", patch_of_newest())
    assert f"{path}: hunk {hunk.number} " in caught.value.why


@pytest.mark.real
def test_a_tree_patched_already(checkout: Path, tmp_path: Path) -> None:
    apply_patch(checkout, patch_of_newest(), "checkout")
    shutil.rmtree(checkout / ".git")
    with pytest.raises(EngineTrouble) as caught:
        copy_and_patch(open_checkout(checkout), tmp_path / "copy", patch_of_newest())
    assert "already" in caught.value.why
    assert "unpatched" in caught.value.fix


@pytest.mark.real
@pytest.mark.parametrize("release", RELEASES)
def test_a_tree_finds_its_pin(trees: dict[str, Path], release: str) -> None:
    """By the patch that fits best, where the commit is unknown."""
    assert pin_for(open_checkout(trees[release])).release == release


SMALL = b"""--- a/f.txt
+++ b/f.txt
@@ -2,3 +2,4 @@ title
 two
-three
+3
+3.5
 four
"""


def small(tmp_path: Path, text: str) -> tuple[Path, Path]:
    (tmp_path / "f.txt").write_bytes(text.encode())
    (tmp_path / "p.patch").write_bytes(SMALL)
    return tmp_path, tmp_path / "p.patch"


@pytest.mark.parametrize("head", ["one\n", "", "zero\none\nand a half\n"])
def test_hunks_move(tmp_path: Path, head: str) -> None:
    apply_patch(*small(tmp_path, f"{head}two\nthree\nfour\n"), "it")
    assert (tmp_path / "f.txt").read_text() == f"{head}two\n3\n3.5\nfour\n"


def test_windows_line_ends_stay(tmp_path: Path) -> None:
    apply_patch(*small(tmp_path, "one\r\ntwo\r\nthree\r\nfour\r\n"), "it")
    assert (tmp_path / "f.txt").read_bytes() == b"one\r\ntwo\r\n3\r\n3.5\r\nfour\r\n"


def test_the_nearest_place_wins(tmp_path: Path) -> None:
    apply_patch(*small(tmp_path, "one\ntwo\nthree\nfour\nfive\ntwo\nthree\nfour\n"), "it")
    assert (tmp_path / "f.txt").read_text() == "one\ntwo\n3\n3.5\nfour\nfive\ntwo\nthree\nfour\n"


def test_all_or_nothing(tmp_path: Path) -> None:
    tree, patch = small(tmp_path, "one\ntwo\nthree\nfour\n")
    patch.write_bytes(SMALL + b"--- a/missing.txt\n+++ b/missing.txt\n@@ -1 +1 @@\n-a\n+b\n")
    with pytest.raises(EngineTrouble, match=r"it: p\.patch does not apply") as caught:
        apply_patch(tree, patch, "it")
    assert caught.value.why == "missing.txt is not in this tree"
    assert "three" in (tree / "f.txt").read_text()


def test_a_new_file_and_one_without_a_last_newline(tmp_path: Path) -> None:
    tree, patch = small(tmp_path, "one\ntwo\nthree\nfour\n")
    patch.write_bytes(
        b"--- /dev/null\n+++ b/new/g.txt\n@@ -0,0 +1,2 @@\n+a\n+b\n\\ No newline at end of file\n" + SMALL
    )
    apply_patch(tree, patch, "it")
    assert (tree / "new" / "g.txt").read_bytes() == b"a\nb"
    with pytest.raises(EngineTrouble) as caught:
        apply_patch(tree, patch, "it")
    assert "new/g.txt exists already" in caught.value.why
    assert "is applied already" in caught.value.why


@pytest.mark.parametrize(
    "patch",
    [
        b"--- a/f\n+++ b/../f\n@@ -1 +1 @@\n-a\n+b\n",
        b"--- a/f\n+++ b//etc/f\n@@ -1 +1 @@\n-a\n+b\n",
        b"--- a/f\n+++ b/f\n@@ -1,2 +1 @@\n-a\n",
        b"--- a/f\n+++ b/f\n@@ -1 +1 @@\n*a\n",
        b"--- a/f\n+++ b/f\n@@ what @@\n",
        b"rename from f\nrename to g\n",
        b"GIT binary patch\n",
    ],
)
def test_patches_that_are_none(patch: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_patch(patch)
