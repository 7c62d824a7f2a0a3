"""A file whose in-place change was cut short: nobody reads it, everybody says what brings it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mrrope_gguf import FileTrouble, extend, fit, inspect, load
from mrrope_gguf.gguf.names import journal_path
from tests import tiny


def again(path: Path) -> object:
    return extend(path, scale=4)


@pytest.mark.parametrize(
    "verb",
    [inspect, fit, again, pytest.param(load, marks=pytest.mark.engine)],
    ids=["inspect", "fit", "extend", "load"],
)
def test_is_told_apart_from_a_bad_file(tmp_path: Path, verb: Callable[[Path], object]) -> None:
    path = tiny.make(tmp_path / "m.gguf")
    journal_path(path).write_bytes(b"cut short")
    with pytest.raises(FileTrouble, match="in-place change of this file was cut short") as caught:
        verb(path)
    assert "mrrope revert" in caught.value.fix
