"""Several processes at one file, folder, key or lock: nothing is torn, and who loses is told why in one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrrope_gguf import extend, inspect, revert
from mrrope_gguf.engine import store
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.evals import report_read
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.gguf import inplace, ranges
from mrrope_gguf.gguf.inplace import recover
from mrrope_gguf.gguf.source import FileState
from tests import tiny
from tests.edits import sha256
from tests.filesystems import mounted
from tests.patched import ROOT
from tests.race import call, race, verb

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and leases as POSIX has them")
HARD = 30  # rounds of the long form


def rounds(few: int) -> list[object]:
    """Numbers of rounds to run: few in CI, many where they are asked for."""
    return [few, pytest.param(HARD, marks=pytest.mark.hard)]


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("fs")) as place:
        yield place


# -- one DST ----------------------------------------------------------------------------------------------------------


def as_written(model: Path, folder: Path, *scales: int) -> dict[str, int]:
    """{sha256: scale} of what extending by each scale makes, under the name that both processes use."""
    folder.mkdir()
    found = {}
    for scale in scales:
        extend(model, folder / "x.gguf", scale=scale, force=True)
        found[sha256(folder / "x.gguf")] = scale
    return found


@pytest.mark.parametrize("n", rounds(3))
def test_two_extends_to_one_dst(tmp_path: Path, n: int) -> None:
    model = tiny.make(tmp_path / "m.gguf")
    wanted = as_written(model, tmp_path / "alone", 2, 4)
    before, wins = sha256(model), Counter[int]()
    for i in range(n):
        out = tmp_path / f"out{i}"
        out.mkdir()
        jobs = [verb("extend", model, out / "x.gguf", "--scale", scale) for scale in ("2", "4")]
        ended = race(tmp_path / f"race{i}", jobs)
        assert sorted(each.code for each in ended) == [0, 1], ended
        loser = next(each for each in ended if each.code)
        assert "the file exists" in loser.err
        assert "--force" in loser.err
        assert loser.out == ""
        scale = wanted[sha256(out / "x.gguf")]  # the winner's, whole
        assert (2, 4)[[each.code for each in ended].index(0)] == scale
        wins[scale] += 1
        assert [path.name for path in out.iterdir()] == ["x.gguf"]
    assert sha256(model) == before


@pytest.mark.parametrize("n", rounds(2))
def test_two_that_may_overwrite(tmp_path: Path, n: int) -> None:
    """--force: both are done, and the file is one of the two, whole."""
    model = tiny.make(tmp_path / "m.gguf")
    wanted = as_written(model, tmp_path / "alone", 2, 4)
    out = tmp_path / "out"
    out.mkdir()
    for i in range(n):
        jobs = [verb("extend", model, out / "x.gguf", "--scale", scale, "--force") for scale in ("2", "4")]
        assert [each.code for each in race(tmp_path / f"race{i}", jobs)] == [0, 0]
        assert sha256(out / "x.gguf") in wanted
        assert [path.name for path in out.iterdir()] == ["x.gguf"]


# -- in place ---------------------------------------------------------------------------------------------------------

MAP = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(hashlib.sha256(view).hexdigest(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(view).hexdigest(), flush=True)
"""
LOAD = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=64, verbose=False)
print(llm.eval([5, 6, 7]) or list(llm.scores[2][:3]), flush=True)
sys.stdin.readline()
llm.reset()
print(llm.eval([5, 6, 7]) or list(llm.scores[2][:3]), flush=True)
"""


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.parametrize("reader", [MAP, pytest.param(LOAD, marks=pytest.mark.engine)], ids=["map", "llama.cpp"])
def test_extend_in_place_beside_a_process_that_maps_the_file(
    ext4: Path, tmp_path: Path, kind: str, reader: str
) -> None:
    """On ext4 it is refused by a lease. Where the file is replaced by a copy, who has the old one mapped keeps it."""
    folder = (ext4 if kind == "ext4" else tmp_path) / f"beside{len(reader)}"
    folder.mkdir()
    model = tiny.make(folder / "m.gguf", n_ctx=64, alignment=4096)
    before = sha256(model)
    other = subprocess.Popen(
        [sys.executable, "-c", reader, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "MRROPE_ENGINE": "stock"},
    )  # fmt: skip
    assert other.stdout
    try:
        seen = other.stdout.readline()
        assert seen
        words = ["extend", "--in-place", str(model), "--scale", "2"]
        done = subprocess.run([sys.executable, "-m", "mrrope_gguf", *words], cwd=ROOT, capture_output=True, text=True)
        if kind == "ext4":
            assert done.returncode == 1
            assert "open or mapped in another program" in done.stderr
            assert "end that program" in done.stderr
        if done.returncode:
            assert sha256(model) == before
        else:
            assert sha256(model) != before
        again, _ = other.communicate("\n", timeout=60)
        assert again == seen  # what it had mapped did not change under it
    finally:
        other.kill()
        other.wait()
    if done.returncode:
        extend(model, in_place=True, scale=2)
    assert sha256(model) != before
    revert(model)
    assert sha256(model) == before
    assert [path.name for path in folder.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("n", rounds(2))
def test_several_extends_in_place(ext4: Path, tmp_path: Path, n: int) -> None:
    """Whoever comes while the file is being changed is refused; whoever comes later finds it whole."""
    for i in range(n):
        folder = ext4 / f"several{n}-{i}"
        folder.mkdir()
        model = tiny.make(folder / "m.gguf", alignment=4096)
        before = sha256(model)
        ended = race(tmp_path / f"race{i}", [verb("extend", "--in-place", model, "--scale", s) for s in "2348"])
        assert {each.code for each in ended} <= {0, 1}
        assert any(each.code == 0 for each in ended), ended
        for each in ended:
            told = ("open or mapped in another program", "was cut short", "another process has changed")
            assert each.code == 0 or any(words in each.err for words in told), each.err
        assert not recover(model)  # no journal was left
        revert(model)
        assert sha256(model) == before
        assert [path.name for path in folder.iterdir()] == ["m.gguf"]


OTHERS = {
    "reverted": (2, ("revert",), 1),
    "extended again": (2, ("extend", "--in-place", "--scale", "8"), 8),
    "extended first": (None, ("extend", "--in-place", "--scale", "8"), 8),
}


@pytest.mark.parametrize("way", ["in place", "by a copy"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_plan_for_what_the_file_was_is_not_carried_out(
    ext4: Path, monkeypatch: pytest.MonkeyPatch, way: str, other: str
) -> None:
    """Another process changes the file between our reading its header and our having it to ourselves."""
    first, words, scale = OTHERS[other]
    folder = ext4 / f"stale {way} {other}"
    folder.mkdir()
    model = tiny.make(folder / "m.gguf", alignment=4096)
    before = sha256(model)
    if first:
        extend(model, in_place=True, scale=first)
    changed: list[str] = []

    def change() -> None:
        if not changed:
            command = [sys.executable, "-m", "mrrope_gguf", *words, str(model)]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ})
            changed.append(sha256(model))

    real_lease, really_unchanged = ranges.lease, inplace._require_unchanged
    if way == "in place":

        def lease(fd: int) -> bool | None:
            os.close(fd)
            change()
            assert os.open(model, os.O_RDWR) == fd
            return real_lease(fd)

        monkeypatch.setattr(inplace, "lease", lease)
    else:
        monkeypatch.setattr(inplace, "lease", lambda fd: None)

        def look_again(file: Path | int, path: Path, state: FileState) -> None:
            change()
            really_unchanged(file, path, state)

        monkeypatch.setattr(inplace, "_require_unchanged", look_again)
    with pytest.raises(FileTrouble, match="another process has changed this file meanwhile"):
        extend(model, in_place=True, scale=4)
    monkeypatch.undo()
    assert [sha256(model)] == changed  # the other's, whole
    stored = inspect(model).stored
    assert (stored.table.scale if stored else 1) == scale
    if stored:
        revert(model)
    assert sha256(model) == before
    assert [path.name for path in folder.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("n", [5, pytest.param(200, marks=pytest.mark.hard)])
def test_readers_see_the_file_before_or_after(ext4: Path, tmp_path: Path, n: int) -> None:
    folder = ext4 / f"readers{n}"
    folder.mkdir()
    model = tiny.make(folder / "m.gguf", alignment=4096)
    before = sha256(model)
    here = "tests.contenders"
    jobs = [call(here, "back_and_forth", str(model), n), *[call(here, "look", str(model), 2 + n / 10)] * 2]
    ended = race(tmp_path / "race", jobs)
    assert [each.code for each in ended] == [0, 0, 0], ended
    seen = Counter[str]()
    for each in ended[1:]:
        seen.update(json.loads(each.out))
    assert set(seen) <= {"S = 1", "S = 2", "an in-place change of this file was cut short"}, seen
    assert seen["S = 1"] + seen["S = 2"] > 0
    assert sha256(model) == before


# -- locks, keys, logs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", rounds(1))
def test_builds_of_one_engine_take_turns(tmp_path: Path, n: int) -> None:
    """The lock that `mrrope build` holds; tests/test_build.py has two builds that compile."""
    for i in range(n):
        log = tmp_path / f"log{i}"
        jobs = [call("tests.contenders", "hold", str(log))] * 6
        ended = race(tmp_path / f"race{i}", jobs, {"MRROPE_CACHE": str(tmp_path / "cache")})
        assert [each.code for each in ended] == [0] * 6
        lines = [line.split() for line in log.read_text().splitlines()]
        assert [word for _, word in lines] == ["begin", "end"] * 6
        assert all(lines[at][0] == lines[at + 1][0] for at in range(0, 12, 2))
        assert sum(int(each.out) for each in ended) >= 1  # those who waited were told


HOLD = """
import time
from mrrope_gguf.engine import store
with store.lock("key"):
    print(1, flush=True)
    time.sleep(60)
