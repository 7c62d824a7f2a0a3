"""The architecture table: complete, consistent, and the page made from it current."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mrrope_gguf.architectures import GROUPS, architecture, architectures
from tools import architecture_table, check_architectures


def test_every_architecture_of_the_gguf_package_that_llama_cpp_runs_is_known() -> None:
    """The package is released apart from the pinned llama.cpp, so its list is a second witness, not the pin's."""
    gguf = pytest.importorskip("gguf")
    assert [name for name in gguf.MODEL_ARCH_NAMES.values() if architecture(name) is None] == []


def test_groups_say_what_the_flags_say() -> None:
    for arch in architectures().values():
        assert arch.group in GROUPS
        assert arch.portable == (arch.group == "A"), arch.name
        assert not arch.longrope or arch.group in "AB", arch.name
        assert (arch.rope == "none") == (arch.group == "H"), arch.name
        assert not arch.leak or (arch.portable and arch.swa), arch.name
        assert arch.static_only or arch.rope not in ("mrope", "imrope"), arch.name


@pytest.mark.parametrize(
    ("name", "group", "rope", "swa", "static"),
    [
        ("llama", "A", "norm", "", False),
        ("qwen2", "E", "neox", "", False),
        ("phi3", "B", "neox", "", False),
        ("falcon-h1", "C", "neox", "", False),
        ("deepseek", "D", "norm", "", False),
        ("gemma3", "F", "neox", "own-base", False),
        ("afmoe", "F", "neox", "only", False),
        ("deepseek2", "G", "norm", "", False),
        ("qwen2vl", "E", "mrope", "", True),
        ("maincoder", "E", "norm", "", True),
        ("bert", "H", "none", "", False),
    ],
)
def test_some_rows(name: str, group: str, rope: str, swa: str, static: bool) -> None:
    arch = architecture(name)
    assert arch is not None
    assert (arch.group, arch.rope, arch.swa, arch.static_only) == (group, rope, swa, static)


def test_a_note_may_hold_words_that_are_flags_elsewhere() -> None:
    arch = architecture("gemma3")
    assert arch is not None
    assert not arch.portable
    assert architecture("nonsense") is None


def test_the_page_is_current() -> None:
    assert architecture_table.PATH.read_text(encoding="utf-8") == architecture_table.text(), (
        "run: python -m tools.architecture_table"
    )


def test_the_table_agrees_with_the_sources_of_llama_cpp() -> None:
    tree = os.environ.get("MRROPE_LLAMA_SOURCE")
    if not tree:
        pytest.skip("MRROPE_LLAMA_SOURCE names no llama.cpp tree")
    assert check_architectures.check(Path(tree)) == []
