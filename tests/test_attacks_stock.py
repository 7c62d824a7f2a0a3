"""docs/attacks.md is what it would be if it were made now, and what stock llama.cpp refuses we refuse."""

from __future__ import annotations

import sys

import pytest

from tests.attacks.table import PAGE, Stock, disagreements, page, stock_verdicts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and fork as Linux has them"),
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stock]:
    return stock_verdicts(tmp_path_factory.mktemp("stock"))


def test_what_stock_refuses_we_refuse(stock: dict[str, Stock]) -> None:
    assert list(disagreements(stock)) == []


def test_a_disagreement_would_be_found(stock: dict[str, Stock]) -> None:
    wrong = stock | {"magic-zip": Stock("accepts", "accepts"), "split-prefix-dots": Stock("accepts", "aborts")}
    assert [line.partition(":")[0] for line in disagreements(wrong)] == ["magic-zip", "split-prefix-dots"]


def test_the_page_is_true(stock: dict[str, Stock]) -> None:
    assert page(stock) == PAGE.read_text(encoding="utf-8"), "python -m tests.attacks"
