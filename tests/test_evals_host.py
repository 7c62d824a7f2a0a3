"""One model, many ways: each is what its table set by hand or its file would be, and nothing made for it stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine import get_elastic, set_table
from mrrope_gguf.engine.rope_table import context_of
from mrrope_gguf.errors import EngineTrouble, Refused
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.host import PREFIX, Host
from mrrope_gguf.evals.ways import STATIC, parse
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load
from mrrope_gguf.tables import rope_table
from tests import tiny
from tests.engine_models import YARN, model
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

pytestmark = pytest.mark.engine

ORIG, N_CTX = 64, 256
TOKENS = tiny.tokens(200)
# chunks of 64 tokens: the window of the original is one of them
OPTIONS: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "flash_attn": False, "n_batch": 64, "n_ubatch": 64}
Seen = dict[str, Any]


def rows(llm: Any, tokens: Sequence[int] = TOKENS) -> Floats:
    """Logits of every token, float32 (n, n_vocab), on whatever memory the model has."""
    with Decoder(llm) as decoder:
        return np.concatenate([chunk.copy() for chunk in decoder.logits(tokens)])


def by_ways(path: Path, methods: str, scale: float = 4.0, length: int = N_CTX, **options: Any) -> Seen:
    """Each way's logits, how many models were loaded for them, and what lay beside the model meanwhile."""
    said: list[str] = []
    with Host(path, **{**OPTIONS, **options}, say=said.append) as host:
        found, loaded, last, left = {}, 0, None, set()
        for way in parse(methods, scale):
            llm = host.switch(way, length)
            assert llm.n_tokens == 0
            loaded += llm is not last
            last = llm
            found[way.name] = rows(llm)
            left |= {each.name for each in path.parent.glob(PREFIX + "*")}
    return {"rows": found, "loaded": loaded, "left": left, "said": said, "n_ctx_orig": host.n_ctx_orig}


def by_hand(path: Path, method: str, scale: float) -> Floats:
    """The same of a model whose table is set by hand."""
    table = rope_table(method, n_rot=16, freq_base=1e4, n_ctx_orig=ORIG, scale=scale)
    llm = load(path, past_window=True, n_threads_batch=1, **OPTIONS)
    set_table(llm, table)
    found = rows(llm)
    llm.close()
    return found


def same(a: Floats, b: Floats) -> bool:
    return a.tobytes() == b.tobytes()


# --- on the patched engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_static_ways_share_a_load(engine: Worker, tmp_path: Path, name: str) -> None:
    path = model(tmp_path, name, n_ctx=ORIG)
    seen = engine.call(by_ways, path, ",".join(["none", *STATIC, "truncate"]))
    assert (seen["loaded"], seen["left"], seen["said"]) == (1, set(), [])
    found = seen["rows"]
    for method in STATIC:
        assert same(found[method], engine.call(by_hand, path, method, 4.0)), method
    assert same(found["none"], found["truncate"])  # the table of the way before is gone
    assert len({found[name].tobytes() for name in ("none", *STATIC)}) == 1 + len(STATIC)


def test_elastic_is_the_model_in_its_window(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=ORIG)
    seen = engine.call(by_ways, path, "none,elastic,elastic:linear,mrrope-pro")
    found = seen["rows"]
    for name in ("elastic", "elastic:linear"):
        assert same(found[name][:ORIG], found["none"][:ORIG])
        assert not np.allclose(found[name][ORIG:], found["none"][ORIG:], atol=1e-2)
    assert not same(found["elastic"], found["elastic:linear"])
    assert same(found["mrrope-pro"], engine.call(by_hand, path, "mrrope-pro", 4.0))  # after an elastic one, too
    assert (seen["loaded"], seen["left"]) == (4, set())
    assert [each.name for each in tmp_path.iterdir()] == ["llama.gguf"]


def grown(path: Path) -> list[tuple[bool, float, str, float]]:
    """The state of an elastic way: when loaded, after a text past the window, and after another switch to it."""
    (way,) = parse("elastic:yarn", 4)
    with Host(path, **OPTIONS) as host:
        states = []
        for n in (0, 200, 10):
            llm = host.switch(way)
            if n:
                rows(llm, TOKENS[:n])
            state = get_elastic(llm)
            states.append((state.on, state.scale, state.method, state.full_scale))
        return states


