"""Elastic context is switched on and off, and told when to grow; where it cannot be, it says so."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine import (
    ElasticState,
    capture,
    get_elastic,
    get_table,
    set_elastic,
    set_elastic_policy,
    set_factors,
    set_table,
)
from mrrope_gguf.errors import Refused
from tests import tiny
from tests.elastic import COARSE, FINE, FULL, ORIG, Held, Policy, elastic, grow_file, scale_of, scratch, with_keys
from tests.engine_models import model
from tests.engine_session import Session, rel_rms, session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS = tiny.tokens(300)
BROAD: dict[str, Any] = {"head_dim": 32, "n_embd": 128}
PRO = 5  # LLAMA_ROPE_SCALING_TYPE_MRROPE_PRO


def error(path: Path, s: Session) -> float:
    """Relative RMS error of layer 0's keys, against those of the table in effect."""
    held: Held = dict(enumerate(TOKENS[: s.next()]))
    return rel_rms(s.keys()[0].values, scratch(path, get_table(s.ctx), held, "f32"))


def back_and_forth(path: Path, n: int) -> list[tuple[ElasticState, float]]:
    """The state and the keys' error after n tokens, off, on, under a table set by hand, and on again."""
    found = []
    with elastic(path) as s:

        def look() -> None:
            found.append((get_elastic(s.ctx), error(path, s)))

        s.feed(TOKENS[:n])
        look()
        for on in (False, False, True, True):
            set_elastic(s.ctx, on)
            look()
        table = [1.0 + i / 8 for i in range(16)]
        set_factors(s.ctx, table, 1.2)
        s.feed(TOKENS[n : n + 1])
        held = get_table(s.ctx)
        assert held is not None
        assert held.factors == tuple(table)
        look()
        set_elastic(s.ctx, True)
        look()
        set_table(s.ctx, None)
        s.feed(TOKENS[n + 1 : n + 2])
        look()
        set_elastic(s.ctx, True)
        s.feed(TOKENS[n + 2 : n + 3])
        look()
        return found


@pytest.mark.parametrize("n", [30, 100, 250])
def test_in_the_middle_of_a_conversation(engine: Worker, tmp_path: Path, n: int) -> None:
    found = engine.call(back_and_forth, grow_file(tmp_path, "llama", **BROAD).path, n)
    stage, more = (float(np.float32(Policy().scale_at(k))) for k in (n, n + 3))
    states = [state for state, _ in found]
    assert {state.method for state in states} == {"mrrope-pro"}
    assert {state.full_scale for state in states} == {FULL}
    assert [state.on for state in states] == [True, False, False, True, True, False, True, False, True]
    scales = [state.scale for state in states]
    assert scales[:5] == [stage, FULL, FULL, stage, stage]
    assert scales[6] == np.float32(Policy().scale_at(n + 1))
    assert scales[7:] == [1.0, more]
    assert max(error for _, error in found) < 1e-4


def off_after(path: Path) -> list[tuple[ElasticState, float]]:
    """The state and the keys' error where a table of one's own, or none, gives way to the full one."""
    found = []
    with elastic(path) as s:
        s.feed(TOKENS[:100])
        for factors in ([1.0 + i / 8 for i in range(16)], None):
            if factors:
                set_factors(s.ctx, factors, 1.2)
            else:
                set_table(s.ctx, None)
            set_elastic(s.ctx, False)
            found.append((get_elastic(s.ctx), error(path, s)))
    return found


def test_off_is_the_full_table_whatever_was_there(engine: Worker, tmp_path: Path) -> None:
    for state, wrong in engine.call(off_after, grow_file(tmp_path, "llama", **BROAD).path):
        assert state == ElasticState(False, FULL, "mrrope-pro", FULL)
        assert wrong < 1e-4


def file_off(path: Path) -> tuple[ElasticState, Floats, ElasticState, Floats]:
    """State and logits of a context as the file has it, and of one that was told otherwise."""
    with session(path, n_ctx=512) as s:
        first, static = get_elastic(s.ctx), s.feed(TOKENS)
        s.clear()
        set_elastic_policy(s.ctx, step=1.25, head_room=1.25)
        assert not get_elastic(s.ctx).on
        set_elastic(s.ctx, True)
        return first, static, get_elastic(s.ctx), s.feed(TOKENS)


