"""Files that are no language model, and headers with anything in them: a clear error, never one of Python's own."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrrope_gguf.architectures import architectures
from mrrope_gguf.errors import BadFile, MrropeError, Refused
from mrrope_gguf.facts import rope_facts
from mrrope_gguf.gguf.index import index_bytes
from mrrope_gguf.stored_table import stored_table
from tests import gguf_bytes as raw
from tests.stock_hparams import BASE


def header(*kvs: bytes) -> bytes:
    return raw.gguf(list(kvs))


def text(key: str, value: str) -> bytes:
    return raw.kv(key, raw.STRING, raw.string(value))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header(text("general.architecture", "llama"), text("general.type", "adapter")), "LoRA adapter"),
        (header(text("general.architecture", "clip"), text("general.type", "mmproj")), "projector"),
        (header(text("general.architecture", "clip")), "projector"),
        (header(text("general.type", "imatrix")), "importance matrix"),
        (
            header(raw.kv("split.no", raw.U16, b"\x01\x00"), raw.kv("split.count", raw.U16, b"\x03\x00")),
            "part 2 of a split model of 3 files",
        ),
        (header(text("general.architecture", "\x1b[31mfake")), r"unknown architecture '\\e\[31mfake'"),
    ],
)
def test_files_of_other_kinds_are_refused(content: bytes, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        rope_facts(index_bytes(content, "thing.gguf", len(content)))
    assert caught.value.why
    assert caught.value.fix


def test_no_architecture_at_all_is_a_bad_file() -> None:
    content = header(text("general.name", "x"))
    with pytest.raises(BadFile):
        rope_facts(index_bytes(content, "thing.gguf", len(content)))


KINDS = {raw.U32: "<I", raw.F32: "<f", raw.U64: "<Q", raw.BOOL: "<B", raw.I32: "<i"}
NAMES = ["context_length", "block_count", "attention.head_count", "attention.sliding_window", "embedding_length"]
NAMES += ["rope.dimension_count", "rope.freq_base", "rope.scaling.factor", "attention.sliding_window_pattern"]


@given(
    st.sampled_from(sorted(architectures())),
    st.dictionaries(
        st.sampled_from(NAMES), st.tuples(st.sampled_from(sorted(KINDS)), st.binary(min_size=8, max_size=8))
    ),
)
def test_any_scalar_under_any_key_gives_facts_or_a_clear_error(arch: str, keys: dict[str, tuple[int, bytes]]) -> None:
    values = {f"{arch}.{name}": (raw.U32, struct.pack("<II", value, 0)) for name, value in BASE.items()}
    values |= {f"{arch}.{name}": kind_and_bytes for name, kind_and_bytes in keys.items()}
    kvs = [raw.kv(key, kind, data[: struct.calcsize(KINDS[kind])]) for key, (kind, data) in values.items()]
    content = header(text("general.architecture", arch), *kvs)
    # nothing but our own errors may come out, and those explain themselves
    with suppress(MrropeError):
        assert rope_facts(index_bytes(content, "thing.gguf", len(content))).layers.extended


SURPRISES = ["split.no", "split.count", "general.type", "general.name", "general.file_type"]
SURPRISES += [f"llama.rope.scaling.mrrope.{word}" for word in ("radix", "base_factors", "method", "scale", "elastic")]


@pytest.mark.parametrize("kind", [raw.U16, raw.F32, raw.STRING, raw.ARRAY])
@pytest.mark.parametrize("key", SURPRISES)
def test_keys_of_a_surprising_type_raise_nothing_of_python_s_own(key: str, kind: int) -> None:
    values = {raw.STRING: raw.string("x"), raw.ARRAY: raw.strings("a", "b"), raw.U16: b"\1\0", raw.F32: b"\0\0\x80\x3f"}
    version = raw.kv("llama.rope.scaling.mrrope.version", raw.U32, raw.u32(1))
    basics = [raw.kv(f"llama.{name}", raw.U32, raw.u32(number)) for name, number in BASE.items()]
    content = header(text("general.architecture", "llama"), *basics, version, raw.kv(key, kind, values[kind]))
    index = index_bytes(content, "thing.gguf", len(content))
    with suppress(MrropeError):
        facts_of = rope_facts(index)
        assert stored_table(index, facts_of) is None
