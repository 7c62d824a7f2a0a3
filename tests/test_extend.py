"""`extend` end to end on tiny models: what a file holds, who runs it, what is refused, and that the table is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from mrrope_gguf import EngineTrouble, Refused, extend, inspect, load, revert, rope_table
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.extend import file_factors
from tests import tiny
from tests.forward import forward

N_CTX, N_ROT = 64, 16
TOKENS = tiny.tokens(4 * N_CTX)


def contents(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensor_hashes(path: Path) -> dict[str, str]:
    return {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in GGUFReader(path).tensors}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def gap(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "tiny-8B-Instruct-Q8_0.gguf")


def test_holds_what_the_design_says(llama: Path) -> None:
    done = extend(llama, scale=4)
    assert done.path == llama.with_name("tiny-8B-ContextLength256-Instruct-Q8_0.gguf")
    held = contents(done.path)
    table = rope_table("mrrope-uni", n_rot=N_ROT, freq_base=1e4, n_ctx_orig=N_CTX, scale=4)
    scaling = "llama.rope.scaling"
    assert held["llama.context_length"] == 256
    assert held[f"{scaling}.original_context_length"] == 64
    assert held[f"{scaling}.mrrope.version"] == 1
    assert held[f"{scaling}.mrrope.method"] == "mrrope-uni"
    assert held[f"{scaling}.mrrope.scale"] == 4.0
    assert (held[f"{scaling}.mrrope.beta_fast"], held[f"{scaling}.mrrope.beta_slow"]) == (32.0, 1.0)
    assert held[f"{scaling}.mrrope.elastic"] is True
    assert held[f"{scaling}.mrrope.radix"] == pytest.approx(table.radix.tolist(), rel=1e-7)
    for key in ("attn_factor", "mrrope.attn_factor"):
        assert held[f"{scaling}.{key}"] == pytest.approx(0.1 * np.log(4) + 1)
    assert f"{scaling}.mrrope.base_factors" not in held
    assert f"{scaling}.type" not in held
    freqs = next(t for t in GGUFReader(done.path).tensors if t.name == "rope_freqs.weight")
    assert freqs.data.tolist() == pytest.approx(table.factors.tolist(), rel=1e-6)
    product = np.concatenate([[1.0], np.cumprod(np.float64(held[f"{scaling}.mrrope.radix"]))[:-1]])
    assert np.array_equal(freqs.data, product.astype(np.float32))


def test_provenance(tmp_path: Path) -> None:
    extra = {"general.name": "Tiny 8B Instruct", "general.organization": "Us", "general.base_model.0.name": "Older"}
    src = tiny.make(tmp_path / "m.gguf", extra={**extra, "general.base_model.count": 1})
    held = contents(extend(src, scale=2).path)
    assert held["general.base_model.count"] == 1
    assert held["general.base_model.0.name"] == "Tiny 8B Instruct"
    assert held["general.base_model.0.organization"] == "Us"
    assert held["general.name"] == "Tiny 8B ContextLength128 Instruct"
    assert "mrrope-uni" in held["general.description"]
    assert "mrrope" in held["general.tags"]


def test_every_tensor_byte_and_untouched_key_is_kept(llama: Path) -> None:
    done = extend(llama, scale=4)
    before, after = tensor_hashes(llama), tensor_hashes(done.path)
    assert set(after) - set(before) == {"rope_freqs.weight"}
    assert all(after[name] == digest for name, digest in before.items())
    changed = set(done.keys)
    old, new = contents(llama), contents(done.path)
    untouched = {key for key in old if key not in changed and not key.startswith("GGUF.")}
    assert len(untouched) > 10
    assert all(old[key] == new[key] for key in untouched)


@pytest.mark.engine
@pytest.mark.parametrize("method", ["mrrope-pro", "mrrope-uni", "yarn", "yarn-turns", "ntk", "linear", "llama3"])
def test_stock_llama_computes_with_the_table(llama: Path, method: str) -> None:
    done = extend(llama, scale=4, method=method)
    stock = tiny.logits(done.path, TOKENS)
    assert gap(stock, forward(llama, TOKENS, file_factors(done.table), done.table.attn_factor)) < 1e-3
    assert gap(stock[N_CTX:], forward(llama, TOKENS)[N_CTX:]) > 0.1


@pytest.mark.engine
def test_own_rope_freqs_are_multiplied(tmp_path: Path) -> None:
    base = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]
    src = tiny.make(tmp_path / "m.gguf", rope_freqs=base)
    done = extend(src, scale=4)
    assert contents(done.path)["llama.rope.scaling.mrrope.base_factors"] == base
    factors = [f * b for f, b in zip(done.table.factor_values, base, strict=True)]
    assert gap(tiny.logits(done.path, TOKENS), forward(src, TOKENS, factors, done.table.attn_factor)) < 1e-3
    back = revert(done.path, tmp_path / "back.gguf")
    assert sha256(back.path) == sha256(src)


@pytest.mark.engine
def test_linear_scaling_is_merged(tmp_path: Path) -> None:
    src = tiny.make(tmp_path / "m.gguf", extra={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0})
    done = extend(src, scale=4)
    held = contents(done.path)
    assert not {"llama.rope.scaling.type", "llama.rope.scaling.factor"} & set(held)
    assert (done.table.n_ctx_orig, held["llama.context_length"]) == (64, 256)
    factors = [2.0 * f for f in done.table.factor_values]
    assert gap(tiny.logits(done.path, TOKENS), forward(src, TOKENS, factors, done.table.attn_factor)) < 1e-3


def test_trained_yarn_is_refused_without_force(tmp_path: Path) -> None:
    extra = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 32}
    src = tiny.make(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(Refused, match=r"already scales its RoPE \(yarn, factor 2\)"):
        extend(src, scale=4)
    done = extend(src, scale=4, force=True)
    assert (done.table.n_ctx_orig, done.n_ctx) == (32, 128)
    assert "llama.rope.scaling.type" not in contents(done.path)


def test_trained_longrope_is_refused_without_force(tmp_path: Path) -> None:
    extra = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 32}
    long = {"rope_factors_long.weight": np.full(8, 2, np.float32), "rope_factors_short.weight": np.ones(8, np.float32)}
    src = tiny.make(tmp_path / "m.gguf", extra=extra, tensors=long)
    with pytest.raises(Refused, match="longrope"):
        extend(src, scale=4)
    done = extend(src, scale=4, force=True)
    assert done.rendering.tensor == "rope_factors_long.weight"
    assert contents(done.path)["llama.rope.scaling.type"] == "longrope"
    assert sha256(revert(done.path, tmp_path / "back.gguf").path) == sha256(src)


@pytest.mark.engine
def test_trained_longrope_for_the_patched_engine_loads_in_stock(tmp_path: Path) -> None:
    """Its loader reads the model's own long and short factors under type longrope alone."""
    own = {f"rope_factors_{kind}.weight": np.full(8, 1.5, np.float32) for kind in ("long", "short")}
    keys = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 32}
    src = tiny.make(tmp_path / "m.gguf", "minicpm", extra=keys, tensors=own)
    done = extend(src, tmp_path / "e.gguf", scale=4, rendering="engine", force=True)
    assert np.isfinite(tiny.logits(done.path, TOKENS)).all()
    found = inspect(done.path)
    assert found.stored is not None
    assert (found.stored.rendering, found.warnings) == ("engine", ())
    with pytest.raises(EngineTrouble, match="needs the patched engine"):
        load(done.path)
    assert sha256(revert(done.path, tmp_path / "back.gguf").path) == sha256(src)