def test_elastic_starts_again_at_each_switch(engine: Worker, tmp_path: Path) -> None:
    fresh, long, short = engine.call(grown, model(tmp_path, "llama", n_ctx=ORIG))
    assert fresh == short == (True, 1.0, "yarn", 4.0)
    assert long[1] > 2.0


def test_mode_b(engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=ORIG)
    for length, scale in ((40, 1.0), (ORIG, 1.0), (160, 2.5)):
        found = engine.call(by_ways, path, "none,yarn@B", length=length)["rows"]
        assert same(found["yarn@B"], engine.call(by_hand, path, "yarn", scale) if scale > 1 else found["none"])


def test_an_extended_file_is_measured_from_its_original(engine: Worker, tmp_path: Path) -> None:
    path, methods = model(tmp_path, "llama", n_ctx=ORIG), "none,elastic,yarn"
    wanted = engine.call(by_ways, path, methods)
    for rendering in ("engine", "portable"):
        done = extend(path, tmp_path / f"{rendering}.gguf", scale=2, method="ntk", rendering=rendering)
        seen = engine.call(by_ways, done.path, methods)
        assert seen["n_ctx_orig"] == ORIG
        assert "measured from its original (64 tokens)" in seen["said"][0]
        assert seen["left"] == set()
        assert [name for name in wanted["rows"] if not same(seen["rows"][name], wanted["rows"][name])] == []


@pytest.mark.parametrize("name", ["maincoder", "hunyuan-dense"])
def test_models_whose_keys_stay(engine: Worker, tmp_path: Path, name: str) -> None:
    path = model(tmp_path, name, n_ctx=ORIG)
    found = engine.call(by_ways, path, "yarn,none,ntk,yarn@B")["rows"]  # tables change between texts
    assert len({each.tobytes() for each in found.values()}) == 3
    assert same(found["yarn"], found["yarn@B"])
    with pytest.raises(Refused, match="elastic: this model has no elastic context"):
        engine.call(by_ways, path, "elastic")


# --- on a stock library ------------------------------------------------------------------------------------------


def test_stock_runs_files(tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=ORIG)
    seen = by_ways(path, "none,yarn,mrrope-pro,truncate")
    assert (seen["loaded"], seen["left"]) == (4, set())
    assert [each.name for each in tmp_path.iterdir()] == ["llama.gguf"]
    found = seen["rows"]
    assert same(found["none"], found["truncate"])
    for method in ("yarn", "mrrope-pro"):
        done = extend(path, tmp_path / f"{method}.gguf", scale=4, method=method, rendering="portable")
        llm = load(done.path, elastic=False, n_threads_batch=1, **OPTIONS)
        assert same(found[method], rows(llm))
        llm.close()
    assert not np.allclose(found["yarn"], found["mrrope-pro"], atol=1e-2)


def test_split_models(engine: Worker, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "split").mkdir()
    path, split = (
        model(tmp_path / "whole", "llama", n_ctx=ORIG),
        model(tmp_path / "split", "llama", n_ctx=ORIG, split=3),
    )
    there = sorted(each.name for each in split.parent.iterdir())
    wanted = engine.call(by_ways, path, "none,elastic")["rows"]
    for found, ways in ((engine.call(by_ways, split, "none,elastic"), wanted), (by_ways(split, "none,yarn"), ["none"])):
        for way in ways:
            assert same(found["rows"][way], wanted[way])
        assert found["left"] == set()
    assert sorted(each.name for each in split.parent.iterdir()) == there
    assert len(there) == 3


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_stock_measures_an_extended_file_from_its_original(tmp_path: Path, name: str) -> None:
    path = model(tmp_path, name, n_ctx=ORIG)
    done = extend(path, tmp_path / "long.gguf", scale=2, method="linear", rendering="portable")
    wanted, seen = by_ways(path, "none,yarn"), by_ways(done.path, "none,yarn")
    for way in ("none", "yarn"):
        assert same(seen["rows"][way], wanted["rows"][way])
    assert len(seen["said"]) == 1


def test_one_context_at_a_time(tmp_path: Path) -> None:
    with Host(model(tmp_path, "llama", n_ctx=ORIG), **OPTIONS) as host:
        first = host.switch(parse("none")[0])
        assert host.switch(parse("truncate")[0]) is first
        second = host.switch(parse("yarn", 4)[0])
        assert context_of(second)
        with pytest.raises(EngineTrouble, match="closed"):
            context_of(first)
    with pytest.raises(EngineTrouble, match="closed"):
        context_of(second)


