"""Up to n_ctx_orig an elastic context is the model that was extended, on stock llama.cpp, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf import fetch
from mrrope_gguf.architectures import architecture
from mrrope_gguf.engine import set_elastic
from mrrope_gguf.extend import extend
from tests import tiny
from tests.elastic import ORIG, extended, scale_of, with_keys
from tests.engine_session import session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS = tiny.tokens(200)

# a name of engine_models.MODELS, how `extend` renders it, and what else is asked of it
FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, portable": ("llama", "portable", {}),
    "llama, stock sees yarn": ("llama", "engine", {}),
    "qwen2": ("qwen2", "engine", {}),
    "partial rotary": ("stablelm", "engine", {}),
    "rope_freqs, portable": ("rope_freqs", "portable", {}),
    "rope_freqs, engine": ("rope_freqs", "engine", {}),
    "linear": ("llama", "portable", {"method": "linear"}),
    "yarn": ("llama", "engine", {"method": "yarn"}),
    "no temperature": ("llama", "portable", {"attn_factor": 1.0}),
    "linear source": ("linear", "engine", {}),
    "linear source by 3": ("linear", "engine", {"extra": {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}}),
    "linear source, portable": ("linear", "portable", {}),
    "temperature of its own": ("llama", "portable", {"extra": {"rope.scaling.attn_factor": 1.25}}),
    "temperature of its own, engine": ("llama", "engine", {"extra": {"rope.scaling.attn_factor": 1.25}}),
    "smollm3": ("smollm3", "engine", {}),
    "gemma2": ("gemma2", "engine", {}),
    "gemma3": ("gemma3", "engine", {}),
}


def logits(path: Path, cuts: tuple[int, ...] = (ORIG,), static: bool = False, **settings: Any) -> Floats:
    """Logits of the tokens in batches of these sizes, in an empty context; a last scale, where the library has one."""
    with session(path, **settings) as s:
        if static:
            set_elastic(s.ctx, False)
        rows, at = [], 0
        for n in cuts:
            rows.append(s.feed(TOKENS[at : at + n]))
            at += n
        return np.concatenate(rows)


def same(engine: Worker, stock: Worker, source: Path, path: Path, **settings: Any) -> None:
    """Assert that the two files' logits are of the same bits, and that the full table's are others."""
    wanted = stock.call(logits, source, **settings)
    assert (engine.call(logits, path, **settings) == wanted).all()
    assert (engine.call(logits, path, static=True, **settings) != wanted).any()


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_its_source(engine: Worker, stock: Worker, tmp_path: Path, name: str) -> None:
    arch, rendering, changes = FILES[name]
    source, path = extended(tmp_path, arch, rendering, **changes)
    same(engine, stock, source, path)
    same(engine, stock, source, path, cuts=(*[7] * 9, 1))
    same(engine, stock, source, path, cuts=(30, *[1] * 34), n_threads=2)


ARCHS = ("minicpm", "granite", "mistral3", "internlm2", "xverse", "ernie4_5", "exaone", "qwen3", "bailingmoe")


@pytest.mark.parametrize("name", ARCHS)
def test_other_architectures(engine: Worker, stock: Worker, tmp_path: Path, name: str) -> None:
    # minicpm's portable file is a longrope one, of which stock takes the long factors
    known = architecture(name)
    assert known is not None
    source = tiny.make(tmp_path / "in.gguf", name, n_ctx=ORIG)
    for rendering in ("engine", *(["portable"] if known.portable or known.longrope else [])):
        wish: Any = rendering
        done = extend(source, tmp_path / f"{rendering}.gguf", scale=4, rendering=wish)
        assert done.rendering.kind == rendering
        same(engine, stock, source, done.path)


def test_a_re_expressed_file(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    # its rows lie in another order, so sums round otherwise
    source, path = extended(tmp_path, "qwen2", "portable", n_layer=2)
    wanted = stock.call(logits, source)
    np.testing.assert_allclose(engine.call(logits, path), wanted, atol=2e-4)
    assert np.abs(engine.call(logits, path, static=True) - wanted).max() > 0.1


@pytest.mark.parametrize(
    "kept",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_log_multiplier": 0.1},
        {"rope.scaling.attn_factor": 1.125},
    ],
    ids=["linear", "yarn", "yarn log multiplier", "attn_factor"],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "smollm3"])
def test_what_stock_falls_back_to_is_set_aside(
    engine: Worker, stock: Worker, tmp_path: Path, name: str, kept: dict[str, Any]
) -> None:
    source, path = with_keys(tmp_path, name, extra=kept)
    same(engine, stock, source, path)


@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("flash", [0, 1])
def test_in_every_cache(engine: Worker, stock: Worker, tmp_path: Path, cache: str, flash: int) -> None:
    source, path = extended(tmp_path, "llama", head_dim=32, n_embd=128, n_layer=2)
    same(engine, stock, source, path, cache=cache, flash_attn_type=flash, cuts=(20, 43, 1))


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_with_sliding_windows(engine: Worker, stock: Worker, tmp_path: Path, name: str, swa_full: bool) -> None:
    source, path = extended(tmp_path, name)
    same(engine, stock, source, path, swa_full=swa_full, cuts=(40, 24))


@pytest.mark.parametrize("n_ubatch", [16, 48, 64, 512])
def test_small_micro_batches(engine: Worker, stock: Worker, tmp_path: Path, n_ubatch: int) -> None:
    source, path = extended(tmp_path, "llama", n_layer=2)
    same(engine, stock, source, path, n_ubatch=n_ubatch)


@pytest.mark.parametrize("n_ubatch", [16, 48, 512])
@pytest.mark.parametrize(("before", "size"), [(0, 65), (0, 200), (63, 2), (50, 150), (33, 60)])
def test_a_batch_that_runs_over_the_bound(
    engine: Worker, stock: Worker, tmp_path: Path, before: int, size: int, n_ubatch: int
) -> None:
    source, path = extended(tmp_path, "llama", n_layer=2)
    ends, over = ((before, size) if before else (size,) for size in (ORIG - before, size))
    found = engine.call(logits, path, over, n_ubatch=n_ubatch)
    wanted = stock.call(logits, source, ends, n_ubatch=n_ubatch)
    assert (found[:ORIG] == wanted).all()
    beyond = stock.call(logits, source, over, n_ubatch=n_ubatch)[ORIG:]
    assert (found[ORIG:] != beyond).any()


def two_texts(path: Path, unified: bool, lengths: tuple[int, int]) -> tuple[Floats, float]:
    """Logits of two sequences that share every batch, token about; S where the library has one."""
    with session(path, n_seq=2, unified=unified) as s:
        rows = []
        for at in range(0, max(lengths), 16):
            tokens = [(i, seq) for i in range(at, at + 16) for seq in (0, 1) if i < lengths[seq]]
            rows.append(s.decode([(TOKENS[i + 100 * seq], i, seq) for i, seq in tokens]))
        return np.concatenate(rows), s.next(0)


@pytest.mark.parametrize("lengths", [(64, 64), (64, 20)])
@pytest.mark.parametrize("unified", [True, False])
def test_two_sequences(engine: Worker, stock: Worker, tmp_path: Path, unified: bool, lengths: tuple[int, int]) -> None:
    source, path = extended(tmp_path, "llama", n_layer=2)
    wanted, _ = stock.call(two_texts, source, unified, lengths)
    assert (engine.call(two_texts, path, unified, lengths)[0] == wanted).all()


def emptied(path: Path, how: str) -> tuple[Floats, float, float]:
    """Logits of a window in a context that had grown and was emptied; S before and after."""
    with session(path) as s:
        s.feed(TOKENS)
        grown = scale_of(s)
        if how == "clear":
            s.clear()
        else:
            s.remove(0)
        return s.feed(TOKENS[:ORIG]), grown, scale_of(s)


@pytest.mark.parametrize("how", ["clear", "remove"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "rope_freqs"])
def test_an_emptied_context_is_the_original_again(
    engine: Worker, stock: Worker, tmp_path: Path, name: str, how: str
) -> None:
    source, path = extended(tmp_path, name)
    found, grown, after = engine.call(emptied, path, how)
    assert grown > 1.5
    assert after == 1.0
    assert (found == stock.call(logits, source)).all()


@pytest.mark.real
@pytest.mark.parametrize("which", ["smollm2", "gemma"])
def test_a_real_model(
    engine: Worker, stock: Worker, tmp_path: Path, request: pytest.FixtureRequest, which: str
) -> None:
    source: Path = request.getfixturevalue(which)
    path = extend(source, tmp_path / "out.gguf", scale=4).path
    text = fetch.article(fetch.fetch(fetch.BRITANNICA))
    settings: dict[str, Any] = {"n_ctx": 256, "cache": "f16", "flash_attn_type": 1, "swa_full": False, "n_threads": 2}
    wanted = stock.call(last_row, source, text, **settings)
    assert (engine.call(last_row, path, text, **settings) == wanted).all()


def last_row(path: Path, text: str, **settings: Any) -> Floats:
    with session(path, **settings) as s:
        row: Floats = s.feed(s.tokenize(text[:2000])[:200])[-1]
        return row
