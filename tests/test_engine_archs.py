"""The patched engine on every architecture that llama.cpp's test generator builds; docs/engine.md is the outcome."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mrrope_gguf.architectures import architecture, architectures
from mrrope_gguf.errors import Refused
from mrrope_gguf.facts import read_facts
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.reexpress import RULES
from tests import arch_models, tiny
from tests.arch_models import Line
from tests.engine_worker import Worker
from tests.test_reexpress import fused
from tools import engine_table
from tools.engine_table import FROM_ZERO, NOT_BUILT, NOT_SAVED, OK, Expected

pytestmark = pytest.mark.engine

BUILT = [name for name in architectures() if name not in NOT_BUILT]
ATTN_FACTOR = 1.1386  # the C++ test's own
Report = dict[str, list[Line]]


def expected(name: str) -> Expected:
    arch = architecture(name)
    assert arch is not None
    return engine_table.expected(arch)


@pytest.fixture(scope="session")
def report(patched: Path) -> Report:
    return arch_models.rope_report(patched)


@pytest.fixture(scope="module", params=[name for name in BUILT if name not in NOT_SAVED])
def models(
    request: pytest.FixtureRequest, patched: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Path]]:
    """The generator's files of one architecture, deleted after the last test that uses them."""
    folder = tmp_path_factory.mktemp("archs") / request.param
    files = arch_models.generate(patched, request.param, folder)
    assert files, "llama.cpp writes no file of it: name it in engine_table.NOT_SAVED"
    yield files
    arch_models.remove(folder)


def test_the_page_is_current() -> None:
    assert engine_table.PATH.read_text(encoding="utf-8") == engine_table.page(), "run python -m tools.engine_table"


def test_every_architecture_is_run_or_named_with_the_reason(report: Report) -> None:
    run = {name for name, lines in report.items() if any(line.kind == "rope-done" for line in lines)}
    skipped = {name for name, lines in report.items() if any(line.kind == "rope-skip" for line in lines)}
    assert run == set(BUILT)
    assert skipped == set(NOT_BUILT)


@pytest.mark.parametrize("name", BUILT)
def test_a_table_reaches_global_layers_alone_and_moves_cached_keys(name: str, report: Report) -> None:
    """The verdicts are the C++ test's own, read off its graphs and logits; the statuses are those of the page."""
    want = expected(name)
    lines = report[name]
    wrong = [line.fields for line in lines if line.fields.get("ok") == "0" or line.kind == "rope-fail"]
    assert not wrong
    for line in lines:
        if line.kind == "rope-arch":
            assert int(line["status"]) == want.status
            assert (line["differs"] == "1") == (want.status == OK)
            assert (line["nodes"] == "0") == (architectures()[name].rope == "none" or name == "baichuan")
        if line.kind == "rope-node" and want.status == OK:
            magnitude = float(line["attn_factor"]) ** 2 * float(line["kq_ratio"])
            assert line["table"] == ("0" if line["swa"] == "1" else "1")
            assert line["swa"] == "1" or magnitude == pytest.approx(ATTN_FACTOR**2, rel=1e-6)
        if line.kind == "rope-cache":
            assert int(line["status_cached"]) == want.cached
            assert ("keys" in want.proofs) <= (line["exact"] == "1")
            assert ("shift" in want.proofs) <= (line["can_shift"] == "1" and line["norm_after"] == "0")
    kinds = [line.kind for line in lines]
    assert ("rope-cache" in kinds) == (architectures()[name].cached and name != "t5")
    assert ("rope-node" in kinds) == any(line["nodes"] != "0" for line in lines if line.kind == "rope-arch")


