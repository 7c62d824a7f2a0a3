"""load: the file's own RoPE settings hold, what would go wrong is refused, and prompts go in batch by batch."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mrrope_gguf import engine, extend, fit, load
from mrrope_gguf.errors import BadFile, DoesNotFit, EngineTrouble, FileTrouble, Refused
from mrrope_gguf.machine import MachineMemory
from mrrope_gguf.model import prefill
from tests import tiny

pytestmark = pytest.mark.engine

YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_beta_fast": 3.0,
    "rope.scaling.yarn_beta_slow": 0.25,
}
# what `mrrope extend --engine` leaves in a file for the patched engine, as far as load looks
ENGINE_ONLY = {"rope.scaling.mrrope.version": 1, "rope.scaling.mrrope.method": "mrrope-pro", **YARN}


def last_logits(llm: Any, tokens: list[int]) -> NDArray[np.float32]:
    """The logits after all tokens, (n_vocab,)."""
    llm.reset()
    prefill(llm, tokens)
    return logits(llm)


def logits(llm: Any) -> NDArray[np.float32]:
    """Those of the last token that was fed, (n_vocab,)."""
    return np.array(np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)))


def default_logits(path: Path, tokens: list[int], n_ctx: int) -> NDArray[np.float32]:
    """The same from a context with llama.cpp's own defaults, which take everything from the file."""
    api = engine.llama_cpp().llama_cpp
    with engine.capture():
        model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.flash_attn_type = n_ctx, 1
        context = api.llama_init_from_model(model, params)
        batch = (api.llama_token * len(tokens))(*tokens)
        assert api.llama_decode(context, api.llama_batch_get_one(batch, len(tokens))) == 0
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        found = np.array(np.ctypeslib.as_array(api.llama_get_logits(context), shape=(n_vocab,)))
        api.llama_free(context)
        api.llama_model_free(model)
    return found


def plain(path: Path, n_ctx: int) -> Any:
    """Llama as its users make it, without load."""
    with engine.capture():
        return engine.llama_cpp().Llama(str(path), n_ctx=n_ctx, verbose=False, flash_attn=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model") / "m.gguf", n_ctx=1024)


def test_the_whole_context_of_the_file(llama: Path) -> None:
    assert load(llama).n_ctx() == 1024
    assert load(llama, 0).n_ctx() == 1024
    assert load(str(llama), 512).n_ctx() == 512


@pytest.mark.parametrize(
    ("arch", "extra", "overridden"),
    [
        ("llama", {"rope.scaling.attn_factor": 1.3}, False),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, False),
        ("mistral3", {**YARN, "attention.temperature_scale": 0.0}, True),
    ],
    ids=["attn_factor", "linear", "the betas of mistral3"],
)
def test_the_settings_of_the_file_hold(tmp_path: Path, arch: str, extra: dict[str, Any], overridden: bool) -> None:
    path = tiny.make(tmp_path / "m.gguf", arch, n_ctx=256, extra=extra)
    without = tiny.make(tmp_path / "without.gguf", arch, n_ctx=256)
    tokens = tiny.tokens(200)
    wanted = default_logits(path, tokens, 256)
    np.testing.assert_allclose(last_logits(load(path), tokens), wanted, atol=1e-4)
    assert np.abs(last_logits(load(without), tokens) - wanted).max() > 0.1
    # Llama's own defaults override only what few architectures read: YaRN's betas
    change = np.abs(last_logits(plain(path, 256), tokens) - wanted).max()
    assert (change > 0.1) == overridden


def test_prefill_in_batches_equals_one_batch(llama: Path) -> None:
    tokens, seen = tiny.tokens(700), list[tuple[int, int]]()
    llm = load(llama, n_batch=256)
    prefill(llm, tokens[:100])
    prefill(llm, tokens[100:], lambda done, total: seen.append((done, total)))
    assert seen == [(256, 600), (512, 600), (600, 600)]
    assert llm.n_tokens == 700
    np.testing.assert_allclose(logits(llm), last_logits(load(llama, n_batch=1024, n_ubatch=1024), tokens), atol=2e-3)


def test_prefill_refuses_more_than_the_context_holds(llama: Path) -> None:
    llm = load(llama, 256)
    prefill(llm, tiny.tokens(200))
    with pytest.raises(Refused, match="100 tokens do not fit") as caught:
        prefill(llm, tiny.tokens(100))
    assert "256 tokens, 200 are taken and 56 are free" in caught.value.why
    assert llm.n_tokens == 200


