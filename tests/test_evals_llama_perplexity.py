"""Our perplexity against a tool nobody here wrote: llama-perplexity, on the same chunks."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from mrrope_gguf import evals, extend, texts
from mrrope_gguf.model import load

pytestmark = [
    pytest.mark.engine,
    pytest.mark.real,
    pytest.mark.skipif("MRROPE_TEST_FULL" not in os.environ, reason="compiles llama.cpp's programs: `make test-full`"),
]

CHUNK, CHUNKS = 512, 4


@pytest.mark.parametrize("scale", [None, 4])
def test_agrees_with_llama_perplexity(programs: Path, smollm2: Path, tmp_path: Path, scale: int | None) -> None:
    program = programs / "llama-perplexity"
    if not program.exists():
        pytest.skip("llama-perplexity is not among the programs of this build")
    model = smollm2
    if scale:
        model = extend(smollm2, tmp_path / "static.gguf", scale=scale, elastic=False).path
    text = tmp_path / "text.txt"
    text.write_text(texts.read("voyage-out")[:20000], encoding="utf-8")
    flags = ["-c", str(CHUNK), "-b", str(CHUNK), "--chunks", str(CHUNKS), "-t", "1", "-fa", "off"]
    command = [str(program), "-m", str(model), "-f", str(text), *flags]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600, check=True)
    (theirs,) = re.findall(r"Final estimate: PPL = ([\d.]+)", ran.stdout + ran.stderr)
    llm = load(model, CHUNK, n_threads=1, n_threads_batch=1, flash_attn=False)
    ours = evals.perplexity(llm, text, n_tokens=CHUNK * CHUNKS, half_window=CHUNK)
    assert len(ours.losses) == CHUNKS * (CHUNK - 1 - CHUNK // 2)
    assert ours.value == pytest.approx(float(theirs), rel=1e-3)  # the issue asks for 0.5 %
