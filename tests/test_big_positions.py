"""Positions up to 4M and S up to 512: tables, what a file says of them, what llama.cpp's float32 angles make of them.

A finding, written down here as bounds: ggml computes position * theta in float32, so its angles are off by up to
1.7e-7 rad for each position, 0.69 rad at 4M, in the fastest pairs, which no method slows. Ours are exact (kernels.py).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGUFReader

from mrrope_gguf import extend, fit, inspect, revert
from mrrope_gguf.engine import get_elastic, get_table, set_factors
from mrrope_gguf.errors import Refused
from mrrope_gguf.kernels import rope
from mrrope_gguf.tables import METHODS, RopeTable, radix_to_factors, rescale, rope_table, stored_factors
from tests import ggml_oracle, tiny
from tests.engine_session import kl, rel_rms, session
from tests.engine_worker import Worker
from tests.ggml_rope import ggml_rope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.engine_session import Floats

FAR = 1 << 22
N_CTX = 8192
FULL = FAR / N_CTX  # 512
MODELS: dict[str, dict[str, Any]] = {
    "llama 2": {"n_rot": 128, "freq_base": 1e4, "n_ctx_orig": 4096},
    "llama 3": {"n_rot": 128, "freq_base": 5e5, "n_ctx_orig": N_CTX},
    "small heads": {"n_rot": 64, "freq_base": 1e5, "n_ctx_orig": N_CTX},
}
RULED = [method for method in METHODS if method not in ("custom", "none")]
TOKENS = tiny.tokens(64)
stock_only = pytest.mark.skipif(ggml_oracle.libggml() is None, reason="llama-cpp-python is not installed")


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", RULED)
def test_what_a_file_stores_of_a_table_is_the_table(method: str, model: str) -> None:
    """The radix is stored as float32 and multiplied up again: at S = 512 that costs no more than at S = 4."""
    for scale in (1.001, 2.0, 64.0, FULL):
        table = rope_table(method, scale=scale, **MODELS[model])
        assert all(math.isfinite(f) and 1.0 <= f <= scale for f in table.factor_values)
        held = stored_factors(table.radix_values, None, table.lead)
        assert held == pytest.approx(list(table.factor_values), rel=2e-6)
        assert rescale(table, 1.0).factor_values == (1.0,) * (table.n_rot // 2)


def test_a_custom_table_moves_from_512_to_any_stage() -> None:
    made = rope_table("mrrope-uni", scale=FULL, **MODELS["llama 3"])
    table = rope_table("custom", scale=FULL, radix=made.radix_values, **MODELS["llama 3"])
    for scale in (1.0, 1.5, 23.2, 511.9):
        moved = rescale(table, scale)
        wanted = rope_table("mrrope-uni", scale=scale, **MODELS["llama 3"])
        assert moved.factor_values == pytest.approx(wanted.factor_values, rel=1e-12)
        assert radix_to_factors(moved.radix_values, moved.lead) == pytest.approx(moved.factor_values, rel=1e-12)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_a_file_of_4m_tokens(tmp_path: Path, rendering: Any) -> None:
    source = tiny.make(tmp_path / "m.gguf", n_ctx=N_CTX)
    done = extend(source, tmp_path / "new.gguf", scale=FULL, rendering=rendering)
    assert done.n_ctx == FAR
    field = GGUFReader(done.path).fields["llama.context_length"]
    assert (field.types[0].name, field.contents()) == ("UINT32", FAR)
    found = inspect(done.path)
    assert found.stored is not None
    assert found.table is not None
    assert (found.table.scale, found.table.n_ctx_orig) == (FULL, N_CTX)
    told = fit(done.path)
    assert told.setting.n_ctx == FAR
    assert told.kv == 2 * 2 * 2 * 2 * 16 * FAR  # layers, k and v, heads, bytes, head_dim
    assert revert(done.path, tmp_path / "back.gguf").size == source.stat().st_size
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


def test_lengths_at_the_limit_of_int32(tmp_path: Path) -> None:
    """llama.cpp counts positions in int32; what does not fit is refused with its numbers, nothing wraps."""
    source = tiny.make(tmp_path / "m.gguf", n_ctx=1 << 22)
    done = extend(source, tmp_path / "new.gguf", n_ctx=2**31 - 1)
    assert GGUFReader(done.path).fields["llama.context_length"].contents() == 2**31 - 1
    with pytest.raises(Refused, match="2147483648"):
        extend(source, tmp_path / "more.gguf", n_ctx=2**31)
    with pytest.raises(Refused, match="512"):
        extend(source, tmp_path / "more.gguf", scale=512)
    assert not (tmp_path / "more.gguf").exists()


def test_the_command_says_4m(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "m.gguf", n_ctx=N_CTX)
    command = [sys.executable, "-m", "mrrope_gguf"]
    subprocess.run([*command, "extend", source, "new.gguf", "--ctx", str(FAR)], check=True, cwd=tmp_path)
    shown = subprocess.run([*command, "inspect", "--json", "new.gguf"], check=True, cwd=tmp_path, capture_output=True)
    found = json.loads(shown.stdout)
    assert (found["context"], found["table"]["scale"]) == (
        {"original": N_CTX, "trained": FAR, "extended": FAR},
        FULL,
    )


# --- angles -----------------------------------------------------------------------------------------------------------


def angle_errors(table: RopeTable, freq_base: float, last: int) -> NDArray[np.float64]:
    """ggml's angle less the exact one, in radians within half a turn, (1024 positions up to last, n_rot/2)."""
    positions = np.arange(last - 1024, last)
    x = np.zeros((1024, 1, table.n_rot), np.float32)
    x[..., ::2] = 1.0
    found, exact = (
        out.astype(np.float64).reshape(1024, -1, 2)
        for out in (ggml_rope(x, positions.tolist(), freq_base, table.factor_values), rope(x, positions, table))
    )
    error = np.arctan2(found[..., 1], found[..., 0]) - np.arctan2(exact[..., 1], exact[..., 0])
    wrapped: NDArray[np.float64] = error - np.round(error / (2 * np.pi)) * 2 * np.pi
    return wrapped


