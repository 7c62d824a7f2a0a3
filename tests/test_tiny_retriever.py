"""tests/data/retriever-256.gguf finds needles within 256 tokens, not past them, and past them again when extended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.evals import trie
from mrrope_gguf.evals.grid import needle_grid
from mrrope_gguf.evals.host import Host
from mrrope_gguf.evals.needles import INTRO, KEYS, NEEDLE, NOISE, QUESTION, ask, haystack
from mrrope_gguf.evals.ways import parse
from mrrope_gguf.extend import extend, method_table
from mrrope_gguf.facts import RopeFacts, read_facts
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.model import load
from tests.engine_worker import Worker
from tools import tiny_data

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

MODEL = Path(__file__).parent / "data" / "retriever-256.gguf"
ROOT = Path(__file__).parent.parent
WINDOW = 256
DEPTHS = [i / 10 for i in range(11)]
Scores = dict[int, tuple[float, float]]  # length: share exact, mean loss in nats


def scores(llm: Any, lengths: Sequence[int], seeds: int = 1) -> Scores:
    """Needles of 11 depths and `seeds` texts at each length."""
    cells = [cell for seed in range(seeds) for cell in needle_grid(llm, lengths, DEPTHS, generate=7, seed=seed)]
    found: dict[int, list[tuple[bool, float]]] = defaultdict(list)
    for cell, result in zip(cells, trie.run(llm, [cell.prompt(7) for cell in cells]), strict=True):
        said = llm.detokenize(list(result.generated)).decode(errors="replace")
        found[cell.length].append((cell.value in said, sum(result.losses) / len(result.losses)))
    return {
        n: (float(np.mean([e for e, _ in each])), float(np.mean([x for _, x in each]))) for n, each in found.items()
    }


def by_way(name: str, scale: float, lengths: Sequence[int], seeds: int = 1) -> Scores:
    with Host(MODEL, n_ctx=max(lengths) + 8, n_threads=1, n_threads_batch=1) as host:
        (way,) = parse(name, scale)
        return scores(host.switch(way), lengths, seeds)


@cache
def facts() -> RopeFacts:
    with open_gguf(MODEL) as index:
        return read_facts(index)


def test_the_file() -> None:
    assert MODEL.stat().st_size < 1 << 20
    assert (facts().arch.name, facts().n_ctx_orig, facts().n_rot, facts().freq_base) == ("llama", WINDOW, 64, 1000.0)
    with open_gguf(MODEL) as index:
        assert index.get("general.license") == "mit"
        assert "tools/train_tiny.py" in str(index.get("general.description"))
        assert index.get("tokenizer.ggml.tokens") == tiny_data.vocabulary()


def test_tables_have_something_to_do() -> None:
    table = method_table(facts(), "retriever", "mrrope-pro", 4.0)
    # pairs 0 and 1 stay, 16 change more and more, 14 do not come round in 256 tokens and are slowed by all of S
    assert (table.d_l, table.d_h, facts().n_rot // 2) == (1, 18, 32)


def written(llm: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, by llama.cpp: llama-cpp-python's own detokenize leaves out tokens of more than 32 bytes."""
    import ctypes

    import llama_cpp

    ids, out = (llama_cpp.llama_token * len(tokens))(*tokens), ctypes.create_string_buffer(1 << 16)
    n = llama_cpp.llama_detokenize(llm._model.vocab, ids, len(tokens), out, len(out), False, False)
    return out.raw[:n].decode()


