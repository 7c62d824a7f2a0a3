"""fit: its caches are llama.cpp's to the byte, its compute buffer is close, and the largest context is the largest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrrope_gguf import engine
from mrrope_gguf import fit as fit_file
from mrrope_gguf.errors import BadFile, FileTrouble, Refused
from mrrope_gguf.fit import Fit, read_model, size
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.gguf.types import ggml_type
from mrrope_gguf.kvcache import Cache, Setting, memory
from mrrope_gguf.machine import MachineMemory
from tests import stock_hparams, tiny

GOLDEN = json.loads((Path(__file__).parent / "golden" / "kv_caches.json").read_text())
# the package's attribute of this name is the function
FIT = sys.modules["mrrope_gguf.fit"]
MIB = 1 << 20
KV_LINE = re.compile(
    r"llama_kv_cache: size = .*?\( *(\d+) cells, +(\d+) layers, .*?K \(\w+\): +([\d.]+) MiB, V \(\w+\): +([\d.]+)"
)


def lines(caches: list[Cache] | tuple[Cache, ...]) -> list[tuple[int, int, str, str]]:
    """The caches as llama.cpp logs them, which is with two decimals."""
    states = ("recurrent", "compressor")
    return [(c.cells, c.n_layer, f"{c.k / MIB:.2f}", f"{c.v / MIB:.2f}") for c in caches if c.name not in states]


def logged(path: Path, setting: Setting, *, allocate: bool = True) -> tuple[list[tuple[int, int, str, str]], float]:
    """Open a context in stock llama.cpp: its cache lines, and the MiB of its compute buffer, from the log."""
    api = engine.llama_cpp().llama_cpp
    params, wanted = api.llama_model_default_params(), api.llama_context_default_params()
    params.no_alloc = not allocate
    if not allocate:
        params.load_mode = api.LLAMA_LOAD_MODE_NONE
    wanted.type_k, wanted.type_v = ggml_type(setting.type_k).id, ggml_type(setting.type_v).id
    wanted.flash_attn_type = int(setting.flash_attn)
    for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "swa_full", "kv_unified"):
        setattr(wanted, name, getattr(setting, name))
    with engine.capture() as log:
        model = api.llama_model_load_from_file(str(path).encode(), params)
        context = api.llama_init_from_model(model, wanted)
        assert context, log.why()
        text = log.text
        api.llama_free(context)
        api.llama_model_free(model)
    found = [(int(cells), int(n_layer), k, v) for cells, n_layer, k, v in KV_LINE.findall(text)]
    buffers = re.findall(r"compute buffer size = +([\d.]+) MiB", text)
    return found, sum(map(float, buffers))


def check(path: Path, setting: Setting, *, allocate: bool = True, within: float | None = None) -> None:
    model = read_model(path)
    found, compute = logged(path, setting, allocate=allocate)
    caches = model.memory.caches(setting)
    assert lines(caches) == found
    assert found
    if within:
        assert model.dims.graph(setting, caches) / MIB == pytest.approx(compute, rel=within)


SETTINGS = {
    "f16": Setting(4096),
    "an odd number of tokens": Setting(1000, n_ubatch=100),
    "q8_0": Setting(4096, "q8_0", "q8_0"),
    "q4_0 keys": Setting(4096, "q4_0", "f16"),
    "f32": Setting(2048, "f32", "f32"),
    "without flash attention": Setting(4096, flash_attn=False),
    "full-size sliding cache": Setting(4096, swa_full=True),
    "three sequences": Setting(6144, n_seq_max=3),
    "three in one": Setting(6144, n_seq_max=3, kv_unified=True),
    "small batches": Setting(2048, n_batch=64, n_ubatch=512),
}


@pytest.mark.engine
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "stablelm", "smollm3"])
def test_the_caches_are_what_llama_cpp_allocates(tmp_path: Path, arch: str, setting: Setting) -> None:
    check(tiny.make(tmp_path / "m.gguf", arch, n_embd=128, n_head=4, n_head_kv=2), setting)


@pytest.mark.engine
@pytest.mark.real
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_caches_of_smollm2(smollm2: Path, setting: Setting) -> None:
    check(smollm2, setting, within=0.05)


@pytest.mark.engine
@pytest.mark.real
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_caches_of_gemma_3(gemma: Path, setting: Setting) -> None:
    check(gemma, setting, allocate=False, within=0.05)


@pytest.mark.engine
@pytest.mark.real
@pytest.mark.parametrize("n_ctx", [8192, 32768, 131072])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_long_contexts_of_smollm2(smollm2: Path, n_ctx: int, flash_attn: bool) -> None:
    check(smollm2, Setting(n_ctx, flash_attn=flash_attn), allocate=False, within=0.01)


@pytest.mark.parametrize("model", GOLDEN["models"], ids=lambda m: m["name"])
def test_every_architecture_of_llama_cpp(tmp_path: Path, model: dict[str, Any]) -> None:
    path = stock_hparams.write(tmp_path / "m.gguf", model["arch"], model["keys"])
    with open_gguf(path) as index:
        what = memory(index)
    for options, wanted in zip(GOLDEN["settings"], model["logged"], strict=True):
        setting = Setting(n_batch=2048, **options)
        if wanted is None:
            with pytest.raises(Refused):
                what.caches(setting)
            continue
        caches = what.caches(setting)
        # rounded to two decimals, and summed in single precision
        assert [line[:2] for line in lines(caches)] == [tuple(line[:2]) for line in wanted["kv"]]
        mine = [float(mib) for line in lines(caches) for mib in line[2:]]
        assert mine == pytest.approx([mib for line in wanted["kv"] for mib in line[2:]], abs=0.0101)
        states = [c.nbytes / MIB for c in caches if c.name == "recurrent"]
        assert states == pytest.approx(wanted["state"], abs=0.0051)


def test_the_whole_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make(tmp_path / "m.gguf", n_embd=128, n_ctx=512)
    monkeypatch.setattr(FIT, "machine_memory", lambda: MachineMemory(8 << 30, 4 << 30))
    answer = fit_file(path)
    with open_gguf(path) as index:
        assert answer.weights == sum(t.nbytes for t in index.tensors.values())
    assert answer.kv == 2 * 2 * 512 * 64 * 2  # K and V, layers, cells, 2 heads of 32, two bytes
    assert answer.total == answer.weights + answer.kv + answer.compute
    assert answer.fits
    as_json = json.loads(json.dumps(answer.to_json()))
    assert (as_json["kv"], as_json["n_ctx"], as_json["memory_available"]) == (answer.kv, 512, 4 << 30)
    assert set(answer.largest) == {"f16", "q8_0"}
    shown = answer.render()
    assert "m.gguf  llama, 512 tokens" in shown
    assert "2 layers x 512 cells, f16/f16" in shown
    assert "Fits: 4.0 GiB of 8.0 GiB free on this machine." in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_more_than_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FIT, "machine_memory", lambda: MachineMemory(2 * MIB, 2 * MIB, 2 * MIB))
    answer = fit_file(tiny.make(tmp_path / "m.gguf", n_ctx=64), 4096)
    assert not answer.fits
    assert "Does not fit: 2.0 MiB of 2.0 MiB free on this container." in answer.render()
    assert "the file's own context is 64 tokens: `mrrope extend` makes it longer" in answer.render()


def test_a_machine_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FIT, "machine_memory", lambda: None)
    answer = fit_file(tiny.make(tmp_path / "m.gguf"))
    assert answer.fits
    assert answer.largest == {}
    assert "does not say" in answer.render()


@given(st.integers(1 << 20, 1 << 34), st.sampled_from(["f16", "q8_0"]))
def test_the_largest_context_is_the_largest(gqa: Fit, available: int, kind: str) -> None:
    setting = Setting(1, kind, kind)
    n = gqa.model.largest(setting, available)
    assert n is not None
    assert n % 256 == 0
    needed = [gqa.model.needs(replace(setting, n_ctx=max(n + step, 1)))[2] for step in (0, 256)]
    assert n == 0 or needed[0] <= available
    assert needed[1] > available


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fit_file(tiny.make(tmp_path_factory.mktemp("fit") / "m.gguf", "gemma3", n_embd=128))


def test_a_recurrent_model_has_no_largest_context(tmp_path: Path) -> None:
    mamba = next(model for model in GOLDEN["models"] if model["arch"] == "mamba")
    answer = fit_file(stock_hparams.write(tmp_path / "m.gguf", "mamba", mamba["keys"]))
    assert answer.largest["f16"] is None
    assert "as long as you like" in answer.render()
    assert "whatever the context" in answer.render()


def test_shards_are_added_up(tmp_path: Path) -> None:
    whole = fit_file(tiny.make(tmp_path / "whole.gguf"))
    split = fit_file(tiny.make(tmp_path / "split.gguf", split=3))
    assert split.model.path.name == "split-00001-of-00003.gguf"
    assert split.weights == whole.weights


def test_a_missing_shard(tmp_path: Path) -> None:
    first = tiny.make(tmp_path / "split.gguf", split=3)
    first.with_name("split-00002-of-00003.gguf").unlink()
    with pytest.raises(FileTrouble, match="missing"):
        fit_file(first)


@pytest.mark.parametrize(
    ("type_k", "type_v", "what"),
    [("q8_0", "f16", "cannot have a q8_0 cache"), ("f16", "q4_0", "cannot have a q4_0 cache")],
)
def test_a_cache_type_that_llama_cpp_would_refuse(tmp_path: Path, type_k: str, type_v: str, what: str) -> None:
    path = tiny.make(tmp_path / "m.gguf", head_dim=16)
    with pytest.raises(Refused, match=what) as caught:
        fit_file(path, type_k=type_k, type_v=type_v)
    assert "16 wide" in caught.value.why
    assert set(fit_file(path).largest) == {"f16"}


def test_quantised_values_need_flash_attention(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", n_embd=128)
    with pytest.raises(Refused, match="needs flash attention"):
        fit_file(path, type_v="q8_0", flash_attn=False)
    assert fit_file(path, type_k="q8_0", flash_attn=False).kv < fit_file(path).kv


def test_keys_and_values_of_one_type_where_they_are_one(tmp_path: Path) -> None:
    deepseek = next(model for model in GOLDEN["models"] if model["arch"] == "deepseek2")
    path = stock_hparams.write(tmp_path / "m.gguf", "deepseek2", deepseek["keys"])
    with pytest.raises(Refused, match="one type"):
        fit_file(path, type_k="q8_0")


def test_an_unknown_type_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tensor type"):
        fit_file(tiny.make(tmp_path / "m.gguf"), type_k="q9_9")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="unknown architecture 'llama9'"):
        fit_file(stock_hparams.write(tmp_path / "m.gguf", "llama9", {"context_length": 64}))


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUM")
    with pytest.raises(BadFile):
        fit_file(tmp_path / "m.gguf")


def test_fit_needs_neither_numpy_nor_the_engine(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf")
    code = f"import sys; from mrrope_gguf import fit; fit({str(path)!r}).render(); print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "llama_cpp", "matplotlib", "fcntl"} & {name.strip("[]' \n") for name in found.split(",")}


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 2000, 5 << 20, 3 << 30)] == ["0.0 KiB", "2.0 KiB", "5.0 MiB", "3.0 GiB"]
