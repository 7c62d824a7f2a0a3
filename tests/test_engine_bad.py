"""A file whose table cannot be used does not load, and the log says why; the process lives on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.engine import capture
from tests import tiny
from tests.engine_models import RADIX, model, table_keys
from tests.engine_session import session
from tests.engine_worker import Worker

pytestmark = pytest.mark.engine


def opened(path: Path) -> tuple[str, str]:
    """How far a file gets ("no model", "no context" or "logits"), and llama.cpp's warnings and errors."""
    import llama_cpp

    with capture() as log:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            return "no model", "\n".join(log.problems())
        ctx = llama_cpp.llama_init_from_model(model, llama_cpp.llama_context_default_params())
        llama_cpp.llama_model_free(model) if not ctx else llama_cpp.llama_free(ctx)
        if not ctx:
            return "no context", "\n".join(log.problems())
    with session(path) as s:
        s.feed(tiny.tokens(10))
    return "logits", "\n".join(log.problems())


NAN, INF = math.nan, math.inf
# changed keys, and the words the log must have
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "radix too short": ({"radix": RADIX[:7]}, "mrrope.radix"),
    "radix too long": ({"radix": [*RADIX, 1.0]}, "mrrope.radix"),
    "radix of twice the length": ({"radix": RADIX * 2}, "mrrope.radix"),
    "radix with nan": ({"radix": [NAN, *RADIX[1:]]}, "mrrope.radix"),
    "radix with inf": ({"radix": [*RADIX[:7], INF]}, "mrrope.radix"),
    "radix with zero": ({"radix": [*RADIX[:3], 0.0, *RADIX[4:]]}, "mrrope.radix"),
    "radix negative": ({"radix": [*RADIX[:3], -1.5, *RADIX[4:]]}, "mrrope.radix"),
    "radix overflows": ({"radix": [1e30] * 8}, "mrrope.radix"),
    "radix of whole numbers": ({"radix": [1] * 8}, "mrrope.radix"),
    "radix a number": ({"radix": 1.0}, "mrrope.radix"),
    "radix a string": ({"radix": "1.0"}, "mrrope.radix"),
    "radix missing": ({"radix": None}, "mrrope.radix"),
    "version 2": ({"version": 2}, "mrrope.version"),
    "version 0": ({"version": 0}, "mrrope.version"),
    "version of the far future": ({"version": 2**32 - 1}, "mrrope.version"),
    "version a string": ({"version": "1"}, "mrrope.version"),
    "method missing": ({"method": None}, "mrrope.method"),
    "method a number": ({"method": 5}, "mrrope.method"),
    "scale nan": ({"scale": NAN}, "mrrope.scale"),
    "scale zero": ({"scale": 0.0}, "mrrope.scale"),
    "scale missing": ({"scale": None}, "mrrope.scale"),
    "scale a string": ({"scale": "4"}, "mrrope.scale"),
    "attn_factor nan": ({"attn_factor": NAN}, "mrrope.attn_factor"),
    "attn_factor zero": ({"attn_factor": 0.0}, "mrrope.attn_factor"),
    "attn_factor negative": ({"attn_factor": -1.0}, "mrrope.attn_factor"),
    "attn_factor inf": ({"attn_factor": INF}, "mrrope.attn_factor"),
    "attn_factor missing": ({"attn_factor": None}, "mrrope.attn_factor"),
    "beta_fast nan": ({"beta_fast": NAN}, "mrrope.beta_fast"),
    "beta_slow negative": ({"beta_slow": -1.0}, "mrrope.beta_slow"),
    "lead nan": ({"lead": NAN}, "mrrope.lead"),
    "lead zero": ({"lead": 0.0}, "mrrope.lead"),
    "elastic a string": ({"elastic": "yes"}, "mrrope.elastic"),
    "base_factors too short": ({"base_factors": [1.0] * 4}, "mrrope.base_factors"),
    "base_factors with nan": ({"base_factors": [1.0] * 7 + [NAN]}, "mrrope.base_factors"),
    "base_factors with zero": ({"base_factors": [0.0] + [1.0] * 7}, "mrrope.base_factors"),
    "base_factors a number": ({"base_factors": 2.0}, "mrrope.base_factors"),
}


def test_the_good_file_runs(engine: Worker, tmp_path: Path) -> None:
    assert engine.call(opened, model(tmp_path, "llama", extra=table_keys({})))[0] == "logits"
    assert engine.call(opened, model(tmp_path, "llama", extra=table_keys({"base_factors": [2.0] * 8})))[0] == "logits"


@pytest.mark.parametrize("kind", BAD)
def test_bad_keys_do_not_load(engine: Worker, tmp_path: Path, kind: str) -> None:
    changes, words = BAD[kind]
    outcome, log = engine.call(opened, model(tmp_path, "llama", extra=table_keys(changes)))
    assert outcome == "no model"
    assert words in log


@pytest.mark.parametrize("kind", BAD)
def test_stock_runs_them_all(stock: Worker, tmp_path: Path, kind: str) -> None:
    # so it is the patch that reads these keys, and not another fault of the file
    assert stock.call(opened, model(tmp_path, "llama", extra=table_keys(BAD[kind][0])))[0] == "logits"


@pytest.mark.parametrize(("name", "words"), [("gpt2", "RoPE"), ("cohere2", "attend to everything")])
def test_a_table_for_a_model_that_has_nothing_to_turn(engine: Worker, tmp_path: Path, name: str, words: str) -> None:
    changes = {k: v for k, v in table_keys({}, 16).items() if k != "rope.scaling.original_context_length"}
    outcome, log = engine.call(opened, model(tmp_path, name, extra={**changes, "context_length": 64}))
    assert outcome in ("no model", "no context")
    assert words in log


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "stablelm"])
def test_other_architectures(engine: Worker, tmp_path: Path, name: str) -> None:
    short = {"radix": RADIX[:3]}
    outcome, log = engine.call(opened, model(tmp_path, name, extra=table_keys(short)))
    assert outcome == "no model"
    assert "mrrope.radix has 3 numbers" in log


PARAMS: dict[str, dict[str, Any]] = {
    "a scale under 1": {"rope_freq_scale": 2.0},
    "beta_fast below beta_slow": {"yarn_beta_fast": 1.0, "yarn_beta_slow": 2.0},
    "no attention": {"yarn_attn_factor": 0.0},
    "attention without end": {"yarn_attn_factor": INF},
}


@pytest.mark.parametrize("kind", PARAMS)
def test_parameters_that_give_no_table(engine: Worker, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeError, match="mrrope"):
        engine.call(fed, model(tmp_path, "llama"), rope_scaling_type=5, **PARAMS[kind])


@pytest.mark.parametrize("name", ["gpt2", "cohere2"])
def test_parameters_for_a_model_that_has_nothing_to_turn(engine: Worker, tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeError, match="RoPE"):
        engine.call(fed, model(tmp_path, name), rope_scaling_type=5, rope_freq_scale=0.25)


def fed(path: Path, **params: Any) -> None:
    with session(path, **params) as s:
        s.feed(tiny.tokens(10))
