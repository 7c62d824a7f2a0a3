"""Killed, or failed by the disk, at the calls that touch files: what was there or what was to be is there, whole.

CI meets a sample of the faults, the same ones every time; `make test-hard` every fault at every call (tests/faults).
"""

from __future__ import annotations

import ctypes.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from mrrope_gguf.gguf.names import journal_path
from tests.faults.injector import MODES, VANISHING, Call, Injector, Mode, compiled
from tests.faults.operation import DONE, KILLED, REFUSED, Met, Operation
from tests.faults.operations import OPERATIONS
from tests.faults.sweep import Sweep, Swept, run
from tests.filesystems import mounted

SAMPLE = 20
MODEL_FILES = (
    "extend", "extend-over", "extend-split", "extend-vanishing", "in-place", "in-place-split", "revert", "revert-split",
)  # fmt: skip
# these load libllama, or compile a toy once
SAVED = ("sessions", "sessions-new", "eval", "build", "build-remove")
# how they write on each file system: what a row of docs/reliability.md says is what was tested
JOURNAL, REPLACED = "in-place insert", "in-place replace"
SHARED = {
    "extend": "reflink", "in-place": REPLACED, "in-place-split": REPLACED, "revert": REPLACED, "revert-split": REPLACED,
}  # fmt: skip
COPIED = dict.fromkeys(("extend", "extend-over", "extend-split", "extend-vanishing"), "copy_file_range")
WAYS = {"ext4": {**SHARED, **COPIED, "in-place": JOURNAL, "revert": JOURNAL}, "xfs": SHARED, "btrfs": SHARED}
# a removal makes few calls, and vanishing has four modes
FEWER = {"extend-vanishing": 100, "build-remove": 120}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or ctypes.util.find_library("musl") is not None, reason="LD_PRELOAD and /proc of glibc"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """On ext4, whose way in place has a journal; elsewhere, in a folder called "any", where it cannot be mounted."""
    compiled()
    folder = tmp_path_factory.mktemp("faults")
    try:
        with mounted("ext4", folder, megabytes=128) as disk:
            yield disk
    except pytest.skip.Exception:
        (folder / "any").mkdir()
        yield folder / "any"


def took_its_way(swept: Swept, operation: str, place: Path) -> None:
    """A sweep that met faults in copies is not one of the journal's."""
    print(f"{operation} on {place.name}: {swept}")
    if operation not in MODEL_FILES:
        return
    wanted = WAYS.get(place.name, {}).get(operation, swept.way)
    assert swept.way == wanted, f"{operation} on {place.name}: {swept.way}"
    if WAYS["ext4"][operation] == JOURNAL and place.name == "any" and swept.way != JOURNAL:
        pytest.skip(f"survived, but by way of {swept.way}: the journal needs ext4, which cannot be mounted here")


def survived(swept: Swept, modes: int) -> None:
    assert not swept.complaints, swept.complaints[:3]
    assert len(swept.points) == modes
    assert len(swept.outcomes) >= 2, swept.outcomes  # faults were met, and not all alike


@pytest.mark.parametrize("operation", MODEL_FILES)
def test_a_sample_of_faults_in_model_files(operation: str, place: Path) -> None:
    swept = run(operation, place / operation, sample=SAMPLE)
    survived(swept, len(VANISHING if operation == "extend-vanishing" else MODES))
    assert swept.n_points == SAMPLE
    took_its_way(swept, operation, place)


@pytest.mark.engine
@pytest.mark.parametrize("operation", SAVED)
def test_a_sample_of_faults_in_what_is_saved(operation: str, place: Path) -> None:
    swept = run(operation, place / operation, sample=SAMPLE)
    survived(swept, len(MODES) - (operation == "build-remove"))  # nothing is written there, so no half a write
    assert swept.n_points == SAMPLE
    took_its_way(swept, operation, place)


@pytest.mark.hard
@pytest.mark.engine
@pytest.mark.parametrize("operation", MODEL_FILES + SAVED)
def test_every_fault_at_every_call(operation: str, place: Path) -> None:
    swept = run(operation, place / operation)
    survived(swept, len(VANISHING if operation == "extend-vanishing" else MODES) - (operation == "build-remove"))
    assert swept.n_points >= FEWER.get(operation, 200)
    took_its_way(swept, operation, place)


@pytest.mark.hard
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("operation", ["extend", "in-place", "in-place-split", "revert", "revert-split"])
def test_every_fault_on_other_file_systems(operation: str, kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path, megabytes=320) as disk:
        swept = run(operation, disk / operation)
    survived(swept, len(MODES))
    assert swept.n_points >= 200
    took_its_way(swept, operation, disk)


def test_a_fault_is_really_met(place: Path) -> None:
    """The sweep itself: what it counts, kills and fails is what the operation does."""
    swept = run("extend", place / "met", sample=60)
    assert swept.calls > 20
    assert swept.outcomes["was killed"] == 18
    assert swept.outcomes["was refused"] >= 10
    assert set(swept.points) == set(MODES)


class _Unarmed:
    """In place of the library: every call is counted, and no fault is ever met."""

    def arm(self, *_: object) -> None: ...

    def disarm(self) -> None: ...

    def calls(self) -> list[Call]:
        return [Call(1, "opendir", "o")]


class _Nothing(Operation):
    def prepare(self) -> None: ...

    act = finished = prepare

    def look(self, met: Met, mode: Mode) -> list[str]:
        return []

    def recovered(self) -> list[str]:
        return []


@pytest.mark.parametrize("mode", MODES)
def test_a_kill_that_does_not_kill_is_a_complaint(tmp_path: Path, mode: str) -> None:
    met, wrong = Sweep(_Nothing(tmp_path), cast("Injector", _Unarmed())).point(Call(1, "opendir", "o"), MODES[mode])
    assert met.how == DONE
    assert wrong == (["it was to be killed, and it was done: "] if mode.startswith("kill") else [])


@pytest.mark.parametrize("mode", ["kill before", "kill after"])
def test_every_kind_of_call_can_be_killed_at(place: Path, mode: str) -> None:
    """opendir once was not: its points were counted, and nothing was killed."""
    swept = run("build-remove", place / "kinds", only=("opendir", mode))
    assert (swept.outcomes, swept.points) == ({"was killed": 1}, {mode: 1})
    assert not swept.complaints


# -- a new split model: what the sweep takes for whole --


@pytest.mark.parametrize("left", ["none", "all", "some", "other bytes", "journal", "journal and some"])
@pytest.mark.parametrize("mode", ["EIO", "kill after"])
def test_a_split_model_in_part_is_a_complaint(tmp_path: Path, left: str, mode: str) -> None:
    """Unless it was killed, and a journal says so."""
    operation = OPERATIONS["extend-split"](tmp_path / "place")
    operation.act()
    operation.finished()
    first, second, third = sorted((tmp_path / "place").glob("new*"))
    whole = {path.name: path.read_bytes() for path in (first, second, third)}
    gone = {"none": (first, second, third), "journal": (first, second, third), "some": (third,)}.get(left, ())
    for path in (third,) if left == "journal and some" else gone:
        path.unlink()
    if left == "other bytes":
        first.write_bytes(whole[first.name][:-1])
    if left.startswith("journal"):
        journal_path(first).write_bytes(b"cut short")
    met = Met(KILLED if mode.startswith("kill") else REFUSED)
    fine = left in ("none", "all") or (left.startswith("journal") and met.how == KILLED)
    assert (operation.look(met, MODES[mode]) == []) == fine