def test_extending_again_replaces(llama: Path, tmp_path: Path) -> None:
    once = extend(llama, tmp_path / "once.gguf", scale=4)
    twice = extend(once.path, tmp_path / "twice.gguf", scale=8, method="mrrope-uni")
    direct = extend(llama, tmp_path / "direct.gguf", scale=8, method="mrrope-uni")
    assert twice.replaced
    assert not direct.replaced
    assert twice.path.read_bytes() == direct.path.read_bytes()
    assert sha256(revert(twice.path, tmp_path / "back.gguf").path) == sha256(llama)


@pytest.mark.engine
def test_engine_rendering_loads_in_stock_as_yarn(tmp_path: Path) -> None:
    src = tiny.make(tmp_path / "m.gguf", "qwen2")
    done = extend(src, scale=4)
    held = contents(done.path)
    assert done.rendering.kind == "engine"
    assert "--portable" in done.rendering.why
    assert held["qwen2.rope.scaling.type"] == "yarn"
    assert held["qwen2.rope.scaling.factor"] == 4.0
    assert "qwen2.rope.scaling.attn_factor" not in held
    assert tensor_hashes(done.path) == tensor_hashes(src)
    assert np.isfinite(tiny.logits(done.path, TOKENS)).all()


@pytest.mark.engine
def test_qwen2_portable_is_llama_with_the_same_table(tmp_path: Path) -> None:
    src = tiny.make(tmp_path / "m.gguf", "qwen2")
    done = extend(src, scale=4, rendering="portable")
    assert contents(done.path)["general.architecture"] == "llama"
    wanted = forward(done.path, TOKENS, file_factors(done.table), done.table.attn_factor)
    assert gap(tiny.logits(done.path, TOKENS), wanted) < 1e-3
    assert gap(tiny.logits(src, TOKENS), wanted) > 0.1
    assert sha256(revert(done.path, tmp_path / "back.gguf").path) == sha256(src)


