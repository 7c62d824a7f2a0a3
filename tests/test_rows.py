"""Rules for rows, edits of many keys, long arrays, tokens: linear, whatever a file holds.

CPU times here are tens of times what it takes, and a tenth of what it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import reexpress, vocab
from mrrope_gguf.errors import BadFile, Refused
from mrrope_gguf.facts import read_facts
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.index import index_bytes
from mrrope_gguf.gguf.pieces import Layout, Rows, Span, tidy
from mrrope_gguf.gguf.rows import MAX_RUNS, RowPermutation, RowRules, row_rules
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.undo import Undo, encode
from mrrope_gguf.metadata import write_provenance
from mrrope_gguf.tables import rope_table
from tests.attacks.sound import Parts, llama
from tests.attacks.table_cases import extended
from tests.gguf_bytes import ARRAY, STRING, U8, U32, array, string, strings, u32

MANY = 60_000


def cpu(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def test_a_rule_is_found_by_template_and_range() -> None:
    wide, narrow = RowPermutation(4, 6, 8), RowPermutation(2, 4, 4)
    made = {f"blk.{i}.attn_q.weight": wide for i in (0, 1, 2, 7)} | {"blk.5.attn_q.weight": narrow, "x": narrow}
    rules = RowRules(row_rules(made))
    assert {name: rules.of(name) for name in made} == made
    absent = ("blk.3.attn_q.weight", "blk.6.attn_q.weight", "blk.8.attn_q.weight", "blk.0.attn_k.weight", "y", "blk")
    assert [rules.of(name) for name in absent] == [None] * len(absent)
    assert not RowRules([])


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([["a", [[0, 5], [5, 6]], 1, 2, 2]], "for one tensor"),
        ([["a", [[0, 5]], 1, 2, 2], ["a", [[3, 3]], 1, 4, 4]], "for one tensor"),
        ([[7, [[0, 5]], 1, 2, 2]], "no name and numbers"),
        ([["a", [[0, 5]], 1, 2.0, 2]], "no name and numbers"),
        ([["a", [], 1, 2, 2]] * (MAX_RUNS + 1), "more than 16384"),
        ([["a", [[0, 0]] * (MAX_RUNS + 1), 1, 2, 2]], "more than 16384"),
        ([["a", [[i, i]], 1, 2 * i + 2, 2**16] for i in range(3)], "3 kinds of heads"),
    ],
)
def test_rules_that_no_writer_makes_are_refused(rules: list[Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RowRules(rules)


def test_as_many_rules_as_a_record_may_hold_are_written_and_read() -> None:
    rows = [["a", [[2 * i, 2 * i] for i in range(MAX_RUNS)], 1, 2, 2]]
    assert RowRules(rows).of("a") is None
    encode(Undo(0, "", 0, 0, rows=rows))
    with pytest.raises(Refused, match="too many tensors") as caught:
        encode(Undo(0, "", 0, 0, rows=[*rows, ["b", [[0, 0]], 1, 2, 2]]))
    assert "16385" in caught.value.why


def test_orders_of_rows_are_looked_at_once() -> None:
    order, other = (*range(1, 2**16), 0), tuple(range(2**16))
    below = Layout([Rows(i << 16, i + 1 << 16, 1, other) for i in range(4000)])  # their own order: no piece is left
    assert below.pieces == [Span(0, 4000 << 16)]
    moved = [Rows(i << 16, i + 1 << 16, 1, order) for i in range(4000)]
    assert cpu(lambda: tidy(moved)) < 2
    twice = Layout(moved).under(moved)
    assert len(twice) == 4000
    assert {id(piece.order) for piece in twice if isinstance(piece, Rows)} == {id(twice[0].order)}  # type: ignore[union-attr]
    assert twice[0].order[:2] == (2, 3)  # type: ignore[union-attr]


def test_orders_that_do_not_fit_the_tensor_are_not_made() -> None:
    below = Layout([Rows(0, 65536, 1, (*range(1, 2**16), 0))])
    with pytest.raises(ValueError, match="do not divide"):
        below.under([Rows(0, 65536, 1, (2, 0, 1))])


def opened(parts: Parts, folder: Path) -> Source:
    (folder / "m.gguf").write_bytes(parts.data)
    return Source.open(folder / "m.gguf")


def test_many_base_models_are_removed_at_once(tmp_path: Path) -> None:
    parts = llama()
    for i in range(MANY):
        parts.put(f"general.base_model.{i}.x", U8, b"\0")
    with opened(parts, tmp_path) as source:
        edit = Edit(source)
        table = rope_table("mrrope-uni", n_rot=16, freq_base=1e4, n_ctx_orig=1024, scale=2)
        assert cpu(lambda: write_provenance(edit, source.index, table, 2048)) < 10
        kept = [key for key, _, _ in edit.plan().kvs if key.startswith("general.base_model.")]
        assert kept == ["general.base_model.count", "general.base_model.0.name"]


def test_many_keys_are_renamed_at_once(tmp_path: Path) -> None:
    parts = llama("qwen2")
    for i in range(MANY):
        parts.put(f"qwen2.x{i}", U8, b"\0")
    with opened(parts, tmp_path) as source:
        edit, found = Edit(source), reexpress.target(source.index)
        assert found is not None
        assert cpu(lambda: found.apply(edit, source.index)) < 10
        with pytest.raises(ValueError, match="that exists"):
            edit.rename_key("llama.x0", "llama.x1")
        with pytest.raises(ValueError, match="there is none"):
            edit.rename_key("qwen2.x0", "llama.y")


def peak(work: Callable[[], Any]) -> int:
    import tracemalloc

    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_long_arrays_are_read_as_far_as_they_matter() -> None:
    """Each was read whole into a list, and some were printed."""
    n, items = 1 << 20, array(U32, 1 << 20, u32(3 * 10**9) * (1 << 20))
    experts = llama("qwen2")
    experts.put("qwen2.expert_count", ARRAY, items)
    index = index_bytes(experts.data, "m.gguf")
    assert peak(lambda: reexpress.why_not(index)) < n
    assert "it holds qwen2.expert_count" in str(reexpress.why_not(index))
    factors = extended()
    factors.put("llama.rope.scaling.mrrope.base_factors", ARRAY, items)
    factors.put("llama.rope.scaling.mrrope.radix", ARRAY, strings(*["x" * n] * 4))
    for i in range(500):
        factors.put(f"llama.rope.scaling.mrrope.x{i}", ARRAY, array(U8, 8192, bytes(8192)))
    index = index_bytes(factors.data, "m.gguf")

    def read() -> None:
        with pytest.raises(BadFile, match="base_factors"):
            read_facts(index)

    assert index.kvs
    assert peak(read) < 2 * n


@pytest.mark.parametrize("token", ["<0x41>", "a", "\1\0\0\0\0\0\0\0a"])
def test_tokens_for_bytes_are_looked_for_in_one_pass(token: str) -> None:
    n = (4 << 20) // (8 + len(token))
    parts = llama()
    parts.put("tokenizer.ggml.tokens", ARRAY, array(STRING, n, string(token) * n))
    parts.tensors["token_embd.weight"] = ((0, n), 0, b"")
    index = index_bytes(parts.data, "m.gguf")

    def check() -> None:
        with pytest.raises(BadFile, match="could not use this vocabulary") as caught:
            vocab.check(index)
        assert "byte 0x00" in caught.value.why

    assert cpu(check) < 2


def test_tokens_for_bytes_are_found_wherever_they_lie() -> None:
    """Also across the edges of what is read at once, and one within another."""
    for fill in range(40):
        parts = llama()
        pieces = ["x" * (16000 + fill * 12), *(f"<0x{b:02X}>" for b in range(256) if b != 0x41), "A"]
        parts.put("tokenizer.ggml.tokens", ARRAY, strings(*pieces))
        parts.tensors["token_embd.weight"] = ((0, len(pieces)), 0, b"")
        vocab.check(index_bytes(parts.data, "m.gguf"))
        parts.put("tokenizer.ggml.tokens", ARRAY, strings(*pieces[:-1], "B"))
        with pytest.raises(BadFile) as caught:
            vocab.check(index_bytes(parts.data, "m.gguf"))
        assert "byte 0x41" in caught.value.why


def test_more_keys_than_llama_cpp_reads_in_a_second_are_not_handed_to_it() -> None:
    parts = llama()
    held = len(parts.kvs)
    for i in range(4096 - held):
        parts.put(f"k{i}", U8, b"\0")
    vocab.check(index_bytes(parts.data, "m.gguf"))
    parts.put("k", U8, b"\0")
    with pytest.raises(BadFile, match="more metadata than any model") as caught:
        vocab.check(index_bytes(parts.data, "m.gguf"))
    assert "4097 records, at most 4096" in caught.value.why
