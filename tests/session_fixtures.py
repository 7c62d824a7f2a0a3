"""Fixtures of the tests of saved sessions, a plugin of conftest.py. A module's own of the same name comes first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.session_chat import open_small, small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that chats."""
    return small(tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[Any]:
    """The same, open; a test begins by clearing its memory."""
    loaded = open_small(model)
    yield loaded
    loaded.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sessions are kept: the user's data folder is the test's."""
    monkeypatch.setenv("MRROPE_DATA", str(tmp_path))
    return tmp_path / "sessions"