def test_engine_file_becomes_portable_and_back(tmp_path: Path) -> None:
    src = tiny.make(tmp_path / "m.gguf", "qwen2")
    engine = extend(src, tmp_path / "engine.gguf", scale=4)
    portable = extend(engine.path, tmp_path / "portable.gguf", scale=4, rendering="portable")
    again = extend(portable.path, tmp_path / "again.gguf", scale=4, rendering="engine")
    assert again.path.read_bytes() == engine.path.read_bytes()


@pytest.mark.engine
def test_sliding_window_model_keeps_its_local_layers(tmp_path: Path) -> None:
    src = tiny.make(tmp_path / "m.gguf", "gemma3")
    done = extend(src, scale=4)
    assert done.rendering.kind == "engine"
    assert np.isfinite(tiny.logits(done.path, TOKENS)).all()


def test_split_model(tmp_path: Path) -> None:
    src = tiny.make(tmp_path / "m-00001-of-00003.gguf", split=3)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    out = tmp_path / "out"
    out.mkdir()
    done = extend(shards[1], out / "long-00001-of-00003.gguf", scale=4)
    made = sorted(out.iterdir())
    assert [p.name for p in made] == [f"long-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert made[1].samefile(shards[1])
    assert contents(done.path)["split.tensors.count"] == contents(src)["split.tensors.count"] + 1


@pytest.mark.engine
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_split_model_runs_extended(tmp_path: Path, arch: str) -> None:
    whole = tiny.make(tmp_path / "whole.gguf", arch)
    src = tiny.make(tmp_path / "m-00001-of-00003.gguf", arch, split=3)
    (tmp_path / "out").mkdir()
    done = extend(src, tmp_path / "out" / "long-00001-of-00003.gguf", scale=4, rendering="portable")
    wanted = extend(whole, tmp_path / "one.gguf", scale=4, rendering="portable").path
    assert np.array_equal(tiny.logits(done.path, TOKENS), tiny.logits(wanted, TOKENS))


def test_in_place_and_revert(llama: Path) -> None:
    before = sha256(llama)
    done = extend(llama, scale=4, in_place=True)
    assert done.path == llama
    assert contents(llama)["llama.context_length"] == 256
    extend(llama, scale=8, in_place=True)
    assert contents(llama)["llama.context_length"] == 512
    revert(llama)
    assert sha256(llama) == before


def test_dry_run_writes_nothing(llama: Path) -> None:
    done = extend(llama, scale=4, dry_run=True)
    assert done.written is None
    assert "llama.context_length" in done.keys
    assert list(llama.parent.iterdir()) == [llama]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "how far should it be extended"),
        ({"scale": 1.0}, "cannot be extended 1 times"),
        ({"scale": 0.5}, "cannot be extended 0.5 times"),
        ({"scale": float("nan")}, "cannot be extended nan times"),
        ({"scale": 1e9}, "cannot be extended 1e\\+09 times"),
        ({"n_ctx": 64}, "cannot be extended to 64 tokens"),
        ({"scale": 1.001}, "adds not one token"),
        ({"scale": 4, "beta_fast": 1.0}, "no table can be made"),
        ({"scale": 4, "attn_factor": -1.0}, "no table can be made"),
    ],
)
def test_bad_numbers_are_refused(llama: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        extend(llama, **options)
    assert list(llama.parent.iterdir()) == [llama]


def test_in_place_with_a_destination_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="contradict"):
        extend(llama, tmp_path / "other.gguf", scale=4, in_place=True)


