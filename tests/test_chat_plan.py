"""What is decided before a model is loaded: flags and variables, context and table, memory and what would fit."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.chat import memory, target
from mrrope_gguf.chat.memory import RESERVE, Room, does_not_fit, ways
from mrrope_gguf.chat.options import Options, from_args
from mrrope_gguf.chat.plan import TALK, NeedsExtending, Plan, plan
from mrrope_gguf.chat.target import Remembered, Target
from mrrope_gguf.cli import _parser, main
from mrrope_gguf.engine.devices import Gpu
from mrrope_gguf.errors import Refused
from mrrope_gguf.extend import extend
from mrrope_gguf.fit import read_model
from mrrope_gguf.machine import MachineMemory
from tests import tiny


def parse(*words: str) -> argparse.Namespace:
    return _parser().parse_args(["chat", *words])


def test_flags_are_llamas() -> None:
    words = "m.gguf -c 32k -f a b -f c -p hi -sys be -ctk q8_0 -ctv q4_0 -fa off -b 64 -ub 32 -ngl all -t 2 -tb 3"
    sampling = "--temp 0 --top-k 1 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.1 -n -1 -s 7 -r end"
    found = from_args(parse(*f"{words} {sampling} --session s --scale 4 --method mrrope-pro".split()), {})
    assert found == Options(
        model="m.gguf", n_ctx=32768, files=("a", "b", "c"), prompt="hi", system="be", session="s", type_k="q8_0",
        type_v="q4_0", flash_attn=False, n_batch=64, n_ubatch=32, gpu_layers=10**6, threads=2, threads_batch=3,
        scale=4.0, method="mrrope-pro",
        sampling={"temp": 0, "top_k": 1, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "n_predict": -1,
                  "seed": 7, "reverse_prompt": ["end"]},
    )  # fmt: skip
    assert from_args(parse("-m", "m.gguf"), {}) == Options(model="m.gguf")
    assert from_args(parse("-hf", "user/model:Q8_0"), {}).hf == "user/model:Q8_0"
    assert from_args(parse("--hf-repo", "user/model", "--n-gpu-layers", "3"), {}).gpu_layers == 3


def test_variables_fill_what_is_left_open() -> None:
    env = {
        "LLAMA_ARG_MODEL": "env.gguf", "LLAMA_ARG_CTX_SIZE": "4096", "LLAMA_ARG_CACHE_TYPE_K": "q8_0",
        "LLAMA_ARG_THREADS": "3", "LLAMA_ARG_N_GPU_LAYERS": "5", "LLAMA_ARG_N_PREDICT": "9",
        "LLAMA_ARG_FLASH_ATTN": "off",
    }  # fmt: skip
    found = from_args(parse(), env)
    assert (found.model, found.n_ctx, found.type_k, found.threads) == ("env.gguf", 4096, "q8_0", 3)
    assert (found.gpu_layers, found.sampling, found.flash_attn) == (5, {"n_predict": 9}, False)
    found = from_args(parse("m.gguf", "-c", "512", "-n", "2", "-ngl", "0", "-fa", "on"), env)
    assert (found.model, found.n_ctx, found.sampling, found.gpu_layers) == ("m.gguf", 512, {"n_predict": 2}, 0)
    assert found.flash_attn
    assert from_args(parse("-hf", "a/b"), env).model is None
    for name, value in (("CTX_SIZE", "many"), ("CACHE_TYPE_V", "q3"), ("BATCH", "0"), ("FLASH_ATTN", "maybe")):
        with pytest.raises(Refused, match=f"LLAMA_ARG_{name}={value}"):
            from_args(parse("m.gguf"), {f"LLAMA_ARG_{name}": value})


@pytest.mark.parametrize("words", [["a.gguf", "-m", "b.gguf"], ["a.gguf", "-hf", "b/c"], ["-m", "a", "-hf", "b/c"]])
def test_one_model_only(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["chat", *words, "-p", "hi"])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code in (1, 2)
    assert "named twice" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-t", "0"], ["-ngl", "-2"], ["-ctk", "q9"], ["--method", "yarn"], ["-c", "x"]])
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("m.gguf", *words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return target.read(tiny.make(tmp_path_factory.mktemp("plan") / "plain.gguf", n_ctx=8192))


@pytest.fixture(scope="module")
def extended(plain: Target) -> Target:
    return target.read(extend(plain.path, plain.path.with_name("long.gguf"), scale=4).path)


def decide(
    there: Target, need: int = 300, before: Remembered | None = None, *, patched: bool = True, **given: Any
) -> Plan:
    return plan(there, Options(**given), need, before, patched=patched)


def test_what_a_file_says(plain: Target, extended: Target) -> None:
    assert (plain.n_ctx, plain.method) == (8192, None)
    assert (extended.n_ctx, extended.n_ctx_orig, extended.method, extended.elastic) == (32768, 8192, "mrrope-uni", True)
    assert str(plain) == "plain.gguf: llama, 8192 tokens of context"
    assert str(extended) == "long.gguf: llama, 8192 tokens extended to 32768 (elastic mrrope-uni)"


def test_context_of_a_plain_file(plain: Target) -> None:
    assert decide(plain) == Plan(8192)
    assert decide(plain, n_ctx=4096) == Plan(4096)
    # a document that is too long for the model: the patched engine takes it as far as need be, by doubling
    assert decide(plain, 9000) == Plan(16384, "mrrope-uni", 2.0)
    assert decide(plain, 15800) == Plan(32768, "mrrope-uni", 4.0)
    assert decide(plain, 9000, n_ctx=12288, method="mrrope-pro") == Plan(12288, "mrrope-pro", 1.5)
    assert decide(plain, scale=4.0) == Plan(32768, "mrrope-uni", 4.0)
    assert decide(plain, scale=4.0, n_ctx=10000) == Plan(10000, "mrrope-uni", 4.0)
    with pytest.raises(Refused, match="does not fit in the context") as caught:
        decide(plain, 9000, n_ctx=8192)
    assert "9000" in caught.value.why
    assert f"-c {-(-(9000 + TALK) // 256) * 256}" in caught.value.fix
    with pytest.raises(Refused, match="--scale 2 does not make 20000"):
        decide(plain, scale=2.0, n_ctx=20000)
    with pytest.raises(Refused, match=r"--scale 0\.5"):
        decide(plain, need=100, scale=0.5)


def test_stock_needs_an_extended_file(plain: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrrope_gguf.engine.why_stock", lambda: ("none is built", "`mrrope build` once"))
    assert decide(plain, patched=False) == Plan(8192)
    for need, given in ((20000, {}), (300, {"n_ctx": 32768}), (300, {"scale": 4.0})):
        with pytest.raises(NeedsExtending) as caught:
            decide(plain, need, patched=False, **given)
        assert caught.value.n_ctx == 32768
        assert f"mrrope extend {plain.path} --ctx 32768 --method mrrope-uni" in caught.value.fix
        assert "`mrrope build` once" in caught.value.fix


def test_context_of_an_extended_file(extended: Target) -> None:
    for patched in (True, False):
        assert decide(extended, patched=patched) == Plan(32768)
        assert decide(extended, n_ctx=9000, patched=patched) == Plan(9000)
    with pytest.raises(Refused, match="does not fit") as caught:
        decide(extended, 20000, n_ctx=9000)
    assert "-c 21248, or without -c" in caught.value.fix
    with pytest.raises(Refused, match="does not fit") as caught:
        decide(extended, 40000)
    assert f"mrrope extend {extended.path} --ctx 65536" in caught.value.fix
    with pytest.raises(Refused, match="65536 tokens of context, and the file has 32768"):
        decide(extended, n_ctx=65536)
    for given in ({"scale": 2.0}, {"method": "mrrope-pro"}):
        with pytest.raises(Refused, match="for files that were not extended"):
            decide(extended, **given)


def test_a_session_keeps_its_context(plain: Target, extended: Target) -> None:
    before = Remembered("x", 16384, 9000, "mrrope-pro", 2.0)
    assert decide(plain, 9300, before) == Plan(16384, "mrrope-pro", 2.0)
    assert decide(plain, 9300, before, n_ctx=32768) == Plan(32768, "mrrope-pro", 4.0)
    assert decide(extended, 9300, before) == Plan(16384)
    assert decide(extended, 20000, before) == Plan(32768)
    assert decide(plain, 300, Remembered("x", 4096, 20, None, 1.0)) == Plan(8192)


def test_a_model_without_rope_is_refused(tmp_path: Path) -> None:
    there = target.read(tiny.make(tmp_path / "g.gguf", "gpt2", n_ctx=64))
    with pytest.raises(Refused, match="no RoPE"):
        decide(there, 40, n_ctx=256)


MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("mem") / "m.gguf"
    return read_model(tiny.make(path, n_ctx=65536, n_embd=256, n_head=4, n_head_kv=4, n_layer=4))


def room(free: int, *gpus: Gpu) -> Room:
    return Room(MachineMemory(1 << 40, free), gpus, 4)


def test_what_would_fit_fits(model: Any) -> None:
    options = Options()
    needed = room(0).estimate(options, model, 65536, 0)
    assert needed.total == needed.host
    assert needed.device == 0
    assert room(needed.host + RESERVE).fits(needed)
    assert not room(needed.host + RESERVE - 1).fits(needed)
    assert Room(None, (), 4).fits(needed)
    short = room(needed.host + RESERVE - 20 * MIB)
    found = ways(short, options, model, 65536, 1000)
    assert [way.flags.split()[0] for way in found] == ["-ctk", "-c"]
    for way in found:
        changed = replace(options, **way.changes)
        n_ctx = changed.n_ctx or 65536
        assert n_ctx >= 1000
        assert short.fits(short.estimate(changed, model, n_ctx, 0))
    n_ctx = found[1].changes["n_ctx"]
    assert not short.fits(short.estimate(options, model, n_ctx + 256, 0))
    error = does_not_fit("m.gguf", 65536, needed, short, found)
    assert error.fix == f"-ctk q8_0 -ctv q8_0, or -c {n_ctx}"
    assert "weights" in error.why
    # what must be read bounds the context from below
    assert [way.flags for way in ways(short, options, model, 65536, n_ctx + 1)] == ["-ctk q8_0 -ctv q8_0"]
    tight = room(RESERVE + model.weights + 40 * MIB)
    assert [len(way.changes) for way in ways(tight, options, model, 65536, 1000)] == [1, 3]
    assert ways(room(RESERVE), options, model, 65536, 1000) == []
    assert "shorter document" in does_not_fit("m", 65536, needed, room(RESERVE), []).fix


def test_flash_attention_comes_with_a_quantised_cache(model: Any) -> None:
    options = Options(flash_attn=False)
    needed = room(0).estimate(options, model, 65536, 0)
    found = ways(room(needed.host + RESERVE - MIB), options, model, 65536, 1000)
    assert "-ctk q8_0 -ctv q8_0 -fa on" in [way.flags for way in found]


def test_layers_on_a_gpu(model: Any) -> None:
    options = Options()
    whole = room(0).estimate(options, model, 65536, 0)
    large = room(1 << 40, Gpu("GPU0", 1 << 40, 1 << 40))
    assert large.layers_on_gpu(options, model, 65536) == 5
    assert room(1 << 40).layers_on_gpu(Options(gpu_layers=3), model, 65536) == 0
    there = large.estimate(options, model, 65536, 5)
    assert there.host < whole.host
    assert there.device >= whole.kv + model.weights
    half = room(1 << 40, Gpu("GPU0", there.device // 2 + there.compute // 2, 1 << 40))
    n = half.layers_on_gpu(options, model, 65536)
    assert 0 < n < 5
    asked = Options(gpu_layers=5)
    assert not half.fits(half.estimate(asked, model, 65536, 5))
    first = ways(half, asked, model, 65536, 1000)[0]
    assert first.flags == f"-ngl {n}"
    assert "GPU0" in does_not_fit("m", 65536, half.estimate(asked, model, 65536, 5), half, [first]).why


def test_address_space_counts_what_is_never_touched(model: Any) -> None:
    free = room(0).estimate(Options(), model, 65536, 0).host + RESERVE
    found = room(free).estimate(Options(), model, 65536, 0)
    assert room(free).fits(found)
    assert not Room(MachineMemory(1 << 40, free, mapped=True), (), 4).fits(found)
    assert memory.setting(Options(n_batch=64, type_k="q8_0"), 512).n_batch == 64
