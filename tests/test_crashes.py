"""Killed, or failed by the disk, at the calls that touch files: what was there or what was to be is there, whole.

CI meets a sample of the faults, the same ones every time; `make test-hard` every fault at every call (tests/faults).
"""

from __future__ import annotations

import ctypes.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.library import MODES, VANISHING, compiled
from tests.faults.sweep import Swept, run
from tests.filesystems import mounted

SAMPLE = 20
MODEL_FILES = (
    "extend", "extend-over", "extend-split", "extend-vanishing", "in-place", "in-place-split", "revert", "revert-split",
)  # fmt: skip
# these load libllama, or compile a toy once
SAVED = ("sessions", "sessions-new", "eval", "build", "build-remove")
# a removal makes few calls, and vanishing has four modes
FEWER = {"extend-vanishing": 100, "build-remove": 120}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or ctypes.util.find_library("musl") is not None, reason="LD_PRELOAD and /proc of glibc"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """On ext4, whose way in place has a journal; elsewhere where it cannot be mounted."""
    compiled()
    folder = tmp_path_factory.mktemp("faults")
    try:
        with mounted("ext4", folder, megabytes=128) as disk:
            yield disk
    except pytest.skip.Exception:
        yield folder


def survived(swept: Swept, modes: int) -> None:
    assert not swept.complaints, swept.complaints[:3]
    assert len(swept.points) == modes
    assert len(swept.outcomes) >= 2, swept.outcomes  # faults were met, and not all alike


@pytest.mark.parametrize("operation", MODEL_FILES)
def test_a_sample_of_faults_in_model_files(operation: str, place: Path) -> None:
    swept = run(operation, place / operation, sample=SAMPLE)
    survived(swept, len(VANISHING if operation == "extend-vanishing" else MODES))
    assert swept.n_points == SAMPLE


@pytest.mark.engine
@pytest.mark.parametrize("operation", SAVED)
def test_a_sample_of_faults_in_what_is_saved(operation: str, place: Path) -> None:
    swept = run(operation, place / operation, sample=SAMPLE)
    survived(swept, len(MODES) - (operation == "build-remove"))  # nothing is written there, so no half a write
    assert swept.n_points == SAMPLE


@pytest.mark.hard
@pytest.mark.engine
@pytest.mark.parametrize("operation", MODEL_FILES + SAVED)
def test_every_fault_at_every_call(operation: str, place: Path) -> None:
    swept = run(operation, place / operation)
    survived(swept, len(VANISHING if operation == "extend-vanishing" else MODES) - (operation == "build-remove"))
    assert swept.n_points >= FEWER.get(operation, 200)


@pytest.mark.hard
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("operation", ["extend", "in-place", "in-place-split", "revert", "revert-split"])
def test_every_fault_on_other_file_systems(operation: str, kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path, megabytes=320) as disk:
        swept = run(operation, disk / operation)
    survived(swept, len(MODES))
    assert swept.n_points >= 200


def test_a_fault_is_really_met(place: Path) -> None:
    """The sweep itself: what it counts, kills and fails is what the operation does."""
    swept = run("extend", place / "met", sample=60)
    assert swept.calls > 20
    assert swept.outcomes["was killed"] == 18
    assert swept.outcomes["was refused"] >= 10
    assert set(swept.points) == set(MODES)
