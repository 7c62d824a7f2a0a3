"""Whatever was done to a file, the original comes back byte for byte, or the record is refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrrope_gguf import revert
from mrrope_gguf.errors import BadFile, FileTrouble, MrropeError, Refused
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.undo import undo_key
from mrrope_gguf.gguf.write import write_in_place, write_new
from tests import edits
from tests.edits import Raw, Wish, files, model, plain_extension, sha256, wishes, write

fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small files are written here, and none has to outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def edited(path: Path, dst: Path, wish: Wish) -> Path:
    with Source.open(path) as source:
        return write_new(wish.apply(Edit(source)), dst, force=True).path


@fast
@given(raw=files, first=wishes, second=wishes)
def test_gives_any_original_back_and_never_stacks(tmp_path: Path, raw: Raw, first: Wish, second: Wish) -> None:
    source = write(tmp_path / "a.gguf", raw)
    one = edited(source, tmp_path / "one.gguf", first)
    two = edited(one, tmp_path / "two.gguf", second)
    fresh = edited(source, tmp_path / "fresh.gguf", second)
    assert two.read_bytes() == fresh.read_bytes()  # an extended file is extended as if it were its original
    for path in (one, two):
        revert(path, tmp_path / "back.gguf", force=True)
        assert (tmp_path / "back.gguf").read_bytes() == raw.build()


@fast
@given(raw=files, first=wishes, second=wishes)
def test_gives_any_original_back_in_place(tmp_path: Path, raw: Raw, first: Wish, second: Wish) -> None:
    path = write(tmp_path / "a.gguf", raw)
    for wish in (first, second):
        with Source.open(path) as source:
            write_in_place(wish.apply(Edit(source)))
    revert(path)
    assert path.read_bytes() == raw.build()
    assert edits.left_in(tmp_path) == {"a.gguf"}


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    source = write(tmp_path / "source.gguf", model())
    with Source.open(source) as opened:
        return write_new(edits.extended(Edit(opened), permute=True), tmp_path / "extended.gguf").path


def test_without_a_destination_it_replaces_the_file(extended: Path) -> None:
    extended.chmod(0o640)
    report = revert(extended)
    assert report.path == extended
    assert report.how.startswith("in-place")
    assert sha256(extended) == sha256(extended.with_name("source.gguf"))
    assert extended.stat().st_mode & 0o777 == 0o640


def test_keeps_an_existing_destination(extended: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileTrouble, match="exists"):
        revert(extended, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_refuses_a_file_that_was_not_extended(tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf", model())
    with pytest.raises(Refused, match="no undo record"):
        revert(source)
    assert sha256(source) == sha256(write(tmp_path / "again.gguf", model()))


def flip(path: Path, offset: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


@fast
@given(where=st.floats(0, 0.9999), mask=st.integers(1, 255))
def test_a_damaged_record_is_refused_or_harmless(tmp_path: Path, where: float, mask: int) -> None:
    source = write(tmp_path / "source.gguf", model(n_layer=1, n_vocab=10))
    path = write_new(plain_extension(source, permute=True), tmp_path / "extended.gguf", force=True).path
    with open_gguf(path) as index:
        record = index.kvs[undo_key("llama")]
    flip(path, record.value + 8 + int(where * (record.end - record.value - 8)), mask)
    damaged = path.read_bytes()
    try:
        revert(path, tmp_path / "back.gguf", force=True)
    except (BadFile, Refused):
        assert path.read_bytes() == damaged
        assert not (tmp_path / "back.gguf").exists()
    else:
        assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()
        (tmp_path / "back.gguf").unlink()


@fast
@given(where=st.floats(0, 0.9999), mask=st.integers(1, 255))
def test_a_changed_header_is_refused_or_harmless(tmp_path: Path, where: float, mask: int) -> None:
    source = write(tmp_path / "source.gguf", model(n_layer=1, n_vocab=10))
    path = write_new(plain_extension(source), tmp_path / "extended.gguf", force=True).path
    with open_gguf(path) as index:
        flip(path, int(where * index.data_start), mask)
    try:
        revert(path, tmp_path / "back.gguf", force=True)
    except MrropeError:
        assert not (tmp_path / "back.gguf").exists()
    else:
        assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()
        (tmp_path / "back.gguf").unlink()


def test_another_value_in_the_header_is_refused_at_once(extended: Path) -> None:
    with open_gguf(extended) as index:
        flip(extended, index.kvs["llama.rope.freq_base"].value, 1)
    with pytest.raises(BadFile, match="damaged") as error:
        Source.open(extended)
    assert "sha256" in error.value.why


def test_a_truncated_or_grown_file_is_refused(extended: Path, tmp_path: Path) -> None:
    with open(extended, "ab") as file:
        file.write(b"more")
    with pytest.raises(BadFile, match="damaged") as error:
        revert(extended, tmp_path / "back.gguf")
    assert "the original had" in error.value.why
    assert not (tmp_path / "back.gguf").exists()


def test_a_record_of_a_newer_version_is_refused(extended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrrope_gguf.gguf.undo.VERSION", 0)
    with pytest.raises(Refused, match="newer mrrope"):
        revert(extended)


def record_size(path: Path, **shape: int) -> int:
    source = write(path, model(**shape))
    with Source.open(source) as opened:
        target = write_new(edits.extended(Edit(opened), permute=True), path.with_suffix(".new"), force=True).path
    with open_gguf(target) as index:
        return len(index.get(undo_key("llama")))


def test_the_record_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small = record_size(tmp_path / "a.gguf", n_layer=8, n_vocab=5000)
    large = record_size(tmp_path / "a.gguf", n_layer=400, n_vocab=200000)
    assert large <= small + 16
    assert small < 700


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="no such file"):
        revert(tmp_path / "nothing.gguf")


def test_gap_before_the_data_comes_back(tmp_path: Path) -> None:
    raw = model(alignment=4096)
    raw.gap = b"not zero"
    source = write(tmp_path / "a.gguf", raw)
    with Source.open(source) as opened:
        path = write_new(edits.extended(Edit(opened)), tmp_path / "b.gguf").path
    with open_gguf(path) as index:
        assert not any(index.raw(index.infos_end, index.data_start))
    revert(path, tmp_path / "c.gguf")
    assert (tmp_path / "c.gguf").read_bytes() == source.read_bytes()
    assert struct.unpack_from("<Q", source.read_bytes(), 8) == (13,)
