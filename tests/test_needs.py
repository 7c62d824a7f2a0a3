"""A test that lacks what it needs is skipped; where CI has made sure of that, it fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import test_bits32, test_fuzz_native
from tests.filesystems import mounted
from tests.fuzz import native_targets as native


def as_user(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "geteuid", lambda: 1000, raising=False)
    with mounted("tmpfs", tmp_path, megabytes=1):
        pass


def without_mkfs(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "geteuid", lambda: 0, raising=False)
    patch.setattr("sys.platform", "linux")
    patch.setattr("shutil.which", lambda name: None)
    with mounted("xfs", tmp_path):
        pass


def without_mount(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "geteuid", lambda: 0, raising=False)
    patch.setattr("sys.platform", "linux")
    refused = subprocess.CompletedProcess([], 32, "", "permission denied")
    patch.setattr(subprocess, "run", lambda *args, **how: refused)
    with mounted("tmpfs", tmp_path, megabytes=1):
        pass


def without_clang(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native, "libfuzzer", lambda: None)
    test_fuzz_native.engine(libfuzzer=True)


def without_multilib(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native, "plain32", lambda: None)
    test_bits32.compiler()


@pytest.mark.parametrize(
    ("lacking", "needed"),
    [
        (as_user, "MRROPE_NEED_MOUNTS"),
        (without_mkfs, "MRROPE_NEED_MOUNTS"),
        (without_mount, "MRROPE_NEED_MOUNTS"),
        (without_clang, "MRROPE_NEED_COMPILERS"),
        (without_multilib, "MRROPE_NEED_COMPILERS"),
    ],
)
def test_skipped_or_failed(
    lacking: Callable[[Path, pytest.MonkeyPatch], None], needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(needed, raising=False)
    (tmp_path / "1").mkdir()
    with monkeypatch.context() as patch, pytest.raises(pytest.skip.Exception):
        lacking(tmp_path / "1", patch)
    monkeypatch.setenv(needed, "1")
    (tmp_path / "2").mkdir()
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match=f"{needed} is set, and "):
        lacking(tmp_path / "2", patch)