def test_existing_destination_needs_force(llama: Path, tmp_path: Path) -> None:
    dst = tmp_path / "there.gguf"
    dst.write_bytes(b"precious")
    with pytest.raises(FileTrouble, match=r"there\.gguf"):
        extend(llama, dst, scale=4)
    assert dst.read_bytes() == b"precious"
    extend(llama, dst, scale=4, force=True)
    assert contents(dst)["llama.context_length"] == 256


@pytest.mark.parametrize(
    ("arch", "keys", "words"),
    [
        ("mamba", {}, "this model has no RoPE"),
        ("cohere2", {"attention.sliding_window": 16}, "only the sliding-window layers of this model have RoPE"),
        ("neverheardof", {}, "unknown architecture 'neverheardof'"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, arch: str, keys: dict[str, int], words: str) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", arch)
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 64, "attention.head_count": 4}
    for key, value in {**sizes, **keys}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    tiny.finish(writer, tmp_path / "m.gguf")
    with pytest.raises(Refused, match=words):
        extend(tmp_path / "m.gguf", scale=4)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.engine
def test_radix_from_a_file(llama: Path, tmp_path: Path) -> None:
    factors = [1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 4.0]
    (tmp_path / "t.json").write_text(json.dumps({"factors": factors, "attn_factor": 1.05}))
    done = extend(llama, scale=4, radix=tmp_path / "t.json")
    held = contents(done.path)
    assert held["llama.rope.scaling.mrrope.method"] == "custom"
    assert held["llama.rope.scaling.mrrope.lead"] == pytest.approx(1.1)
    assert gap(tiny.logits(done.path, TOKENS), forward(llama, TOKENS, factors, 1.05)) < 1e-3


def test_radix_of_another_scale_is_moved(llama: Path, tmp_path: Path) -> None:
    made = rope_table("mrrope-uni", n_rot=N_ROT, freq_base=1e4, n_ctx_orig=N_CTX, scale=16)
    (tmp_path / "t.json").write_text(json.dumps({"radix": list(made.radix_values), "scale": 16}))
    table = extend(llama, scale=4, radix=tmp_path / "t.json").table
    wanted = rope_table("mrrope-uni", n_rot=N_ROT, freq_base=1e4, n_ctx_orig=N_CTX, scale=4)
    assert table.factors == pytest.approx(wanted.factors)


def test_ctx_instead_of_scale(llama: Path) -> None:
    done = extend(llama, n_ctx=100)
    assert done.n_ctx == 100
    assert done.table.scale == pytest.approx(100 / 64)
    assert contents(done.path)["llama.context_length"] == 100


@pytest.mark.engine
def test_own_attn_factor_is_multiplied(tmp_path: Path) -> None:
    src = tiny.make(tmp_path / "m.gguf", extra={"rope.scaling.attn_factor": 1.25})
    done = extend(src, scale=4)
    assert done.table.attn_factor == pytest.approx(1.25 * (0.1 * np.log(4) + 1))
    assert contents(done.path)["llama.rope.scaling.mrrope.base_attn_factor"] == 1.25
    wanted = forward(src, TOKENS, file_factors(done.table), done.table.attn_factor)
    assert gap(tiny.logits(done.path, TOKENS), wanted) < 1e-3


@pytest.mark.parametrize("method", ["linear", "yarn-turns"])
def test_first_factor_is_stored_where_it_is_not_one(llama: Path, method: str) -> None:
    done = extend(llama, scale=4, method=method)
    assert done.table.lead > 1
    assert contents(done.path)["llama.rope.scaling.mrrope.lead"] == pytest.approx(done.table.lead)
