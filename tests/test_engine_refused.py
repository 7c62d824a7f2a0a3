"""A table that a context cannot take is refused with the reason, and the context is as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.errors import EngineTrouble, MrropeError, Refused
from tests import tiny
from tests.engine_models import model
from tests.engine_session import Table, session
from tests.engine_worker import Worker
from tests.test_engine_rerotate import pair, table

pytestmark = pytest.mark.engine


def refused(path: Path, tables: list[Table], fed: int = 30, **settings: Any) -> tuple[list[MrropeError], bool]:
    """What each table raises after `fed` tokens, and whether keys and logits stayed the same to the bit."""
    errors: list[MrropeError] = []
    with session(path, **settings) as s:
        before = (s.feed(tiny.tokens(fed)), s.peek(), s.state()) if fed else None
        for wanted in tables:
            try:
                s.set(wanted)
            except MrropeError as err:
                errors.append(err)
        if before is None:
            return errors, True
        same = s.state() == before[2] and np.array_equal(s.peek(), before[1], equal_nan=True)
        s.clear()
        return errors, same and np.array_equal(s.feed(tiny.tokens(fed)), before[0], equal_nan=True)


ONES = [1.0] * 8
BAD: dict[str, tuple[Table, str]] = {
    "too few": ((ONES[:7], 1.0), "7 were given, and a table of this model has 8"),
    "too many": ((ONES * 2, 1.0), "16 were given, and a table of this model has 8"),
    "none": (([], 1.0), "0 factors"),
    "nan": (([*ONES[:7], math.nan], 1.0), "factors[7] = nan"),
    "inf": (([math.inf, *ONES[:7]], 1.0), "factors[0] = inf"),
    "zero": (([1.0, 0.0, *ONES[:6]], 1.0), "factors[1] = 0.0"),
    "negative": (([-1.0, *ONES[:7]], 1.0), "factors[0] = -1.0"),
    "under float32": (([1e-60, *ONES[:7]], 1.0), "factors[0] = 1e-60"),
    "attn nan": ((ONES, math.nan), "attn_factor = nan"),
    "attn zero": ((ONES, 0.0), "attn_factor = 0.0"),
    "attn negative": ((ONES, -1.0), "attn_factor = -1.0"),
    "attn inf": ((ONES, math.inf), "attn_factor = inf"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_table_changes_nothing(engine: Worker, tmp_path: Path, kind: str) -> None:
    bad, reason = BAD[kind]
    errors, same = engine.call(refused, model(tmp_path, "llama"), [bad])
    assert [type(error) for error in errors] == [Refused]
    assert reason in errors[0].why
    assert errors[0].fix
    assert same


def test_a_bad_table_after_a_good_one(engine: Worker, tmp_path: Path) -> None:
    path, a = model(tmp_path, "llama"), table()
    errors, same = engine.call(refused, path, [BAD["nan"][0], BAD["too few"][0]], table=a)
    assert len(errors) == 2
    assert same


@pytest.mark.parametrize(
    ("name", "n_rot", "words"),
    [("gpt2", 16, "RoPE"), ("cohere2", 16, "attend to everything")],
)
def test_models_that_have_nothing_to_turn(engine: Worker, tmp_path: Path, name: str, n_rot: int, words: str) -> None:
    for fed in (0, 30):
        errors, same = engine.call(refused, model(tmp_path, name), [table(n_rot=n_rot)], fed)
        assert [type(error) for error in errors] == [Refused]
        assert words in errors[0].why
        assert same


@pytest.mark.parametrize(("name", "words"), [("maincoder", "norm"), ("hunyuan-dense", "norm"), ("qwen2vl", "M-RoPE")])
def test_keys_that_cannot_be_turned_again(engine: Worker, tmp_path: Path, name: str, words: str) -> None:
    path, (a, b) = model(tmp_path, name), pair()
    errors, same = engine.call(refused, path, [a], 30)
    assert [type(error) for error in errors] == [Refused]
    assert words in errors[0].why
    assert "clear" in errors[0].fix
    assert same
    # an empty cache holds nothing to turn
    assert engine.call(refused, path, [a, b], 0)[0] == []


def test_stock_says_what_is_missing(stock: Worker, tmp_path: Path) -> None:
    errors, same = stock.call(refused, model(tmp_path, "llama"), [table(), None])
    assert [type(error) for error in errors] == [EngineTrouble, EngineTrouble]
    assert "mrrope build" in errors[0].fix
    assert same
