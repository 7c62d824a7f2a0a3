"""The examples run as a reader would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrrope_gguf import texts
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


@pytest.mark.engine
@pytest.mark.real
def test_compare_methods(smollm2: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(texts.read("voyage-out")[:6000], encoding="utf-8")
    command: list[str | Path] = [sys.executable, EXAMPLES / "compare_methods.py", smollm2, book, "512"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["none", "yarn", "mrrope-uni", "mrrope-pro"]
    # every needle is found within the window by the model as it is
    assert "needles 100%" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


@pytest.mark.engine
@pytest.mark.real
def test_the_notebook(smollm2: Path, tmp_path: Path) -> None:
    """Every cell runs, in a kernel as a reader's, and says what its text says it does."""
    made = tmp_path / "made.ipynb"
    run = (
        "import sys, nbformat; from nbclient import NotebookClient; "
        "book = nbformat.read(sys.argv[1], as_version=4); "
        "NotebookClient(book, timeout=600, kernel_name='python3').execute(); nbformat.write(book, sys.argv[2])"
    )
    environment = {**os.environ, "MODEL": str(smollm2), "TOKENS": "512"}
    command: list[str | Path] = [sys.executable, "-c", run, EXAMPLES / "past_the_context.ipynb", made]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [cell for cell in json.loads(made.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert not (tmp_path / "extended.gguf").exists()
