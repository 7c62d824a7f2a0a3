"""What gives a context its table: the file's keys, llama.cpp's parameters, overrides; none is ever applied twice."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGUFWriter

from mrrope_gguf.engine import ActiveTable, capture, get_table
from mrrope_gguf.extend import extend
from mrrope_gguf.gguf.index import open_gguf
from tests import tiny
from tests.engine_models import model, table_keys
from tests.engine_session import Session, requantise, session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

# enum llama_rope_scaling_type of the patched llama.h
NONE, UNI, PRO = 0, 4, 5
METHODS = {UNI: "mrrope-uni", PRO: "mrrope-pro"}
TOKENS = tiny.tokens(150)


def logits(path: Path, n_ctx: int = 256, **params: Any) -> Floats:
    with session(path, n_ctx=n_ctx, **params) as s:
        return s.feed(TOKENS)


def facts(path: Path, n_ctx: int = 256, **params: Any) -> tuple[ActiveTable | None, int]:
    """The table of a context and what llama.cpp then says the model was trained for."""
    with session(path, n_ctx=n_ctx, **params) as s:
        return get_table(s.ctx), s.api.llama_model_n_ctx_train(s.model)


def engine_file(source: Path, **wishes: Any) -> Path:
    """`source` extended by metadata alone, with a static table, by mrrope-pro unless another method is wished for."""
    out = source.with_name("engine.gguf")
    wishes = {"method": "mrrope-pro", "rendering": "engine", "elastic": False, **wishes}
    return extend(source, out, force=True, **wishes).path


@pytest.mark.parametrize("kind", [UNI, PRO])
@pytest.mark.parametrize("name", ["llama", "qwen2", "stablelm", "gemma3", "gemma2", "smollm3", "rope_freqs"])
def test_the_parameter_is_the_extended_file(engine: Worker, tmp_path: Path, name: str, kind: int) -> None:
    path = model(tmp_path, name, n_ctx=64)
    wanted = engine.call(logits, engine_file(path, scale=4, method=METHODS[kind]))
    assert (engine.call(logits, path, rope_scaling_type=kind) == wanted).all()
    assert (engine.call(logits, path) != wanted).any()


@pytest.mark.parametrize("kind", [UNI, PRO])
def test_what_a_context_says(engine: Worker, tmp_path: Path, kind: int) -> None:
    path = model(tmp_path, "llama")
    table, n_ctx_train = engine.call(facts, path, rope_scaling_type=kind)
    assert table is not None
    assert (table.method, table.scale, n_ctx_train) == (METHODS[kind], 4.0, 256)
    from_file, n_ctx_train = engine.call(facts, engine_file(path, scale=4, method=METHODS[kind]))
    assert (from_file, n_ctx_train) == (table, 256)
    assert engine.call(facts, path) == (None, 64)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # parameters, the same for extend, what the model is written with
    "scale": ({"rope_freq_scale": 0.125}, {"scale": 8}, {}),
    "n_ctx": ({"n_ctx": 512}, {"scale": 8}, {}),
    "betas": ({"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}, {"scale": 4, "beta_fast": 16.0, "beta_slow": 2.0}, {}),
    "attn": ({"yarn_attn_factor": 1.25}, {"scale": 4, "attn_factor": 1.25 * (1 + 0.1 * np.log(4.0))}, {}),
    "orig": ({"yarn_orig_ctx": 32}, {"scale": 8}, {"n_ctx": 32}),
    "orig and scale": ({"yarn_orig_ctx": 32, "rope_freq_scale": 0.5}, {"scale": 2}, {"n_ctx": 32}),
}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_parameters_of_the_table(engine: Worker, tmp_path: Path, kind: str, name: str) -> None:
    params, wishes, written = SETTINGS[kind]
    plain = model(tmp_path, name)
    (tmp_path / "other").mkdir()
    wanted = engine.call(logits, engine_file(model(tmp_path / "other", name, **written), **wishes))
    found = engine.call(logits, plain, **{"rope_scaling_type": PRO, **params})
    assert (found == wanted).all()
    if kind != "n_ctx":
        assert (engine.call(logits, plain, rope_scaling_type=PRO) != found).any()


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_nothing_of_the_fallback_for_stock_is_left(engine: Worker, tmp_path: Path, name: str) -> None:
    # on sliding windows neither, which the table does not reach
    wanted = engine.call(logits, model(tmp_path, name, extra=table_keys({})))
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5}
    for extra in (scaling, {**scaling, "rope.scaling.type": "linear"}):
        path = model(tmp_path, name, extra={**table_keys({}), **extra})
        assert (engine.call(logits, path) == wanted).all()
    assert (engine.call(logits, model(tmp_path, name, extra=scaling)) != wanted).any()


def test_a_window_that_holds_the_context_needs_no_table(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=256)
    plain = engine.call(logits, path)
    assert (engine.call(logits, path, rope_scaling_type=PRO) == plain).all()
    assert engine.call(facts, path, rope_scaling_type=PRO)[1] == 256


@pytest.mark.parametrize("rendering", ["portable", "engine"])
@pytest.mark.parametrize("name", ["llama", "rope_freqs"])
def test_type_none_is_the_original_model(engine: Worker, tmp_path: Path, name: str, rendering: Any) -> None:
    path = model(tmp_path, name)
    extended = extend(
        path, tmp_path / "out.gguf", scale=4, elastic=False, rendering=rendering, force=name == "rope_freqs"
    ).path
    assert (engine.call(logits, extended) != engine.call(logits, path)).any()
    assert (engine.call(logits, extended, rope_scaling_type=NONE) == engine.call(logits, path)).all()


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_parameters_replace_the_table_of_a_file(engine: Worker, tmp_path: Path, rendering: Any) -> None:
    path = model(tmp_path, "llama")
    extended = extend(path, tmp_path / "out.gguf", scale=4, elastic=False, rendering=rendering).path
    wanted = engine.call(logits, engine_file(path, scale=8, method="mrrope-uni"), n_ctx=512)
    assert (engine.call(logits, extended, n_ctx=512, rope_scaling_type=UNI) == wanted).all()


@pytest.mark.parametrize("name", ["llama", "rope_freqs"])
@pytest.mark.parametrize("method", ["mrrope-pro", "mrrope-uni", "yarn", "ntk", "linear"])
def test_portable_and_engine_files_are_one(
    engine: Worker, stock: Worker, tmp_path: Path, name: str, method: str
) -> None:
    path = model(tmp_path, name, n_layer=2)
    portable = extend(
        path, tmp_path / "out.gguf", scale=4, elastic=False, method=method, rendering="portable", force=True
    ).path
    found = engine.call(logits, portable)
    assert (engine.call(logits, engine_file(path, scale=4, method=method)) == found).all()
    np.testing.assert_allclose(found, stock.call(logits, portable), atol=1e-4)
    assert (found != engine.call(logits, path)).any()


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_another_base(engine: Worker, tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    other, path = model(tmp_path / "other", name, freq_base=5e4), model(tmp_path, name)
    wanted = engine.call(logits, other, rope_scaling_type=PRO)
    assert (engine.call(logits, path, rope_scaling_type=PRO, rope_freq_base=5e4) == wanted).all()
    assert (engine.call(logits, path, rope_scaling_type=PRO) != wanted).any()


def two_contexts(path: Path) -> list[Floats]:
    """Logits of three contexts of one model, turn and turn about: a table, the file's own RoPE, another table."""
    with session(path, rope_scaling_type=PRO, n_ctx=256) as first:
        held = [first]
        for kind in (-1, UNI):
            params = first.api.llama_context_default_params()
            params.n_ctx, params.rope_scaling_type, params.type_k, params.type_v = 256, kind, 0, 0
            params.flash_attn_type, params.n_threads, params.n_threads_batch = 0, 1, 1
            held.append(Session(first.model, first.api.llama_init_from_model(first.model, params)))
        halves = [[s.feed(part) for s in held] for part in (TOKENS[:70], TOKENS[70:])]
        for s in held[1:]:
            s.api.llama_free(s.ctx)
    return [np.concatenate(parts) for parts in zip(*halves, strict=True)]