def logits(path: Path, **params: Any) -> Floats:
    with elastic(path, **params) as s:
        return s.feed(TOKENS)


@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_a_file_that_says_no(engine: Worker, tmp_path: Path, rendering: Any) -> None:
    from mrrope_gguf.extend import extend

    source = model(tmp_path, "llama", n_layer=2)
    static, grows = (
        extend(source, tmp_path / f"{on}.gguf", scale=4, rendering=rendering, elastic=on, method="mrrope-pro").path
        for on in (False, True)
    )
    before, full, after, found = engine.call(file_off, static)
    assert before == ElasticState(False, FULL, "mrrope-pro", FULL)
    assert after == ElasticState(True, 1.0, "mrrope-pro", FULL)
    wanted = engine.call(logits, grows)
    assert (found == wanted).all()
    assert (full != wanted).any()


def by_parameter(path: Path, **params: Any) -> tuple[ElasticState, ElasticState, Floats]:
    with session(path, n_ctx=512, rope_scaling_type=PRO, rope_freq_scale=0.25, **params) as s:
        before = get_elastic(s.ctx)
        set_elastic_policy(s.ctx, step=1.25, head_room=1.25)
        set_elastic(s.ctx, True)
        return before, get_elastic(s.ctx), s.feed(TOKENS)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_table_from_the_parameters(engine: Worker, tmp_path: Path, name: str) -> None:
    done = grow_file(tmp_path, name)
    before, after, found = engine.call(by_parameter, done.source)
    assert before == ElasticState(False, FULL, "mrrope-pro", FULL)
    assert after == ElasticState(True, 1.0, "mrrope-pro", FULL)
    assert (found == engine.call(logits, done.path)).all()


def without_table(path: Path, **params: Any) -> tuple[ElasticState, str, ElasticState]:
    with session(path, n_ctx=256, **params) as s:
        before = get_elastic(s.ctx)
        set_elastic(s.ctx, False)
        set_elastic_policy(s.ctx, step=1.25, head_room=1.25)
        with pytest.raises(Refused) as caught:
            set_elastic(s.ctx, True)
        s.feed(TOKENS[:200])
        return before, str(caught.value), get_elastic(s.ctx)


@pytest.mark.parametrize("kind", ["source", "type none", "no room"])
def test_no_table_to_grow_to(engine: Worker, tmp_path: Path, kind: str) -> None:
    done = grow_file(tmp_path, "llama")
    path, params = {
        "source": (done.source, {}),
        "type none": (done.path, {"rope_scaling_type": 0}),
        "no room": (model(tmp_path, "llama", n_ctx=256), {"rope_scaling_type": PRO}),
    }[kind]
    before, why, after = engine.call(without_table, path, **params)
    assert before == after
    assert (before.on, before.scale, before.full_scale) == (False, 1.0, 1.0)
    assert "no table to grow to" in why


