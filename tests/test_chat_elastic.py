"""Chat on the patched engine: tables for files that were not extended, stages as they come, sessions that keep S."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from mrrope_gguf.extend import extend
from tests import tiny
from tests.chat import run
from tests.session_chat import BOOK

pytestmark = pytest.mark.engine
WINDOW = 512
OPTIONS = ("--temp", "0", "-n", "12", "-t", "1")
STAGE = re.compile(r"context grows at (\d+) tokens: S = ([\d.]+) -> ([\d.]+)")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("elastic") / "plain.gguf", n_ctx=WINDOW)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK * 3)
    return path


def said(done: object) -> str:
    text = str(getattr(done, "stderr").decode())  # noqa: B009
    assert getattr(done, "returncode") == 0, text  # noqa: B009
    assert getattr(done, "stdout")  # noqa: B009
    return text


def stages(text: str) -> list[tuple[int, float, float]]:
    return [(int(n), float(before), float(after)) for n, before, after in STAGE.findall(text)]


def test_a_document_longer_than_the_model(patched: Path, plain: Path, book: Path, tmp_path: Path) -> None:
    """It applies the table itself, from S = 1 on, and a session goes on at its S without a word of it."""
    first = run(plain, "-f", book, "-p", "one", "--session", "s", *OPTIONS, data=tmp_path / "a", lib=patched)
    text = said(first)
    assert "context: 4096 tokens, mrrope-uni to S = 8" in text
    grown = stages(text)
    assert grown[0][0] > WINDOW
    assert grown[0][1] == 1.0
    assert all(one[2] == two[1] for one, two in pairwise(grown))
    assert len(grown) >= 2
    assert f"S = {grown[-1][2]:g} of 8" in text
    second = run("-p", "two", "--session", "s", *OPTIONS, data=tmp_path / "a", lib=patched)
    text = said(second)
    assert "context: 4096 tokens, mrrope-uni to S = 8" in text
    assert "restored" in text
    assert "is read again" not in text
    # the whole in one process, as a program would have it
    other = run(plain, "-f", book, "-p", "one", "--session", "t", *OPTIONS, data=tmp_path / "b", lib=patched)
    both = run("-p", "two", "--session", "t", *OPTIONS, data=tmp_path / "b", lib=patched)
    assert (other.stdout, both.stdout) == (first.stdout, second.stdout)


def test_context_and_table_by_flags(patched: Path, plain: Path, book: Path, tmp_path: Path) -> None:
    by_context = run(plain, "-f", book, "-p", "x", "-c", "2048", "--method", "mrrope-pro", *OPTIONS, data=tmp_path,
                     lib=patched)  # fmt: skip
    assert "context: 2048 tokens, mrrope-pro to S = 4" in said(by_context)
    by_scale = run(plain, "-f", book, "-p", "x", "--scale", "6", *OPTIONS, data=tmp_path, lib=patched)
    assert "context: 3072 tokens, mrrope-uni to S = 6" in said(by_scale)
    within = said(run(plain, "-p", "x", "-c", "2048", *OPTIONS, data=tmp_path, lib=patched))
    assert not stages(within)
    assert "S = 1 of 4" in within
    unscaled = said(run(plain, "-p", "x", *OPTIONS, data=tmp_path, lib=patched))
    assert "S = " not in unscaled
    refused = run(plain, "-p", "x", "-c", "2048", "--scale", "2", *OPTIONS, data=tmp_path, lib=patched)
    assert refused.returncode == 1
    assert b"--scale 2 does not make 2048 tokens" in refused.stderr


def test_keys_that_cannot_be_rotated_get_a_static_table(patched: Path, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "m.gguf", "maincoder", n_ctx=WINDOW)
    text = said(run(model, "-p", "x", "-c", "1024", *OPTIONS, data=tmp_path, lib=patched))
    assert "the table is static, in effect from the first token on" in text
    assert "S = 2 of 2" in text


def test_extended_files(patched: Path, plain: Path, book: Path, tmp_path: Path) -> None:
    engine_file = extend(plain, tmp_path / "engine.gguf", scale=4, rendering="engine").path
    text = said(run(engine_file, "-f", book, "-p", "x", *OPTIONS, data=tmp_path, lib=patched))
    assert "512 tokens extended to 2048 (elastic mrrope-uni)" in text
    assert stages(text)
    stock = run(engine_file, "-f", book, "-p", "x", *OPTIONS, data=tmp_path)
    assert stock.returncode == 1
    assert stock.stdout == b""
    assert b"this file needs the patched engine" in stock.stderr
    portable = extend(plain, tmp_path / "portable.gguf", scale=4).path
    text = said(run(portable, "-f", book, "-p", "x", *OPTIONS, data=tmp_path))
    assert "table is static here" in text
    assert "S = 4 of 4" in text