def test_contexts_of_one_model_have_tables_of_their_own(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_layer=2)
    found = engine.call(two_contexts, path)
    for kind, held in zip((PRO, -1, UNI), found, strict=True):
        np.testing.assert_allclose(held, engine.call(logits, path, rope_scaling_type=kind), atol=1e-4)
    assert all(np.abs(found[i] - found[(i + 1) % 3]).max() > 1e-2 for i in range(3))


def test_a_longrope_file(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    # a file whose own table is chosen by length stays stock's
    path = model(tmp_path, "llama", n_layer=2, extra={"rope.scaling.type": "longrope"},
                 tensors={"rope_factors_long.weight": np.linspace(1, 4, 8, dtype=np.float32),
                          "rope_factors_short.weight": np.ones(8, np.float32)})  # fmt: skip
    np.testing.assert_allclose(engine.call(logits, path), stock.call(logits, path), atol=1e-4)


def test_a_scaling_the_model_was_trained_with_stays(engine: Worker, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="yarn scaling that this model was trained with"):
        engine.call(logits, model(tmp_path, "yarn"), rope_scaling_type=PRO)


@pytest.mark.parametrize("kind", [1, 2])
def test_no_other_scaling_on_top_of_a_table(engine: Worker, tmp_path: Path, kind: int) -> None:
    with pytest.raises(RuntimeError, match="on top of the file's own mrrope-pro table"):
        engine.call(logits, engine_file(model(tmp_path, "llama"), scale=4), rope_scaling_type=kind)


def opened(path: Path, **options: Any) -> tuple[Floats, ActiveTable | None, str]:
    """Logits, table and log of a llama_cpp.Llama with some options of its own."""
    import llama_cpp

    with capture() as log:
        inherit = {"rope_scaling_type": -1, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0}
        settings: Any = {**inherit, "yarn_beta_slow": -1.0, "n_ctx": 256, "type_k": 0, "type_v": 0, "verbose": False}
        # its own log callback would hide what is read here
        llm = llama_cpp.Llama(str(path), **{**settings, "verbose": True, **options})
        s = Session(llm._model.model, llm._ctx.ctx)
        found = s.feed(TOKENS), get_table(llm), log.text
        llm.close()
    return found


def test_override_kv(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    extended, key = engine_file(path, scale=4), "llama.rope.scaling.mrrope.attn_factor"
    plain, _, _ = engine.call(opened, extended)
    found, table, _ = engine.call(opened, extended, kv_overrides={key: 1.25})
    assert table is not None
    assert table.attn_factor == 1.25
    assert (found != plain).any()
    assert (found == engine.call(opened, engine_file(path, scale=4, attn_factor=1.25))[0]).all()


def test_the_log_names_the_table(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    for file, options in ((engine_file(path, scale=4), {}), (path, {"rope_scaling_type": PRO})):
        lines = [line for line in engine.call(opened, file, **options)[2].splitlines() if "mrrope-pro" in line]
        assert any("4" in line and ("static" in line or "elastic" in line) for line in lines), lines
    assert "mrrope" not in engine.call(opened, path)[2]


def lora(folder: Path) -> Path:
    """A LoRA of rank 2 for the queries and keys of the first layer of the tiny llama."""
    writer = GGUFWriter(folder / "lora.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(3)
    for name, rows in (("attn_q", 64), ("attn_k", 32)):
        writer.add_tensor(f"blk.0.{name}.weight.lora_a", rng.standard_normal((2, 64)).astype(np.float32) / 8)
        writer.add_tensor(f"blk.0.{name}.weight.lora_b", rng.standard_normal((rows, 2)).astype(np.float32))
    return tiny.finish(writer, folder / "lora.gguf")


def test_a_lora(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    path, adapter = model(tmp_path, "llama", n_layer=2), str(lora(tmp_path))
    portable = extend(
        path, tmp_path / "out.gguf", scale=4, method="mrrope-pro", elastic=False, rendering="portable"
    ).path
    found = engine.call(with_lora, engine_file(path, scale=4), adapter)
    assert (found != engine.call(logits, portable)).any()
    np.testing.assert_allclose(found, stock.call(with_lora, portable, adapter), atol=1e-4)


def with_lora(path: Path, adapter: str) -> Floats:
    with session(path) as s:
        loaded = s.api.llama_adapter_lora_init(s.model, adapter.encode())
        assert loaded
        scale = ctypes.c_float(1.0)
        adapters = (s.api.llama_adapter_lora_p_ctypes * 1)(loaded)
        assert s.api.llama_set_adapters_lora(s.ctx, adapters, 1, ctypes.byref(scale)) == 0
        return s.feed(TOKENS)


def mrrope_keys(path: Path) -> dict[str, Any]:
    with open_gguf(path) as index:
        return {key: index.get(key) for key in index.kvs if ".rope." in key or key.endswith(".context_length")}


def saved(source: Path, target: Path) -> None:
    with session(source) as s:
        s.api.llama_model_save_to_file(s.model, str(target).encode())


def test_quantize_keeps_the_table(engine: Worker, tmp_path: Path) -> None:
    source = engine_file(model(tmp_path, "llama", n_layer=2), scale=4)
    engine.call(requantise, source, tmp_path / "q8_0.gguf", 7)
    assert mrrope_keys(tmp_path / "q8_0.gguf") == mrrope_keys(source)
    assert engine.call(facts, tmp_path / "q8_0.gguf") == engine.call(facts, source)


@pytest.mark.parametrize("name", ["llama", "rope_freqs"])
@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_the_saver_keeps_the_table(engine: Worker, tmp_path: Path, name: str, rendering: Any) -> None:
    source = extend(
        model(tmp_path, name), tmp_path / "in.gguf", scale=4, elastic=False, rendering=rendering, force=True
    ).path
    engine.call(saved, source, tmp_path / "out.gguf")
    assert engine.call(facts, tmp_path / "out.gguf") == engine.call(facts, source)
    assert (engine.call(logits, tmp_path / "out.gguf") == engine.call(logits, source)).all()


def test_load_runs_an_engine_file(engine: Worker, tmp_path: Path) -> None:
    table = engine.call(loaded, engine_file(model(tmp_path, "qwen2"), scale=4))
    assert table is not None
    assert (table.method, table.scale) == ("mrrope-pro", 4.0)


def loaded(path: Path) -> ActiveTable | None:
    from mrrope_gguf.model import load

    llm = load(path)
    table = get_table(llm)
    llm.close()
    return table