def log_of(path: Path, *sizes: int) -> str:
    """llama.cpp's log of opening a file and decoding batches of these sizes."""
    import llama_cpp

    inherit: Any = {"rope_scaling_type": -1, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_orig_ctx": 0}
    with capture() as log:
        # its own log callback would hide what is read here
        llm = llama_cpp.Llama(str(path), n_ctx=512, **inherit, verbose=True)
        s = Session(llm._model.model, llm._ctx.ctx)
        for n in sizes:
            s.feed(TOKENS[:n])
        llm.close()
        return log.text


def static_only(path: Path) -> tuple[ElasticState, str, Floats]:
    with session(path, n_ctx=256) as s:
        state = get_elastic(s.ctx)
        with pytest.raises(Refused) as caught:
            set_elastic(s.ctx, True)
        s.feed(TOKENS[:10])
        with pytest.raises(Refused):
            set_elastic(s.ctx, True)
        assert get_elastic(s.ctx) == state
        s.clear()
        return state, str(caught.value), s.feed(TOKENS[:200])


def static(path: Path) -> Floats:
    with session(path, n_ctx=256) as s:
        return s.feed(TOKENS[:200])


@pytest.mark.parametrize("name", ["maincoder", "hunyuan-dense", "qwen2vl"])
def test_keys_that_cannot_be_turned(engine: Worker, tmp_path: Path, name: str) -> None:
    _, path = with_keys(tmp_path, name)
    state, why, found = engine.call(static_only, path)
    assert state == ElasticState(False, FULL, "mrrope-pro", FULL)
    assert "not elastic" in engine.call(log_of, path)
    assert "elastic context was not switched on" in why
    (other := tmp_path / "static").mkdir()
    assert (found == engine.call(static, with_keys(other, name, {"elastic": False})[1])).all()
    assert (found != engine.call(static, model(tmp_path, name))).any()


def changed(path: Path, cuts: list[int]) -> list[tuple[float, float]]:
    """S and the keys' error after each change of policy in a conversation, and after the next token."""
    found = []
    with elastic(path) as s:
        for n, policy in zip(cuts, (FINE, COARSE, Policy(3.0, 2.0), Policy(), FINE), strict=True):
            s.feed(TOKENS[s.next() : n])
            set_elastic_policy(s.ctx, step=policy.step, head_room=policy.head_room)
            assert scale_of(s) == np.float32(policy.scale_at(n))
            found.append((scale_of(s), error(path, s)))
            s.feed([TOKENS[n]])
            assert scale_of(s) == np.float32(policy.scale_at(n + 1))
            found.append((scale_of(s), error(path, s)))
    return found


@pytest.mark.parametrize("cuts", [[20, 40, 50, 60, 63], [70, 90, 120, 130, 150], [64, 80, 128, 200, 250]], ids=str)
def test_another_policy_in_the_middle(engine: Worker, tmp_path: Path, cuts: list[int]) -> None:
    found = engine.call(changed, grow_file(tmp_path, "llama", **BROAD).path, cuts)
    assert max(error for _, error in found) < 1e-4


BAD = [(1.0, 1.0), (0.5, 1.0), (-2.0, 1.0), (2.0, 0.99), (2.0, 0.0), (float("nan"), 1.0), (2.0, float("inf"))]


def bad_policies(path: Path) -> tuple[list[str], list[int], list[float]]:
    """What Python says of each, what llama.cpp returns; and S at some lengths, which must not have changed."""
    said, statuses, found = [], [], []
    with elastic(path, FINE) as s:
        for step, head_room in BAD:
            with pytest.raises(Refused) as caught:
                set_elastic_policy(s.ctx, step=step, head_room=head_room)
            said.append(str(caught.value))
            call = s.api.llama_cpp._lib["llama_rope_elastic_policy"]
            call.restype, call.argtypes = ctypes.c_int32, [ctypes.c_void_p, ctypes.c_float, ctypes.c_float]
            statuses.append(call(s.ctx, step, head_room))
        for at in range(0, 300, 20):
            s.feed(TOKENS[at : at + 20])
            found.append(scale_of(s))
        return said, statuses, found


def test_a_bad_policy_changes_nothing(engine: Worker, tmp_path: Path) -> None:
    said, statuses, found = engine.call(bad_policies, grow_file(tmp_path, "llama").path)
    assert all("step" in why and "head_room" in why for why in said)
    assert all(status != 0 for status in statuses)
    assert found == [np.float32(FINE.scale_at(n)) for n in range(20, 301, 20)]


def too_much(path: Path) -> tuple[int, list[float], Floats, Floats]:
    """A batch that finds no room leaves S where it was, and the keys too: the next tokens are as if it had not come."""
    with elastic(path, FINE, n_ctx=256) as s:
        s.feed(TOKENS[:200])
        found, wanted = [scale_of(s)], s.peek()
        with pytest.raises(RuntimeError, match="returned 1"):
            s.feed(TOKENS[:80])
        found.append(scale_of(s))
        return s.next(), found, wanted, s.peek()


def test_a_batch_without_room_changes_nothing(engine: Worker, tmp_path: Path) -> None:
    n, scales, wanted, found = engine.call(too_much, grow_file(tmp_path, "llama", n_layer=2).path)
    assert n == 200
    assert scales == [np.float32(FINE.scale_at(200))] * 2
    assert (found == wanted).all()


def test_the_log_says_that_it_grows(engine: Worker, tmp_path: Path) -> None:
    done = grow_file(tmp_path, "llama")
    log = engine.call(log_of, done.path, ORIG, 200)
    assert any("mrrope-pro" in line and "elastic" in line and "stages" in line for line in log.splitlines())
    moved = [line for line in log.splitlines() if "rope_elastic_update" in line]
    assert "scale 1 ->" in moved[0]
    assert "-> 4" in moved[-1]
    assert "rope_elastic_update" not in engine.call(log_of, done.path, ORIG)