def test_nothing_changes_without_a_table(models: list[Path], engine: Worker, stock: Worker, report: Report) -> None:
    for path in models:
        facts = read_facts(open_gguf(path))
        far = facts.arch.rope != "none" and facts.arch.name not in FROM_ZERO
        ours, theirs = (worker.call(arch_models.forward, str(path), far=far) for worker in (engine, stock))
        assert arch_models.same_as_stock(ours, theirs), path.name
        assert float(abs(ours).max()) > 0
        # what the header says of layers is what the graph does
        for line in report[facts.arch.name]:
            if line.kind == "rope-arch" and line["config"] == path.stem.rsplit("-", 1)[1]:
                rows = zip(facts.layers.attention, facts.layers.sliding, facts.layers.rope, strict=True)
                slides = tuple(i for i, row in enumerate(rows) if all(row))
                assert (line.layers("global"), line.layers("swa")) == (facts.layers.extended, slides)


def test_an_extended_file_is_the_table_it_holds(models: list[Path], engine: Worker, stock: Worker) -> None:
    """The engine file against llama_rope_table_set on the original, and against the portable file in stock."""
    for path in models:
        name = path.stem.rsplit("-", 1)[0]
        if "file" not in expected(name).proofs:
            with pytest.raises(Refused):
                arch_models.extended(path, "engine")
            continue
        far = name not in FROM_ZERO
        file = arch_models.extended(path, "engine")
        held = engine.call(arch_models.forward, file.path, far=far)
        given = engine.call(arch_models.forward, str(path), file.factors, file.attn_factor, far=far)
        assert arch_models.same_bits(held, given), path.name
        assert arch_models.difference(held, engine.call(arch_models.forward, str(path), far=far)) > 1e-7
        if "portable" in expected(name).proofs and name not in RULES:
            portable = arch_models.extended(path, "portable")
            assert arch_models.same_as_stock(held, stock.call(arch_models.forward, portable.path)), path.name
            assert arch_models.same_bits(held, engine.call(arch_models.forward, portable.path)), path.name


def test_an_elastic_file_is_the_original_within_its_window(models: list[Path], engine: Worker) -> None:
    """Past it the table grows; back inside, and in an emptied memory, it is the original again."""
    for path in models:
        name = path.stem.rsplit("-", 1)[0]
        if "file" not in expected(name).proofs:
            continue
        file = arch_models.extended(path, "engine", elastic=True)
        grown, original = (engine.call(arch_models.grow, which) for which in (file.path, str(path)))
        assert grown.on == (expected(name).cached == OK), path.name
        if not grown.on:
            assert set(grown.scales.values()) == {4.0}
            continue
        assert grown.scales.pop("far") > 2
        assert set(grown.scales.values()) == {1.0}
        assert set(grown.logits) == set(original.logits)
        trained = read_facts(open_gguf(path)).existing_scaling
        for step, logits in grown.logits.items():
            if step == "far":
                assert np.isfinite(logits).all()
                assert arch_models.difference(logits, original.logits[step]) > 1e-7
            elif trained and not trained.mergeable:
                # a LongRoPE of the model's own, which --force replaced
                assert np.isfinite(logits).all()
            elif step == "back":
                # the keys were rounded twice more
                assert arch_models.difference(logits, original.logits[step]) < 0.02
            else:
                assert arch_models.same_bits(logits, original.logits[step]), (path.name, step)


@pytest.mark.parametrize("name", RULES)
def test_a_reexpressed_file_in_stock_is_the_engine_file_here(
    name: str, tmp_path: Path, engine: Worker, stock: Worker
) -> None:
    """Plain models: the generator's own hold every optional tensor, which no other architecture would load."""
    n_head_kv = 4 if name == "baichuan" else 2
    if name == "qwen":  # its key counts the rows of ffn_gate and ffn_up together
        path = fused(tmp_path / "m.gguf", name, n_ctx=256, n_head_kv=4, n_ff=128, extra={"feed_forward_length": 256})
    else:
        path = tiny.make(tmp_path / "m.gguf", name, n_ctx=256, n_head_kv=n_head_kv)
    file, portable = (arch_models.extended(path, how) for how in ("engine", "portable"))
    assert portable.reexpressed
    held = engine.call(arch_models.forward, file.path)
    for worker in (stock, engine):
        assert arch_models.difference(worker.call(arch_models.forward, portable.path), held) < 1e-4
    assert arch_models.difference(engine.call(arch_models.forward, str(path)), held) > 1e-3
