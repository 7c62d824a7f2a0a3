"""The Python layer under a fuzzer (atheris where it is installed, else a plain loop): what a stranger's file can do."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mrrope_gguf.radix_file import read_radix
from mrrope_gguf.revert import revert
from tests.fuzz import python_main, python_runs, python_targets
from tests.fuzz.native_targets import CORPUS, FINDS, Outcome
from tests.fuzz.python_targets import TARGETS
from tests.fuzz.seeds import extendable

SECONDS = int(os.environ.get("MRROPE_FUZZ_SECONDS", 600))  # of the long runs
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the targets write where Windows keeps files open")


def require_clean(outcome: Outcome) -> None:
    assert outcome.returncode == 0, outcome.log[-6000:]


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_clean(name: str) -> None:
    """What once reached something new, and what once broke something, without any fuzzer."""
    files = [path for folder in (CORPUS, FINDS) for path in sorted(folder.glob(f"{name}/*"))]
    assert files
    for path in files:
        TARGETS[name](path.read_bytes())


@pytest.mark.slow
def test_a_short_run_of_all_targets_finds_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(python_runs.run, name, 8, tmp_path) for name in TARGETS}
    for name, run in runs.items():
        require_clean(run.result())
        assert run.result().executions > 5, name
        print(f"{name}: {run.result().executions} executions, {run.result().coverage} edges")
        if python_runs.has_atheris():
            assert run.result().coverage > 20, "atheris sees into the package"


@pytest.mark.slow
def test_the_plain_loop_works_without_atheris(tmp_path: Path) -> None:
    outcome = python_runs.run("radix", 2, tmp_path, plain=True, seed=1)
    require_clean(outcome)
    assert outcome.executions > 50


@pytest.mark.hard
@pytest.mark.parametrize("name", TARGETS)
def test_ten_minutes_find_nothing(name: str, tmp_path: Path) -> None:
    if not python_runs.has_atheris():
        pytest.skip("atheris is not installed: `pip install atheris` (Linux, Python 3.11 to 3.13)")
    outcome = python_runs.run(name, SECONDS, tmp_path)
    require_clean(outcome)
    print(f"{name}: {outcome.executions} executions, {outcome.coverage} edges, {outcome.features} features")


# --- that a fault would be found ----------------------------------------------------------------------------------


def test_a_byte_that_does_not_come_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(src: Path, dst: Path | None = None, force: bool = False) -> None:
        revert(src, dst, force=force)
        raw = bytearray((dst or src).read_bytes())
        raw[-1] ^= 1
        (dst or src).write_bytes(raw)

    python_targets.edit(extendable())
    monkeypatch.setattr(python_targets, "revert", careless)
    with pytest.raises(AssertionError, match="every byte"):
        python_targets.edit(extendable())


def test_an_exception_that_is_none_of_ours_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(path: Path) -> None:
        raise KeyError(path)

    monkeypatch.setattr(python_targets, "inspect", careless)
    with pytest.raises(KeyError):
        python_targets.show(extendable())


def test_the_mutator_gets_as_far_as_a_planted_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault behind sound JSON with one large number in the right place is reached within seconds."""

    def planted(data: bytes) -> None:
        path = tmp_path / "table.json"
        path.write_bytes(data)
        try:
            found = read_radix(path)
        except Exception:
            return
        if found.scale is not None and found.scale > 1e6:
            raise ZeroDivisionError("planted")

    monkeypatch.setitem(TARGETS, "radix", planted)
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "a").write_text(json.dumps({"radix": [1, 1.5], "scale": 3}))
    options = ["-max_total_time=60", "-seed=3", f"-artifact_prefix={tmp_path}/", str(tmp_path / "seeds")]
    assert python_main.in_a_loop("radix", "-", options) == 1
    assert list(tmp_path.glob("crash-*"))
