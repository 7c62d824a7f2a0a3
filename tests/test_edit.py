"""What an edit changes and what it leaves alone, as the gguf package reads it."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrrope_gguf import revert
from mrrope_gguf.errors import BadFile, Refused
from mrrope_gguf.gguf.copy import BLOCK
from mrrope_gguf.gguf.edit import Edit, kv_record, padding_key
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.gguf.pieces import Layout, Rows, Span, reorder, tidy
from mrrope_gguf.gguf.rows import RowPermutation, row_rules, split_name
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.types import ValueType
from mrrope_gguf.gguf.undo import undo_key
from mrrope_gguf.gguf.write import write_new
from tests import edits
from tests.edits import HEAD_ORDER, HEADS, Raw, model, plain_extension, records, tensors, write
from tests.gguf_bytes import kv

OURS = (undo_key("llama"), padding_key("llama"), padding_key("llama", 2))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.gguf", model())


def edited(source: Path, *, name: str = "out.gguf", **how: Any) -> Path:
    return write_new(plain_extension(source, **how), source.with_name(name)).path


@pytest.mark.parametrize("tensor", [True, False])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_every_untouched_byte_is_the_same(tmp_path: Path, alignment: int, tensor: bool) -> None:
    source = write(tmp_path / "source.gguf", model(alignment=alignment))
    before, after = records(source), records(edited(source, tensor=tensor))
    changed = {"llama.context_length", "general.name"}
    assert {k: v for k, v in after.items() if k in before and k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    added = {"llama.rope.scaling.mrrope.method", "llama.rope.scaling.mrrope.radix", *OURS}
    assert after.keys() - before.keys() == added
    old, new = tensors(source), tensors(source.with_name("out.gguf"))
    if tensor:
        assert new.pop("rope_freqs.weight") == (0, (128,), hashlib.sha256(edits.FACTORS).hexdigest())
    assert new == old


def test_records_keep_their_order_and_new_ones_join_their_family(source: Path) -> None:
    keys = list(records(edited(source)))
    old = list(records(source))
    assert [k for k in keys if k in old] == old
    assert keys.index("llama.rope.scaling.mrrope.method") == keys.index("llama.empty") + 1
    assert keys.index(undo_key("llama")) < keys.index("tokenizer.ggml.tokens")
    assert keys[-1] == padding_key("llama", 2)


def test_a_new_tensor_is_the_first(source: Path) -> None:
    reader = GGUFReader(edited(source))
    assert [t.name for t in reader.tensors][:2] == ["rope_freqs.weight", "token_embd.weight"]
    assert int(reader.tensors[0].data_offset) == reader.data_offset


def test_two_new_tensors_keep_their_order(source: Path) -> None:
    with Source.open(source) as opened:
        edit = Edit(opened)
        edit.insert_tensor("rope_factors_long.weight", (3,), 0, b"l" * 12)
        edit.insert_tensor("rope_factors_short.weight", (3,), 0, b"s" * 12)
        out = write_new(edit, source.with_name("out.gguf")).path
    first, second = GGUFReader(out).tensors[:2]
    assert (first.name, first.data.tobytes()) == ("rope_factors_long.weight", b"l" * 12)
    assert (second.name, second.data.tobytes()) == ("rope_factors_short.weight", b"s" * 12)


@pytest.mark.parametrize("alignment", [8, 32, 256, 4096, 16384])
@pytest.mark.parametrize("tensor", [True, False])
def test_what_is_large_moves_by_whole_blocks(tmp_path: Path, alignment: int, tensor: bool) -> None:
    source = write(tmp_path / "source.gguf", model(alignment=alignment))
    with open_gguf(source) as old, open_gguf(edited(source, tensor=tensor)) as new:
        last = list(old.tensors)[-1]
        was = old.data_start + old.tensors[last].offset
        assert (new.data_start + new.tensors[last].offset - was) % max(BLOCK, alignment) == 0
        words = "tokenizer.ggml.tokens"
        assert (new.kvs[words].start - old.kvs[words].start) % max(BLOCK, alignment) == 0
        for key in OURS[1:]:
            assert new.kvs[key].count == 1
            assert len(new.get(key)) < max(BLOCK, alignment)


def test_a_small_vocabulary_needs_no_padding_of_its_own(tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf", model(n_vocab=10))
    assert padding_key("llama") not in records(edited(source))


def test_rows_are_reordered_within_heads_and_nothing_else(source: Path) -> None:
    before = {t.name: t for t in GGUFReader(source).tensors}
    after = {t.name: t for t in GGUFReader(edited(source, permute=True)).tensors}
    for name, tensor in before.items():
        expected = np.frombuffer(tensor.data.tobytes(), np.uint8)
        if "attn" in name:
            expected = expected.reshape(4, 8, -1)[:, HEAD_ORDER].ravel()
            assert expected.tobytes() != tensor.data.tobytes()
        assert after[name].data.tobytes() == expected.tobytes(), name


def test_replaced_data_is_the_only_data_that_changes(source: Path) -> None:
    with Source.open(source) as opened:
        edit = Edit(opened)
        edit.replace_tensor("blk.1.attn_q.bias", b"\7" * 128)
        with pytest.raises(ValueError, match="128 bytes"):
            edit.replace_tensor("blk.1.attn_q.bias", b"short")
        with pytest.raises(ValueError, match="replaced already"):
            edit.permute_rows("blk.1.attn_q.bias", HEADS)
        out = write_new(edit, source.with_name("out.gguf")).path
    old, new = tensors(source), tensors(out)
    assert {name for name in old if old[name] != new[name]} == {"blk.1.attn_q.bias"}
    assert new["blk.1.attn_q.bias"][2] == hashlib.sha256(b"\7" * 128).hexdigest()


def test_the_original_is_seen_through_every_edit(source: Path) -> None:
    out = edited(source, permute=True)
    with Source.open(out) as opened, open_gguf(source) as original:
        assert opened.was_extended
        assert opened.index.get("llama.context_length") == 64
        assert list(opened.index.kvs.values()) == list(original.kvs.values())
        assert opened.index.tensors == original.tensors
        for name in original.tensors:
            assert opened.index.tensor_bytes(name) == original.tensor_bytes(name)


def test_renamed_keys_keep_their_values(source: Path) -> None:
    with Source.open(source) as opened:
        edit = Edit(opened)
        edit.set("general.architecture", ValueType.STRING, "qwen2")
        for key in [k for k in edit.index.kvs if k.startswith("llama.")]:
            edit.rename_key(key, key.replace("llama.", "qwen2."))
        edit.set("qwen2.context_length", ValueType.UINT32, 256)
        edit.set("general.tags", ValueType.ARRAY, ["x"], ValueType.STRING)
        edit.rename_key("general.tags", "general.labels")
        with pytest.raises(ValueError, match="there is none"):
            edit.rename_key("llama.nothing", "x")
        with pytest.raises(ValueError, match="that exists"):
            edit.rename_key("general.name", "general.labels")
        out = write_new(edit, source.with_name("out.gguf")).path
    reader = GGUFReader(out)
    assert reader.fields["qwen2.context_length"].contents() == 256
    assert reader.fields["qwen2.rope.freq_base"].contents() == 10000.0
    assert reader.fields["general.labels"].contents() == ["x"]
    assert undo_key("qwen2") in reader.fields
    assert not any(key.startswith("llama.") for key in reader.fields)


def test_keys_that_read_alike_up_to_a_nul_are_one(tmp_path: Path) -> None:
    """llama.cpp takes the first, so that one is replaced; an other one must not come to life behind it."""
    raw = model(n_vocab=10)
    twin = kv("llama.context_length\0x", 4, struct.pack("<I", 128))
    raw.kvs = [raw.kvs[0], twin, *raw.kvs[1:], edits.text("llama.kind\0", "a"), edits.text("llama.kind", "b")]
    source = write(tmp_path / "a.gguf", raw)
    with Source.open(source) as opened:
        edit = Edit(opened)
        assert edit.index.get("llama.context_length") == 128
        edit.set("llama.context_length", ValueType.UINT32, 256)
        edit.remove("llama.kind")
        edit.rename_key("llama.rope.freq_base", "llama.base")
        out = write_new(edit, tmp_path / "b.gguf").path
    with open_gguf(out) as index:
        assert [k for k in index.kvs if k.startswith("llama.context")] == ["llama.context_length"]
        assert (index.get("llama.context_length"), index.get("llama.kind")) == (256, None)
    assert revert(out, tmp_path / "c.gguf").path.read_bytes() == source.read_bytes()


def test_setting_what_is_there_already_changes_nothing(source: Path) -> None:
    with Source.open(source) as opened:
        edit = Edit(opened)
        edit.set("llama.context_length", ValueType.UINT32, 64)
        edit.remove("no.such.key")
        assert len(edit.plan().kvs) == len(edit.index.kvs) + len(OURS)
        assert edit.keys_set == ["llama.context_length"]


def test_what_an_edit_refuses(source: Path) -> None:
    with Source.open(source) as opened:
        edit = Edit(opened)
        with pytest.raises(ValueError, match="alignment"):
            edit.set("general.alignment", ValueType.UINT32, 64)
        with pytest.raises(ValueError, match="already"):
            edit.insert_tensor("token_embd.weight", (1,), 0, b"1234")
        with pytest.raises(ValueError, match="does not hold 32 rows"):
            edit.permute_rows("token_embd.weight", HEADS)
        with pytest.raises(ValueError, match="UINT8"):
            edit.set("llama.x", ValueType.UINT8, 256)
        with pytest.raises(ValueError, match="type for its items"):
            edit.set("llama.x", ValueType.ARRAY, [1])
        with pytest.raises(KeyError):
            edit.permute_rows("nothing", HEADS)


def test_a_foreign_key_of_our_name_is_refused(tmp_path: Path) -> None:
    raw = model()
    raw.kvs.append(edits.text(padding_key("llama"), "   "))
    with Source.open(write(tmp_path / "a.gguf", raw)) as opened, pytest.raises(BadFile, match="already holds"):
        Edit(opened).plan()


@pytest.mark.parametrize(
    ("kind", "value", "item"),
    [
        (ValueType.UINT8, 255, None),
        (ValueType.INT8, -128, None),
        (ValueType.UINT16, 65535, None),
        (ValueType.INT16, -5, None),
        (ValueType.UINT32, 2**32 - 1, None),
        (ValueType.INT32, -(2**31), None),
        (ValueType.FLOAT32, 1.5, None),
        (ValueType.BOOL, True, None),
        (ValueType.STRING, "caf\xe9 \u4e2d", None),
        (ValueType.UINT64, 2**64 - 1, None),
        (ValueType.INT64, -(2**63), None),
        (ValueType.FLOAT64, 0.1, None),
        (ValueType.ARRAY, [1, 2, 3], ValueType.INT32),
        (ValueType.ARRAY, ["a", ""], ValueType.STRING),
        (ValueType.ARRAY, [True, False], ValueType.BOOL),
    ],
)
def test_values_read_back(tmp_path: Path, kind: ValueType, value: Any, item: ValueType | None) -> None:
    source = write(tmp_path / "source.gguf", Raw([edits.text("general.architecture", "llama")], [("t", (8,), "F32")]))
    with Source.open(source) as opened:
        edit = Edit(opened)
        edit.set("llama.value", kind, value, item)
        out = write_new(edit, tmp_path / "out.gguf").path
    assert GGUFReader(out).fields["llama.value"].contents() == value
    with open_gguf(out) as index:
        assert index.get("llama.value") == value


@pytest.mark.parametrize("heads", [(1, 2, 2), (3, 8, 8), (2, 4, 10)])
def test_permutations_match_their_definition(heads: tuple[int, int, int]) -> None:
    n_head, n_rot, head_dim = heads
    order = RowPermutation(n_head, n_rot, head_dim).order
    for i in range(n_rot // 2):
        assert order[2 * i] == i
        assert order[2 * i + 1] == i + n_rot // 2
    assert order[n_rot:] == tuple(range(n_rot, head_dim))
    inverse = RowPermutation(n_head, n_rot, head_dim).inverse
    assert [order[i] for i in inverse] == list(range(head_dim))


@pytest.mark.parametrize("wrong", [(0, 4, 4), (1, 3, 4), (1, 6, 4), (1, 0, 4)])
def test_impossible_heads_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no such heads"):
        RowPermutation(*wrong)
    with pytest.raises(ValueError, match="no row permutation"):
        RowPermutation(1, 2, 2, "sideways")


def test_layers_become_ranges() -> None:
    names = [f"blk.{i}.attn_q.weight" for i in (0, 1, 2, 7)] + ["output.weight", "blk.01.attn_q.weight"]
    rules = row_rules(dict.fromkeys(names, HEADS))
    assert rules == [
        ["blk.{}.attn_q.weight", [[0, 2], [7, 7]], 4, 6, 8],
        ["output.weight", [[-1, -1]], 4, 6, 8],
        ["blk.01.attn_q.weight", [[-1, -1]], 4, 6, 8],
    ]
    assert split_name("a{}1") == ("a{}1", -1)


def test_one_tensor_may_not_lie_in_two_shards(tmp_path: Path) -> None:
    first, _ = split_files(tmp_path, ["a.weight"], ["rope_freqs.weight"])
    with Source.open(first) as opened, pytest.raises(Refused, match="belongs in shard 1"):
        Edit(opened).insert_tensor("rope_freqs.weight", (1,), 0, b"1234")


def split_files(directory: Path, *shards: list[str]) -> list[Path]:
    out = []
    for i, names in enumerate(shards):
        kvs = [edits.text("general.architecture", "llama")] if i == 0 else []
        kvs += [kv("split.no", 2, struct.pack("<H", i)), kv("split.count", 2, struct.pack("<H", 2))]
        kvs += [kv("split.tensors.count", 5, struct.pack("<i", sum(map(len, shards))))]
        raw = Raw(kvs, [(name, (8,), "F32") for name in names])
        out.append(write(directory / f"m-{i + 1:05d}-of-{len(shards):05d}.gguf", raw))
    return out


# -- pieces ------------------------------------------------------------------------------------------------------------

BELOW = bytes(range(200))


def resolve(pieces: list[Any], below: bytes) -> bytes:
    out = b""
    for piece in pieces:
        if isinstance(piece, bytes):
            out += piece
        elif isinstance(piece, Span):
            out += below[piece.start : piece.end]
        else:
            out += reorder(below[piece.start : piece.end], piece.row_bytes, piece.order)
    return out


@st.composite
def layouts(draw: st.DrawFn, size: int) -> list[Any]:
    """Pieces of a file of `size` bytes in which every multiple of 24 starts a piece, as tensors do."""
    out: list[Any] = []
    for start in range(0, size // 24 * 24, 24):
        kind = draw(st.sampled_from(["span", "rows2", "rows4", "bytes"]))
        order = tuple(draw(st.permutations(range({"rows2": 2, "rows4": 4}.get(kind, 1)))))
        if kind == "bytes":
            out.append(draw(st.binary(min_size=24, max_size=24)))
        else:
            out.append(Rows(start, start + 24, 3, order) if "rows" in kind else Span(start, start + 24))
    return out


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lower=layouts(192), upper=layouts(192), start=st.integers(0, 8), end=st.integers(0, 8))
def test_layouts_compose(lower: list[Any], upper: list[Any], start: int, end: int) -> None:
    middle = resolve(lower, BELOW)
    layout = Layout(lower)
    assert resolve(layout.under(upper), BELOW) == resolve(upper, middle)
    assert (
        resolve(layout.slice(24 * min(start, end), 24 * max(start, end)), BELOW)
        == (middle[24 * min(start, end) : 24 * max(start, end)])
    )


def test_a_permutation_and_its_inverse_leave_a_span() -> None:
    rows = Rows(0, 64, 2, HEADS.order)
    assert Layout([rows]).under([Rows(0, 64, 2, HEADS.inverse)]) == [Span(0, 64)]


def test_what_cannot_be_cut_or_composed_is_refused() -> None:
    layout = Layout([Rows(0, 24, 3, (1, 0)), b"abc"])
    with pytest.raises(ValueError, match="inside a group"):
        layout.slice(0, 5)
    with pytest.raises(ValueError, match="28 of a file of 27"):
        layout.slice(0, 28)
    with pytest.raises(ValueError, match="more than one piece"):
        layout.under([Rows(0, 27, 3, (0,))])
    with pytest.raises(ValueError, match="rows of 6 bytes over rows of 3"):
        layout.under([Rows(0, 24, 6, (1, 0))])
    assert tidy([b"", Span(3, 3)]) == []


def test_a_record_is_laid_out_as_the_format_says() -> None:
    assert kv_record("k", ValueType.ARRAY, [1, 2], ValueType.UINT8) == (
        struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2) + b"\1\2"
    )
