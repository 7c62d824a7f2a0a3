"""Logits of llama.cpp against those of Hugging Face transformers under the same inverse frequencies.

The factors given to transformers are computed from the configuration (spec.py). llama.cpp gets them in three ways: as
metadata of an extended file, as an array through llama_rope_table_set, and, on the stock library, as a tensor.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine import get_table, set_factors, set_table
from mrrope_gguf.extend import extend
from tests import patched as process
from tests import stock
from tests.reference import spec
from tests.reference.conftest import Comparison, Reference, relative

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

pytestmark = [pytest.mark.engine, pytest.mark.slow]

N_CTX = 1024
SPLIT = 128  # tokens cached under one table before another is set
Table = tuple[list[float], float] | None
every_model = pytest.mark.parametrize("name", spec.MODELS)


def with_table(path: Path, table: Table, runs: dict[str, spec.Run]) -> dict[str, Floats]:
    """In another process: logits (n_tokens, n_vocab) of each run, each in a context of its own."""
    found = {}
    for name, run in runs.items():
        with stock.context(path, N_CTX) as (_model, ctx):
            if table:
                set_factors(pointer(ctx), *table)
            found[name] = stock.decode(ctx, run.tokens, run.first)
    return found


def changed_on_the_way(path: Path, before: Table, after: Table, run: spec.Run) -> tuple[Floats, Floats]:
    """In another process: logits of the first SPLIT tokens under one table, of the others under another."""
    with stock.context(path, N_CTX) as (_model, ctx):
        use(ctx, before)
        first = stock.decode(ctx, run.tokens[:SPLIT], run.first)
        use(ctx, after)
        return first, stock.decode(ctx, run.tokens[SPLIT:], run.first + SPLIT)


def active(path: Path) -> tuple[str, float, list[float], float]:
    """In another process: method, scale, factors and attn_factor of a file's table as the engine reads it."""
    with stock.context(path, N_CTX) as (_model, ctx):
        table = get_table(pointer(ctx))
        assert table
        return table.method, table.scale, list(table.factors), table.attn_factor


def use(ctx: Any, table: Table) -> None:
    if table:
        set_factors(pointer(ctx), *table)
    else:
        set_table(pointer(ctx), None)


def pointer(ctx: Any) -> int:
    return ctypes.cast(ctx, ctypes.c_void_p).value or 0


@every_model
def test_as_it_is(name: str, reference: Reference, patched: Path, compare: Comparison) -> None:
    got = process.run(with_table, reference.gguf(name), None, spec.RUNS, lib=patched)
    for run in spec.RUNS:
        compare(name, "no table", got[run], reference.logits[f"{name}/none/{run}"])


@every_model
@pytest.mark.parametrize("table", ["mrrope-pro", "any"])
def test_table_set(name: str, table: str, reference: Reference, patched: Path, compare: Comparison) -> None:
    given = spec.tables(spec.MODELS[name])[table]
    got = process.run(with_table, reference.gguf(name), given, spec.RUNS, lib=patched)
    for run in spec.RUNS:
        want = reference.logits[f"{name}/{table}/{run}"]
        assert relative(want, reference.logits[f"{name}/none/{run}"]) > 0.05, "the table changes too little to tell"
        compare(name, f"set: {table}", got[run], want)


@every_model
def test_table_of_the_file(name: str, reference: Reference, patched: Path, compare: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "extended.gguf"
    extend(reference.gguf(name), path, scale=spec.SCALE, rendering="engine", elastic=False)
    got = process.run(with_table, path, None, spec.RUNS, lib=patched)
    for run in spec.RUNS:
        compare(name, "metadata: mrrope-pro", got[run], reference.logits[f"{name}/mrrope-pro/{run}"])
    method, scale, factors, attn_factor = process.run(active, path, lib=patched)
    table = spec.extended_table(spec.MODELS[name])
    assert (method, scale) == ("mrrope-pro", spec.SCALE)
    assert factors == pytest.approx([float(f) for f in table.factors], rel=1e-5)
    assert attn_factor == pytest.approx(table.attn_factor)


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize("engine", ["stock", "patched"])
def test_tensor_of_the_file(
    name: str, engine: str, reference: Reference, patched: Path, compare: Comparison, tmp_path: Path
) -> None:
    """The portable rendering, which stock llama.cpp runs too."""
    path = tmp_path / "extended.gguf"
    extend(reference.gguf(name), path, scale=spec.SCALE, rendering="portable", elastic=False)
    got = process.run(with_table, path, None, spec.RUNS, lib=patched if engine == "patched" else None)
    for run in spec.RUNS:
        compare(name, "tensor: mrrope-pro", got[run], reference.logits[f"{name}/mrrope-pro/{run}"])


@every_model
@pytest.mark.parametrize(("before", "after"), [("any", "mrrope-pro"), ("none", "mrrope-pro"), ("mrrope-pro", "none")])
def test_cached_keys_rotated_again(
    name: str, before: str, after: str, reference: Reference, patched: Path, compare: Comparison
) -> None:
    """One layer: its keys depend on the tokens alone, so tokens after the change see what a fresh run would have."""
    tables, one = spec.tables(spec.MODELS[name]), f"{name}-one"
    for run_name, run in spec.RUNS.items():
        first, rest = process.run(
            changed_on_the_way, reference.gguf(one), tables[before], tables[after], run, lib=patched
        )
        compare(name, "re-rotated", first, reference.logits[f"{one}/{before}/{run_name}"][:SPLIT])
        want = reference.logits[f"{one}/{after}/{run_name}"][SPLIT:]
        compare(name, "re-rotated", rest, want)