def cut(texts: Sequence[str]) -> list[tuple[list[int], str]]:
    """Tokens of each text and what they are written back as."""
    llm = load(MODEL, vocab_only=True)
    tokens = [llm.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    found = [(t, written(llm, t)) for t in tokens]
    assert llm.tokenize(b"", add_bos=True) == [tiny_data.BOS_ID]
    assert (llm.token_bos(), llm.token_eos()) == (tiny_data.BOS_ID, tiny_data.EOS_ID)
    llm.close()
    return found


@pytest.mark.engine
def test_llama_cpp_cuts_texts_as_the_training_did(stock: Worker) -> None:
    needle = " " + NEEDLE.format(key=KEYS[0], value=9318207)
    texts = [INTRO, " " + NOISE, needle, QUESTION.format(key=KEYS[1]), " 9318207", " 1010012", "pass key 12345!\n\n x"]
    texts += [INTRO + NOISE + needle + QUESTION.format(key="zebra")]
    for text, (tokens, back) in zip(texts, stock.call(cut, texts), strict=True):
        assert tuple(tokens) == tiny_data.tokens(text)
        assert back == text
    ((tokens, back),) = stock.call(cut, ["Grüße, 世界 {'a': 1}"])
    assert back == "Grüße, 世界 {'a': 1}"
    assert len(tiny_data.tokens(INTRO)) == 1
    assert len(tiny_data.tokens(QUESTION.format(key=KEYS[1]))) == 6


@pytest.mark.engine
@pytest.mark.parametrize("library", ["stock", "engine"])
def test_it_retrieves_in_its_window(request: pytest.FixtureRequest, library: str) -> None:
    found = request.getfixturevalue(library).call(by_way, "none", 1.0, [64, 128, 192, 256], 8)
    assert {n: exact >= 0.95 and loss < 0.1 for n, (exact, loss) in found.items()} == dict.fromkeys(found, True), found


def several(n_tokens: int, n_keys: int) -> tuple[float, float]:
    """Of several needles in one haystack: share exact, mean loss."""
    llm = load(MODEL, n_threads=1, n_threads_batch=1)
    answers = [a for seed in range(6) for a in ask(llm, haystack(llm, n_tokens, KEYS[:n_keys], seed))]
    llm.close()
    return float(np.mean([a.exact for a in answers])), float(np.mean([a.loss for a in answers]))


@pytest.mark.engine
def test_it_tells_keys_apart(stock: Worker) -> None:
    exact, loss = stock.call(several, 240, 4)
    assert exact >= 0.9, loss
    assert loss < 0.2


@pytest.mark.engine
def test_it_fails_past_its_window(engine: Worker) -> None:
    found = engine.call(by_way, "none", 1.0, [512, 1024, 2048, 4096])
    assert {n: exact <= 0.15 and loss > (2 if n == 512 else 5) for n, (exact, loss) in found.items()} == dict.fromkeys(
        found, True
    ), found


# what is reached at S windows, docs/tiny-model.md with a margin: method, S, share exact, loss in nats
REACHED = [
    ("yarn", 2, 0.9, 0.1),
    ("mrrope-uni", 2, 0.9, 0.1),
    ("mrrope-pro", 2, 0.9, 0.1),
    ("yarn", 4, 0.9, 0.1),
    ("mrrope-uni", 4, 0.9, 0.1),
    ("mrrope-pro", 4, 0.9, 0.1),
    ("yarn", 8, 0.9, 0.1),
    ("mrrope-uni", 8, 0.8, 0.2),
    ("mrrope-pro", 8, 0.3, 1.0),
    ("yarn", 16, 0.25, 1.2),
    ("mrrope-uni", 16, 0.3, 1.2),
    ("mrrope-pro", 16, 0.7, 0.5),
]


@pytest.mark.engine
@pytest.mark.parametrize(("method", "scale", "exact", "loss"), REACHED)
def test_a_static_table_extends_it(engine: Worker, method: str, scale: int, exact: float, loss: float) -> None:
    n = WINDOW * scale
    found = engine.call(by_way, method, float(scale), [n], 1 if scale > 8 else 2)[n]
    assert (found[0] >= exact, found[1] < loss) == (True, True), found


@pytest.mark.engine
def test_a_portable_file_extends_it_on_stock(stock: Worker, tmp_path: Path) -> None:
    """What a user runs: the extended file, loaded by stock llama.cpp."""
    path = extend(MODEL, tmp_path / "x.gguf", scale=4, method="mrrope-pro", elastic=False).path
    exact, loss = stock.call(by_file, str(path), 512)
    assert exact >= 0.8, loss


def by_file(path: str, length: int) -> tuple[float, float]:
    llm = load(path, n_threads=1, n_threads_batch=1)
    found = scores(llm, [length], 2)[length]
    llm.close()
    return found


GROWN = [("yarn", 8, 0.9, 0.1), ("mrrope-uni", 4, 0.9, 0.1), ("mrrope-pro", 2, 0.9, 0.1), ("mrrope-pro", 4, 0.9, 0.1)]


@pytest.mark.engine
@pytest.mark.parametrize(("method", "scale", "exact", "loss"), GROWN)
def test_an_elastic_table_extends_it(engine: Worker, method: str, scale: int, exact: float, loss: float) -> None:
    way, n = f"elastic:{method}", WINDOW * scale
    # within the window it is the model as it was
    assert engine.call(by_way, way, float(scale), [WINDOW]) == engine.call(by_way, "none", 1.0, [WINDOW])
    found = engine.call(by_way, way, float(scale), [n], 2)[n]
    assert (found[0] >= exact, found[1] < loss) == (True, True), found


def trainer() -> str:
    """A Python that has PyTorch beside this package: this one, or MRROPE_REFERENCE_PYTHON."""
    for python in (sys.executable, os.environ.get("MRROPE_REFERENCE_PYTHON")):
        command = [str(python), "-c", "import torch, gguf, mrrope_gguf.kernels"]
        if python and not subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode:
            return python
    pytest.skip("tools/train_tiny.py needs PyTorch beside this package; MRROPE_REFERENCE_PYTHON may name such a Python")


@pytest.mark.engine
def test_training_is_the_same_again(stock: Worker, tmp_path: Path) -> None:
    python, made = trainer(), []
    for name in ("a", "b"):
        out = tmp_path / name / "m.gguf"
        out.parent.mkdir()
        train = [python, "-m", "tools.train_tiny", "--steps", "5", "--check", "5", "--out", str(out)]
        done = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "step 5/5" in done.stdout
        made.append(out)
    assert made[0].read_bytes() == made[1].read_bytes()
    # five steps teach nothing: what the committed file can do was learned
    exact, loss = stock.call(by_file, str(made[0]), WINDOW)
    assert (exact, loss > 4) == (0.0, True), loss