@stock_only
@pytest.mark.engine
@pytest.mark.parametrize("last", [N_CTX, 1 << 17, 1 << 20, FAR])
@pytest.mark.parametrize("model", MODELS)
def test_angles_of_ggml_are_off_by_as_much_as_float32_costs(model: str, last: int) -> None:
    facts = MODELS[model]
    table = rope_table("mrrope-uni", scale=FULL, attn_factor=1.0, **facts)
    error = np.abs(angle_errors(table, facts["freq_base"], last)).max(axis=0)
    assert 5e-8 * last < error.max() < 1.8e-7 * last
    assert error.argmax() <= table.d_l  # in pairs that no method slows
    # a pair slowed by the whole scale turns so little that float32 is enough
    assert error[table.d_h :].max() < 1e-8 * last * (facts["n_ctx_orig"] / N_CTX) + 1e-6


# --- the engines ------------------------------------------------------------------------------------------------------


def logits_at(path: Path, firsts: list[int]) -> list[Floats]:
    """The same tokens in an empty context at each first position."""
    found = []
    for first in firsts:
        with session(path) as s:
            found.append(s.feed(TOKENS, first=first))
    return found


def elastic_at(path: Path, first: int) -> tuple[float, Any, Floats]:
    with session(path) as s:
        rows = s.feed(TOKENS, first=first)
        return get_elastic(s.ctx).scale, get_table(s.ctx), rows


def turned_again(path: Path, first: int, tables: list[tuple[list[float], float]]) -> float:
    """Relative RMS error of keys that were made under the first table and rotated to the last."""
    with session(path) as s:
        s.set(tables[0])
        s.feed(TOKENS, first=first)
        for factors, attn in tables[1:]:
            set_factors(s.ctx, factors, attn)
        turned = s.keys()[0].values
    with session(path) as s:
        s.set(tables[-1])
        s.feed(TOKENS, first=first)
        return rel_rms(turned, s.keys()[0].values)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "m.gguf", n_ctx=N_CTX, head_dim=32, n_embd=128)


@pytest.mark.engine
def test_what_that_costs_in_logits(stock: Worker, model: Path) -> None:
    """RoPE looks at distances alone, so the same tokens further on should give the same logits."""
    start, *further = stock.call(logits_at, model, [0, N_CTX - 64, 1 << 20, FAR - 64])
    near, million, far = (float(np.mean([kl(a, b) for a, b in zip(start, rows, strict=True)])) for rows in further)
    assert near < 1e-6 < million < 1e-3 < far < 0.1


@pytest.mark.engine
def test_the_patched_engine_is_stock_at_4m(engine: Worker, stock: Worker, model: Path, tmp_path: Path) -> None:
    path = extend(model, tmp_path / "p.gguf", scale=FULL, elastic=False).path
    firsts = [0, FAR - 64]
    for ours, theirs in zip(*(worker.call(logits_at, path, firsts) for worker in (engine, stock)), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.engine
def test_elastic_context_reaches_512_at_4m(engine: Worker, model: Path, tmp_path: Path) -> None:
    done = extend(model, tmp_path / "e.gguf", scale=FULL, rendering="engine")
    plain = engine.call(logits_at, model, [N_CTX - 64])[0]
    scale, table, rows = engine.call(elastic_at, done.path, N_CTX - 64)
    assert (scale, table) == (1.0, None)
    assert np.array_equal(rows, plain)
    scale, table, _ = engine.call(elastic_at, done.path, FAR - 64)
    assert scale == FULL
    np.testing.assert_allclose(table.factors, done.table.factor_values, rtol=2e-6)
    assert 1.0 < engine.call(elastic_at, done.path, 1 << 20)[0] < FULL


@pytest.mark.engine
@pytest.mark.parametrize(("first", "most"), [(N_CTX - 64, 1e-5), (FAR - 64, 1e-3)])
def test_keys_turned_again_so_far_out(engine: Worker, model: Path, first: int, most: float) -> None:
    """A rotation to another table costs what the angles of the difference are off by."""
    facts: dict[str, Any] = {"n_rot": 32, "freq_base": 1e4, "n_ctx_orig": N_CTX}
    tables = [rope_table("mrrope-uni", scale=scale, **facts) for scale in (256.0, 362.0, FULL)]
    error = engine.call(turned_again, model, first, [(list(t.factor_values), t.attn_factor) for t in tables])
    assert error < most