@pytest.mark.parametrize("name", ["llama", "rope_freqs", "linear", "qwen2"])
def test_stock_and_patched_agree(engine: Worker, tmp_path: Path, name: str) -> None:
    path, methods = model(tmp_path, name, n_ctx=ORIG), "none,linear,mrrope-uni,ntk@B"
    stock, patched = by_ways(path, methods)["rows"], engine.call(by_ways, path, methods)["rows"]
    for way in stock:
        np.testing.assert_allclose(stock[way], patched[way], atol=2e-3, err_msg=way)
    assert not np.allclose(stock["none"], stock["linear"], atol=1e-2)


def test_stock_refuses_elastic_ways_at_once(tmp_path: Path) -> None:
    with Host(model(tmp_path, "llama", n_ctx=ORIG), **OPTIONS) as host:
        with pytest.raises(EngineTrouble) as caught:
            host.check(parse("none,elastic,yarn,elastic:yarn", 4))
        assert caught.value.what == "elastic, elastic:yarn: needs the patched engine"
        assert caught.value.fix
        assert same(rows(host.switch(parse("none")[0])), rows(host.switch(parse("truncate")[0])))


def test_stock_refuses_what_a_file_cannot_carry(tmp_path: Path) -> None:
    for name in ("gemma2", "smollm3"):
        with Host(model(tmp_path, name, n_ctx=ORIG), **OPTIONS) as host:
            host.check(parse("none,truncate"))
            with pytest.raises(EngineTrouble, match="yarn cannot be measured on a stock library"):
                host.check(parse("none,yarn", 4))


# --- bad input ---------------------------------------------------------------------------------------------------


def test_models_that_have_nothing_to_stretch(tmp_path: Path) -> None:
    with Host(model(tmp_path, "gpt2"), **OPTIONS) as host, pytest.raises(Refused, match="has no RoPE"):
        host.check(parse("yarn", 4))
    trained = tiny.make(tmp_path / "y.gguf", "llama", n_layer=1, n_ctx=N_CTX, extra=YARN)
    for force, n_ctx_orig in ((False, N_CTX), (True, ORIG)):
        with Host(trained, **OPTIONS, force=force) as host:
            assert host.n_ctx_orig == n_ctx_orig
            host.check(parse("none,yarn" if force else "none", 4))
            if not force:
                with pytest.raises(Refused, match="already scales its RoPE"):
                    host.check(parse("yarn", 4))


def test_an_extended_file_without_its_undo_record(tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=ORIG, extra={"rope.scaling.mrrope.version": 1})
    with pytest.raises(Refused, match="undo record is gone"):
        Host(path, **OPTIONS)


def test_nothing_stays_where_a_load_fails_or_is_stopped(tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=ORIG)
    (way,) = parse("yarn", 4)
    with Host(path, **OPTIONS, type_v="q4_0") as host:
        with pytest.raises(Refused, match="q4_0 cache"):  # its heads are too narrow
            host.switch(way)
        assert [each.name for each in tmp_path.iterdir()] == ["llama.gguf"]
        with pytest.raises(KeyboardInterrupt):
            interrupted(host)
    assert [each.name for each in tmp_path.iterdir()] == ["llama.gguf"]


def interrupted(host: Host) -> None:
    """Ctrl-C while a file is being made."""
    with host._private() as folder:
        (folder / "half").write_bytes(b"GGUF")
        assert folder.parent == host.path.parent
        assert folder.stat().st_mode & 0o077 == 0
        raise KeyboardInterrupt


def test_settings_reach_the_context(tmp_path: Path) -> None:
    path, elsewhere = tiny.make(tmp_path / "m.gguf", "llama", n_layer=1, n_ctx=ORIG, head_dim=32), tmp_path / "made"
    elsewhere.mkdir()
    options = {**OPTIONS, "flash_attn": True, "type_k": "q8_0", "type_v": "q8_0", "folder": elsewhere}
    with Host(path, **options) as host:
        llm = host.switch(parse("mrrope-pro", 4)[0])
        context = llm.context_params
        assert (context.type_k, context.type_v, context.flash_attn_type) == (8, 8, 1)
        assert (llm.n_ctx(), context.n_threads, context.n_threads_batch) == (N_CTX, 1, 1)
        assert host.settings == {"flash_attn": True, "n_threads": 1, "type_k": "q8_0", "type_v": "q8_0"}
    assert list(elsewhere.iterdir()) == []