def test_ctrl_c_between_batches_leaves_a_usable_model(llama: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done >= 512:
            raise KeyboardInterrupt

    llm, tokens = load(llama, n_batch=256), tiny.tokens(1000)
    with pytest.raises(KeyboardInterrupt):
        prefill(llm, tokens, stop)
    assert llm.n_tokens == 512
    prefill(llm, tokens[512:])
    np.testing.assert_allclose(logits(llm), last_logits(load(llama, n_batch=256), tokens), atol=2e-3)


def test_a_decode_that_fails_says_why(llama: Path) -> None:
    llm = load(llama, 256)
    with pytest.raises(EngineTrouble, match="stopped at token 0") as caught:
        prefill(llm, [10**6])
    assert "invalid token" in caught.value.why


def test_progress_of_llamas_own_methods(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    llm = load(llama, n_batch=256, progress=lambda done, total: seen.append((done, total)))
    llm(tiny.tokens(600), max_tokens=3)
    assert seen == [(256, 600), (512, 600), (600, 600)]


def test_a_model_is_freed_as_soon_as_it_is_dropped(llama: Path) -> None:
    gc.disable()
    try:
        llm = load(llama, progress=lambda done, total: None)
        gone = weakref.ref(llm)
        del llm
        assert gone() is None
    finally:
        gc.enable()


def test_quiet_unless_told_otherwise(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(llama)
    assert capfd.readouterr() == ("", "")
    load(llama, verbose=True)
    assert "llama_kv_cache" in capfd.readouterr().err


def test_cache_types_by_name(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", n_embd=128, n_ctx=256)
    llm = load(path, type_k="q8_0", type_v="q8_0")
    assert (llm.context_params.type_k, llm.context_params.type_v) == (8, 8)


def test_past_the_context_of_the_file(llama: Path) -> None:
    with pytest.raises(Refused, match="2048 tokens of context, and the file has 1024") as caught:
        load(llama, 2048)
    assert "--ctx 2048" in caught.value.fix
    assert load(llama, 2048, past_window=True).n_ctx() == 2048


def test_a_file_for_the_patched_engine(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "qwen2", n_ctx=256, extra=ENGINE_ONLY)
    with pytest.raises(EngineTrouble, match="needs the patched engine") as caught:
        load(path)
    assert "mrrope-pro" in caught.value.why
    assert "--portable" in caught.value.fix
    # the graceful fallback: YaRN of the same scale
    without = {key: value for key, value in ENGINE_ONLY.items() if "mrrope" not in key}
    same = tiny.make(tmp_path / "yarn.gguf", "qwen2", n_ctx=256, extra=without)
    tokens = tiny.tokens(200)
    np.testing.assert_array_equal(last_logits(load(path, allow_stock=True), tokens), last_logits(load(same), tokens))


def test_what_extend_makes_of_a_qwen2(tmp_path: Path) -> None:
    """Metadata for the patched engine, or a llama with factors that stock runs and that no LoRA fits."""
    source = tiny.make(tmp_path / "m.gguf", "qwen2", n_ctx=64)
    for_engine = extend(source, tmp_path / "engine.gguf", scale=4).path
    portable = extend(source, tmp_path / "portable.gguf", scale=4, rendering="portable").path
    with pytest.raises(EngineTrouble, match="needs the patched engine"):
        load(for_engine)
    assert load(for_engine, allow_stock=True).n_ctx() == 256
    llm = load(portable, elastic=False)
    assert (llm.n_ctx(), llm.metadata["general.architecture"]) == (256, "llama")
    with pytest.raises(Refused, match="LoRA"):
        load(portable, lora_path="adapter.gguf")


def test_factors_of_the_models_own_are_not_the_table(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", n_ctx=256, rope_freqs=[1.0] * 4 + [8.0] * 4, extra=ENGINE_ONLY)
    with pytest.raises(EngineTrouble, match="needs the patched engine"):
        load(path)


def test_a_portable_file_runs_on_stock(tmp_path: Path) -> None:
    extra = {"rope.scaling.mrrope.version": 1, "rope.scaling.mrrope.method": "mrrope-pro"}
    path = tiny.make(tmp_path / "m.gguf", n_ctx=256, rope_freqs=[1.0] * 4 + [4.0] * 4, extra=extra)
    assert load(path).n_ctx() == 256


def test_a_lora_for_another_order_of_rows(tmp_path: Path) -> None:
    extra = {"rope.scaling.mrrope.reexpressed_from": "qwen2"}
    path = tiny.make(tmp_path / "m.gguf", n_ctx=256, extra=extra)
    with pytest.raises(Refused, match="LoRA") as caught:
        load(path, lora_path="adapter.gguf")
    assert "re-expressed from 'qwen2' as 'llama'" in caught.value.why
    assert "another order" in caught.value.why
    load(path)


def test_a_lora_for_another_architecture_with_the_same_rows(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", extra={"rope.scaling.mrrope.reexpressed_from": "internlm2"})
    with pytest.raises(Refused, match="LoRA") as caught:
        load(path, lora_path="adapter.gguf")
    assert "another order" not in caught.value.why
    assert "another architecture" in caught.value.why


def test_a_scaling_type_that_would_end_the_process(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", extra={"rope.scaling.type": "mrrope"})
    with pytest.raises(Refused, match=r"rope\.scaling\.type is 'mrrope'"):
        load(path)


def test_a_model_that_does_not_fit(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MachineMemory(64 << 20, 3 << 20)
    monkeypatch.setattr("mrrope_gguf.model.machine_memory", lambda: memory)
    with pytest.raises(DoesNotFit, match="1024 tokens of context do not fit in memory") as caught:
        load(llama)
    assert "3.0 MiB of 64.0 MiB are free" in caught.value.why
    fitting = int(caught.value.fix.split("n_ctx=")[1].split()[0])
    assert 0 < fitting < 1024
    assert load(llama, fitting).n_ctx() == fitting
    assert load(llama, check_memory=False).n_ctx() == 1024


def test_logits_all_counts_as_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available = fit(llama).total + 1000
    monkeypatch.setattr("mrrope_gguf.model.machine_memory", lambda: MachineMemory(64 << 20, available))
    load(llama)
    with pytest.raises(DoesNotFit):
        load(llama, logits_all=True)


def test_nothing_fits(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrrope_gguf.model.machine_memory", lambda: MachineMemory(1 << 20, 1 << 10))
    with pytest.raises(DoesNotFit) as caught:
        load(llama)
    assert "smaller model" in caught.value.fix


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", drop=["blk.1.attn_q.weight"])
    with pytest.raises(EngineTrouble, match=r"llama\.cpp could not open it") as caught:
        load(path)
    assert "'blk.1.attn_q.weight' not found" in caught.value.why


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble):
        load(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(BadFile):
        load(tmp_path / "text.gguf")


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("no_engine")
def test_without_llama_cpp_python(llama: Path) -> None:
    with pytest.raises(EngineTrouble, match="not installed") as caught:
        load(llama)
    assert "pip install 'mrrope-gguf[engine]'" in caught.value.fix


def test_a_sliding_cache_is_no_larger_than_its_window(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "gemma3", n_ctx=2048)
    tokens = tiny.tokens(1500)
    windowed, full = load(path, n_batch=64, n_ubatch=64), load(path, swa_full=True, n_batch=64, n_ubatch=64)
    np.testing.assert_allclose(last_logits(windowed, tokens), last_logits(full, tokens), atol=2e-3)
    assert windowed.context_params.swa_full is False


def test_a_sliding_cache_is_never_wound_back_too_far(tmp_path: Path) -> None:
    """Two prompts share 600 tokens; the first one's other 900 pushed their end out of the sliding layers' cache."""
    path = tiny.make(tmp_path / "m.gguf", "gemma3", n_ctx=2048)
    first, second = tiny.tokens(1500), tiny.tokens(1500)[:600] + tiny.tokens(2, seed=1)
    llm, fresh = load(path, n_batch=64, n_ubatch=64), load(path, n_batch=64, n_ubatch=64)
    next(llm.generate(first))
    assert llm._ctx.kv_cache_seq_rm(-1, 600, -1) is False
    next(llm.generate(second))
    np.testing.assert_allclose(logits(llm), last_logits(fresh, second), atol=2e-3)


def test_a_sliding_cache_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", "gemma3", n_ctx=2048)
    seen: list[tuple[int, int]] = []
    llm = load(path, n_batch=64, n_ubatch=64, progress=lambda done, total: seen.append((done, total)))
    prompt = tiny.tokens(1000)
    next(llm.generate(prompt, temp=0.0))
    seen.clear()
    next(llm.generate(prompt + tiny.tokens(30, seed=2), temp=0.0))
    assert seen == [(30, 30)]
