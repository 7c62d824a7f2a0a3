"""A gemma4-assistant drafts with the keys of its target, so it turns its queries as the target turns its keys."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGUFWriter

from mrrope_gguf.engine import ActiveTable, get_elastic, get_table, set_elastic
from mrrope_gguf.tables import stored_factors
from tests import tiny
from tests.elastic import FULL, ORIG, Policy, elastic, grow_file
from tests.engine_models import table_keys
from tests.engine_session import Session, session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS = tiny.tokens(300)
N_TARGET, N_DRAFT, HEAD, N_HEAD, N_FF = 64, 32, 16, 4, 64
# any target will do whose last layer sees everything and the one before it a window: gemma3 is one
NAME = "gemma4-assistant"


def assistant(path: Path, extra: dict[str, Any] | None = None, freqs: Sequence[float] = (1.0,) * (HEAD // 2)) -> Path:
    """A random draft of two layers: the first slides, the second is global."""
    rng = np.random.default_rng(8)
    writer = GGUFWriter(path, NAME)

    def put(name: str, *shape: int, gain: float = 1.0) -> None:
        scale = gain / shape[-1] ** 0.5 if len(shape) > 1 else 0.1
        values = rng.standard_normal(shape) * scale + (len(shape) == 1)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    keys: dict[str, Any] = {
        "context_length": ORIG, "embedding_length": N_DRAFT, "embedding_length_out": N_TARGET, "block_count": 2,
        "nextn_predict_layers": 2, "feed_forward_length": N_FF, "attention.head_count": N_HEAD,
        "attention.head_count_kv": 2, "attention.key_length": HEAD, "attention.value_length": HEAD,
        "attention.key_length_swa": HEAD, "attention.value_length_swa": HEAD, "attention.sliding_window": 16,
        "attention.sliding_window_pattern": [True, False], "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e4, "rope.freq_base_swa": 1e4, "rope.dimension_count": HEAD,
        "rope.dimension_count_swa": HEAD,
    }  # fmt: skip
    for key, value in {**keys, **(extra or {})}.items():
        tiny.add_key(writer, f"{NAME}.{key}", value)
    for key, value in tiny._tokenizer().items():
        tiny.add_key(writer, key, value)
    put("token_embd", tiny.N_VOCAB, N_DRAFT, gain=3.0)
    put("output_norm", N_DRAFT)
    put("nextn.post_projection", N_TARGET, N_DRAFT)
    put("nextn.pre_projection", N_DRAFT, 2 * N_TARGET)
    writer.add_tensor("rope_freqs.weight", np.array(freqs, np.float32))
    for il in range(2):
        blk = f"blk.{il}."
        put(blk + "attn_norm", N_DRAFT)
        put(blk + "attn_q", N_HEAD * HEAD, N_DRAFT)
        put(blk + "attn_output", N_DRAFT, N_HEAD * HEAD, gain=2.0)
        put(blk + "attn_q_norm", HEAD)
        put(blk + "post_attention_norm", N_DRAFT)
        put(blk + "layer_output_scale", 1)
        put(blk + "ffn_norm", N_DRAFT)
        put(blk + "ffn_gate", N_FF, N_DRAFT)
        put(blk + "ffn_up", N_FF, N_DRAFT)
        put(blk + "ffn_down", N_DRAFT, N_FF)
        put(blk + "post_ffw_norm", N_DRAFT)
    return tiny.finish(writer, path)


@contextmanager
def drafting(target: Session, path: Path) -> Iterator[Any]:
    """A context of the draft beside the target's."""
    api = target.api
    mparams = api.llama_model_default_params()
    mparams.use_mmap = False
    model = api.llama_model_load_from_file(str(path).encode(), mparams)
    assert model
    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 512, 1, 1
    params.type_k = params.type_v = params.flash_attn_type = 0
    params.swa_full, params.kv_unified, params.ctx_other = True, True, target.ctx
    ctx = api.llama_init_from_model(model, params)
    assert ctx
    try:
        yield ctx
    finally:
        api.llama_free(ctx)
        api.llama_model_free(model)


def draft(target: Session, ctx: Any, token: int = 9) -> Floats:
    """Logits of what follows a token that the target has not seen yet."""
    api = target.api
    hidden = np.random.default_rng(2).standard_normal(N_TARGET).astype(np.float32)
    embd = api.llama_embd(data=hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), n_rows=1, n_embd=N_TARGET)
    batch = api.llama_batch_ext_init(ctx)
    at = api.llama_batch_ext_add_token(batch, 0, token)
    assert api.llama_batch_ext_set_embd_token(batch, at, embd)
    pos = (ctypes.c_int32 * 1)(target.next())
    assert api.llama_batch_ext_set_pos(batch, at, pos)
    api.llama_batch_ext_set_output_logits(batch, at, True)
    status = api.llama_process(ctx, 1, batch)
    api.llama_batch_ext_free(batch)
    assert status == 0, f"llama_process returned {status}"
    return np.array(np.ctypeslib.as_array(api.llama_get_logits(ctx), (tiny.N_VOCAB,)))


