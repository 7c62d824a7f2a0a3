"""Runs only under `make test-reference`: without MRROPE_REFERENCE_PYTHON nothing in this folder is collected."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine.pins import PIN, pin
from mrrope_gguf.engine.sdist import fetch_sdist, unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

PYTHON = os.environ.get("MRROPE_REFERENCE_PYTHON")
collect_ignore_glob = ["transformers_side.py"] if PYTHON else ["*.py"]

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Reference:
    """What transformers computed, and the same models as GGUF."""

    folder: Path
    logits: dict[str, Floats]  # "<name>/<table>/<run>" -> (n_tokens, n_vocab)

    def gguf(self, name: str) -> Path:
        return self.folder / f"{name}.gguf"


@pytest.fixture(scope="session")
def llama_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama.cpp tree whose converter is used: MRROPE_LLAMA_SOURCE, else the one the engine is built from."""
    if named := os.environ.get("MRROPE_LLAMA_SOURCE"):
        return Path(named)
    folder = tmp_path_factory.mktemp("llama.cpp")
    unpack(fetch_sdist(pin(PIN), print), folder)
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, llama_source: Path) -> Reference:
    """Every model made, converted and run by transformers, once."""
    folder = tmp_path_factory.mktemp("reference")
    command = [str(PYTHON), "-m", "tests.reference.transformers_side", str(llama_source), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    _versions.update(json.loads((folder / "versions.json").read_text()))
    with np.load(folder / "transformers.npz") as file:
        return Reference(folder, dict(file))


_versions: dict[str, str] = {}
_measured: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)


@dataclass(frozen=True)
class Comparison:
    """Differences of logits, and the record of them that is printed at the end."""

    limit: float = 1e-3

    def __call__(self, name: str, way: str, got: Floats, want: Floats) -> None:
        """Fails where max |got - want| is more than `limit` of max |want|."""
        assert got.shape == want.shape
        assert np.isfinite(got).all()
        largest = relative(got, want)
        rms = float(np.sqrt(((got - want) ** 2).mean()) / np.sqrt((want**2).mean()))
        before = _measured[name].get(way, (0.0, 0.0))
        _measured[name][way] = (max(before[0], largest), max(before[1], rms))
        assert largest < self.limit, f"{name}, {way}: differs by {largest:.2e} of the largest logit, RMS {rms:.2e}"


def relative(got: Floats, want: Floats) -> float:
    """The largest difference of two sets of logits over the largest logit."""
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.fixture(scope="session")
def compare() -> Comparison:
    return Comparison()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of docs/reference.md: per model and way, largest difference / RMS difference."""
    if not _measured:
        return
    ways = list(dict.fromkeys(way for row in _measured.values() for way in row))
    terminalreporter.section("largest relative difference / RMS; " + ", ".join(map(" ".join, _versions.items())))
    terminalreporter.write_line("| model | " + " | ".join(ways) + " |")
    terminalreporter.write_line("|---" * (len(ways) + 1) + "|")
    for name, row in _measured.items():
        cells = [f"{row[w][0]:.1e} / {row[w][1]:.1e}" if w in row else "" for w in ways]
        terminalreporter.write_line(f"| {name} | " + " | ".join(cells) + " |")