"""


def test_a_killed_build_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "1\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with store.lock("key", wait=False):
        pass


def test_twenty_processes_make_one_key(tmp_path: Path) -> None:
    ended = race(tmp_path / "race", [call("tests.contenders", "key_of", str(tmp_path / "d" / "k"))] * 20)
    assert {each.code for each in ended} == {0}, ended
    assert len({each.out for each in ended}) == 1
    assert [path.name for path in (tmp_path / "d" / "k").iterdir()] == ["key"]


@pytest.mark.parametrize("n", [5, pytest.param(100, marks=pytest.mark.hard)])
def test_twenty_processes_write_one_log(tmp_path: Path, n: int) -> None:
    """Every line is there, whole, in the order of its own process; what several made counts once."""
    path = tmp_path / "results.jsonl"
    ended = race(tmp_path / "race", [call("tests.contenders", "append", str(path), me, n) for me in range(20)])
    assert [each.code for each in ended] == [0] * 20, ended
    runs = RunLog(path).runs()  # each line's check is looked at
    assert set(runs) == {f"{me}/{i}" for me in range(20) for i in range(n)} | {f"all/{i}" for i in range(n)}
    names = [json.loads(line)["run"] for line in path.read_text().splitlines() if line]
    assert len(names) == 2 * 20 * n
    for me in range(20):
        assert [name for name in names if name.startswith(f"{me}/")] == [f"{me}/{i}" for i in range(n)]
    assert report_read.read(tmp_path).skipped == 0