def followed(
    target: Path, path: Path, lengths: list[int], static: bool = False
) -> tuple[list[Floats], list[Any], bool]:
    """The draft's logits where the target holds so many tokens, both tables there; whether it is elastic itself."""
    rows: list[Floats] = []
    tables: list[tuple[ActiveTable | None, ActiveTable | None]] = []
    with elastic(target) as s, drafting(s, path) as ctx:
        if static:
            set_elastic(s.ctx, False)
        for n in lengths:
            if s.next() > n:
                s.remove(0, n - 1)
            s.feed(TOKENS[s.next() : n])
            rows.append(draft(s, ctx))
            tables.append((get_table(s.ctx), get_table(ctx)))
        return rows, tables, get_elastic(ctx).on


def plain(target: Path, path: Path, lengths: list[int]) -> list[Floats]:
    rows = []
    with session(target, n_ctx=512) as s, drafting(s, path) as ctx:
        for n in lengths:
            s.feed(TOKENS[s.next() : n])
            rows.append(draft(s, ctx))
    return rows


LENGTHS = [20, 60, 100, 200, 60, 300]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A target, that extended, and a draft for both."""
    done = grow_file(tmp_path, "gemma3")
    return done.source, done.path, assistant(tmp_path / "draft.gguf")


def test_it_has_the_table_of_its_target(engine: Worker, stock: Worker, files: tuple[Path, Path, Path]) -> None:
    source, target, path = files
    rows, tables, on = engine.call(followed, target, path, LENGTHS)
    assert not on
    for n, (theirs, ours) in zip(LENGTHS, tables, strict=True):
        assert (theirs is None) == (ours is None) == (n <= ORIG)
        if theirs and ours:
            assert theirs.scale == ours.scale == np.float32(Policy().scale_at(n))
            assert (theirs.factors, theirs.attn_factor) == (ours.factors, ours.attn_factor)
    # inside the window the pair is the one that was not extended
    wanted = stock.call(plain, source, path, LENGTHS[:2])
    assert (np.array(rows[:2]) == wanted).all()
    static, _, _ = engine.call(followed, target, path, [20], True)
    assert (static[0] != rows[0]).any()


def moved(target: Path, path: Path, n: int, static: bool) -> tuple[Floats, Floats, float]:
    """Logits before and after every key, and the draft's token with them, moves on by 40; S."""
    with elastic(target) as s, drafting(s, path) as ctx:
        if static:
            set_elastic(s.ctx, False)
        s.feed(TOKENS[:n])
        before = draft(s, ctx)
        s.shift(40)
        return before, draft(s, ctx), get_elastic(s.ctx).scale


@pytest.mark.parametrize(("n", "static"), [(20, False), (260, False), (60, True), (20, True)])
def test_only_distances_count(engine: Worker, files: tuple[Path, Path, Path], n: int, static: bool) -> None:
    # where queries turned by other angles than the keys, a shift of both would change what is drafted
    before, after, scale = engine.call(moved, *files[1:], n, static)
    assert scale == (FULL if static or n > 200 else 1.0)
    np.testing.assert_allclose(after, before, atol=2e-3)


@pytest.mark.parametrize("rendering", ["engine", "portable"])
def test_a_draft_that_was_extended_too(engine: Worker, files: tuple[Path, Path, Path], rendering: str) -> None:
    # `mrrope extend` leaves drafts alone; this is what it would write
    _, target, path = files
    keys, freqs = table_keys({"elastic": True}), [1.0] * 8
    if rendering == "portable":
        freqs = stored_factors(keys["rope.scaling.mrrope.radix"])
        keys |= {"rope.scaling.attn_factor": keys["rope.scaling.mrrope.attn_factor"]}
    longer = assistant(path.with_name("longer.gguf"), keys, freqs)
    wanted, tables, _ = engine.call(followed, target, path, LENGTHS)
    rows, found, on = engine.call(followed, target, longer, LENGTHS)
    assert not on
    assert [ours and ours.scale for _, ours in found] == [ours and ours.scale for _, ours in tables]
    np.testing.assert_allclose(rows, wanted, atol=1e-4)
