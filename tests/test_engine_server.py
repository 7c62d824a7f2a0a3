"""llama-server of the patched build: the flags, /props, and a context that stock would cap at the original one.

Compiling llama.cpp's programs takes 10 minutes and more on 2 cores, so this is in `make test-full`, not in `make test`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.extend import extend
from tests.server import ask, serving

pytestmark = [
    pytest.mark.engine,
    pytest.mark.real,
    pytest.mark.skipif("MRROPE_TEST_FULL" not in os.environ, reason="compiles llama-server: `make test-full`"),
]
N_CTX = 10240  # past SmolLM2's 8192


def completion(address: str) -> str:
    text = ask(address, "/completion", prompt="The capital of France is", n_predict=4, temperature=0)["content"]
    assert isinstance(text, str)
    return text


def test_flags_on_a_file_that_was_not_extended(programs: Path, smollm2: Path) -> None:
    flags = ("--rope-scaling", "mrrope-pro", "--rope-scale", "4", "-c", str(N_CTX))
    with serving(programs, "-m", smollm2, *flags) as address:
        props = ask(address, "/props")
        assert props["rope"] == {"method": "mrrope-pro", "scale": 4.0, "elastic": False}
        assert props["default_generation_settings"]["n_ctx"] == N_CTX
        assert "Paris" in completion(address)


def test_without_flags_nothing_changes(programs: Path, smollm2: Path) -> None:
    with serving(programs, "-m", smollm2, "-c", str(N_CTX)) as address:
        props = ask(address, "/props")
        assert props["rope"] == {"method": "none", "scale": 1.0, "elastic": False}
        assert (
            props["default_generation_settings"]["n_ctx"] == 8192
        )  # a slot gets no more than the model was trained on


@pytest.mark.parametrize("rendering", ["engine", "portable"])
def test_an_extended_file(programs: Path, smollm2: Path, tmp_path: Path, rendering: Any) -> None:
    done = extend(smollm2, tmp_path / "extended.gguf", scale=2, method="mrrope-uni", rendering=rendering)
    with serving(programs, "-m", done.path, "-c", str(N_CTX)) as address:
        props = ask(address, "/props")
        assert (props["rope"]["method"], props["rope"]["scale"]) == ("mrrope-uni", 2.0)
        assert props["default_generation_settings"]["n_ctx"] == N_CTX
        assert "Paris" in completion(address)


def test_a_trained_scaling_is_not_replaced(programs: Path, smollm2: Path, tmp_path: Path) -> None:
    """On an extended file another type of scaling is refused, and the server says so by not starting."""
    done = extend(smollm2, tmp_path / "extended.gguf", scale=2)
    command = [programs / "llama-server", "-m", done.path, "--rope-scaling", "yarn", "-c", "512", "--port", "0"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert "on top of the file's own" in ended.stdout + ended.stderr
