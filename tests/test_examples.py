"""The examples run as a reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.engine
@pytest.mark.parametrize(("words", "extended"), [(2, False), (400, True)])
def test_ask_a_text(tmp_path: Path, words: int, extended: bool) -> None:
    model = tiny.make(tmp_path / "tiny.gguf", n_ctx=256)
    (tmp_path / "book.txt").write_text("the ant in the " * words)
    command: list[str | Path] = [sys.executable, EXAMPLES / "ask_a_text.py", model, tmp_path / "book.txt", "who?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n")
    assert ("do not fit in 256" in done.stderr) is extended
    assert len(list(tmp_path.glob("*.gguf"))) == 1 + extended
