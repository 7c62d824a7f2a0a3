"""Three readers of one file: our index, the gguf package and ggml itself agree, or differ in a way that has a name.

Our index must find exactly what was written. ggml's reading is then what DIFFERENCES_OF_GGML make of that, and the
package's what DIFFERENCES_OF_PACKAGE do. A difference that is not listed fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings

from mrrope_gguf.errors import BadFile
from mrrope_gguf.gguf.index import GGUFIndex, open_gguf
from mrrope_gguf.gguf.types import STRUCT_CODES
from tests import ggml_oracle
from tests.any_gguf import ALIGNMENT, TYPES, AnyFile, Weight, build, files, number, text
from tests.ggml_reader import GgmlReader, Info, Reading, Record
from tests.gguf_bytes import ARRAY, BOOL, SIZES, STRING, U32, array, gguf, kv, u32
from tests.hunt import hunt

pytestmark = pytest.mark.skipif(ggml_oracle.libggml() is None, reason="llama-cpp-python is not installed")
quick = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- our index --------------------------------------------------------------------------------------------------------


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _our_value(index: GGUFIndex, key: str) -> tuple[bytes, ...]:
    """A value's bytes from where the index says they are."""
    kv = index.kvs[key]
    kind = kv.type if kv.item_type is None else kv.item_type
    if kind != STRING:
        return (bytes(index.raw(kv.value, kv.value + kv.count * SIZES[kind])),)
    out, at = [], kv.value
    for _ in range(kv.count):
        length = int.from_bytes(index.raw(at, at + 8), "little")
        out.append(bytes(index.raw(at + 8, at + 8 + length)))
        at += 8 + length
    assert at == kv.end
    return tuple(out)


def our_reading(index: GGUFIndex) -> Reading:
    records = [
        Record(_bytes(key), kv.type, kv.item_type, kv.count, _our_value(index, key)) for key, kv in index.kvs.items()
    ]
    tensors = [Info(_bytes(t.name), t.dims, t.type, t.offset, t.nbytes) for t in index.tensors.values()]
    return Reading(index.version, index.alignment, index.data_start, records, tensors)


def up_to_nul(text: bytes) -> bytes:
    return text.partition(b"\0")[0]


def check_ours(file: AnyFile, index: GGUFIndex) -> None:
    """What was written; a tensor's name, as llama.cpp compares it, up to its first NUL."""
    wanted = file.reading._replace(tensors=[t._replace(name=up_to_nul(t.name)) for t in file.reading.tensors])
    assert our_reading(index) == wanted
    for weight in file.weights:
        name = str(up_to_nul(weight.name), "utf-8", "surrogateescape")
        assert bytes(index.tensor_bytes(name)) == weight.data
    for record in file.reading.records:
        if record.item == STRING:
            key = str(record.key, "utf-8", "surrogateescape")
            if index.find(key) == index.kvs[key]:
                assert [_bytes(text) for text in index.get(key)] == list(record.value)
    # what llama.cpp finds under a key is the first that reads so
    for key, found_first in index._found.items():
        assert found_first == next(k for k in index.kvs.values() if k.key.partition("\0")[0] == key)


# --- ggml -------------------------------------------------------------------------------------------------------------

DIFFERENCES_OF_GGML: dict[str, Callable[[Reading], Reading]] = {
    "its strings are C strings, so keys, names and values end at a NUL": lambda r: r._replace(
        records=[_cut(record) for record in r.records],
        tensors=[t._replace(name=up_to_nul(t.name)) for t in r.tensors],
    ),
    "a bool is read as 0 or 1, whatever byte it is": lambda r: r._replace(records=[_plain(x) for x in r.records]),
    "a shape has four numbers, 1 where the file has none": lambda r: r._replace(
        tensors=[t._replace(dims=(*t.dims, 1, 1, 1, 1)[:4]) for t in r.tensors]
    ),
}


def _cut(record: Record) -> Record:
    value = tuple(map(up_to_nul, record.value)) if STRING in (record.type, record.item) else record.value
    return record._replace(key=up_to_nul(record.key), value=value)


def _plain(record: Record) -> Record:
    if BOOL not in (record.type, record.item):
        return record
    return record._replace(value=tuple(bytes(int(b != 0) for b in part) for part in record.value))


def as_ggml(reading: Reading) -> Reading:
    for change in DIFFERENCES_OF_GGML.values():
        reading = change(reading)
    return reading


# --- the gguf package -------------------------------------------------------------------------------------------------

NUMPY_TYPES = (0, 1, 24, 25, 26, 27, 28)  # tensors the package shows as numbers; others it shows as rows of bytes
PACKAGE_SIZES = {int(t): GGML_QUANT_SIZES[t] for t in GGMLQuantizationType}
REFUSED_BY_PACKAGE: dict[str, tuple[type[Exception], Callable[[AnyFile], bool]]] = {
    "a key or a tensor's name is not UTF-8": (
        UnicodeDecodeError,
        lambda f: not all(map(_is_text, [r.key for r in f.reading.records] + [t.name for t in f.reading.tensors])),
    ),
    "a key is one of the package's own": (KeyError, lambda f: any(r.key == b"GGUF.version" for r in f.reading.records)),
    "a tensor type is newer than the package": (
        ValueError,
        lambda f: any(t.type not in PACKAGE_SIZES for t in f.reading.tensors),
    ),
    "a tensor without dimensions that is shown as bytes": (
        IndexError,
        lambda f: any(not t.dims and t.type not in NUMPY_TYPES for t in f.reading.tensors),
    ),
    "q8_1 is too large there, so its data may run past the end": (
        ValueError,
        lambda f: any(PACKAGE_SIZES.get(t.type, TYPES[t.type]) != TYPES[t.type] for t in f.reading.tensors),
    ),
    "the alignment under a key with a NUL is not seen, so data is sought elsewhere": (
        ValueError,
        lambda f: any(r.key.startswith(ALIGNMENT + b"\0") for r in f.reading.records),
    ),
}


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_package(file: AnyFile, path: Path) -> str:
    """Compare, and say which named difference kept the package from reading the file; "" where none did."""
    reasons = {name: kind for name, (kind, applies) in REFUSED_BY_PACKAGE.items() if applies(file)}
    try:
        reader = GGUFReader(path)
    except tuple(reasons.values()) as error:
        return next(name for name, kind in reasons.items() if isinstance(error, kind))
    fields = [f for f in reader.fields.values() if f.offset >= 24]
    assert [f.name.encode() for f in fields] == [r.key for r in file.reading.records]
    for field, record in zip(fields, file.reading.records, strict=True):
        check_field(field, record)
    hidden = next((name for name in reasons if "alignment" in name), "")
    if not hidden:
        assert reader.alignment == file.reading.alignment
        check_tensors(reader, file)
    return hidden


def check_field(field: object, record: Record) -> None:
    types, parts = [int(t) for t in field.types], [field.parts[i].tobytes() for i in field.data]  # type: ignore[attr-defined]
    if record.type == ARRAY and not record.n:
        assert types == [ARRAY], "the type of an empty array's items is lost"
        assert parts == []
        return
    assert types == [record.type] + ([] if record.item is None else [record.item])
    whole = [b"".join(parts)] if STRING not in (record.type, record.item) else parts
    if BOOL in (record.type, record.item):
        assert [bool(b) for b in whole[0]] == [bool(b) for b in record.value[0]]
    assert tuple(whole) == record.value
    if STRING in (record.type, record.item) and not all(map(_is_text, record.value)):
        with pytest.raises(UnicodeDecodeError):  # its bytes are there, its text is not
            field.contents()  # type: ignore[attr-defined]


def check_tensors(reader: GGUFReader, file: AnyFile) -> None:
    wanted = file.reading.tensors
    if wanted:  # in a file without tensors the package still pads what we and ggml do not
        assert int(reader.data_offset) == file.reading.data_start
    assert [t.name.encode() for t in reader.tensors] == [t.name for t in wanted], "whole names, NULs included"
    for found, info, weight in zip(reader.tensors, wanted, file.weights, strict=True):
        assert (int(found.tensor_type), tuple(map(int, found.shape))) == (info.type, info.dims)
        assert found.data_offset == file.reading.data_start + info.offset
        if PACKAGE_SIZES[info.type] == TYPES[info.type]:
            assert (found.n_bytes, found.data.tobytes()) == (info.nbytes, weight.data)


# --- the tests --------------------------------------------------------------------------------------------------------


def check_readers(file: AnyFile, path: Path, ggml: GgmlReader) -> str:
    path.write_bytes(file.data)
    with open_gguf(path) as index:
        check_ours(file, index)
    assert ggml.read(path) == as_ggml(file.reading)
    return check_package(file, path)


def test_types_are_what_this_build_of_the_package_and_ours_say() -> None:
    assert {int(t) for t in GGUFValueType} == {*SIZES, STRING, ARRAY}
    assert {int(t) for t in STRUCT_CODES} == SIZES.keys()


ODD_ONES: dict[str, AnyFile] = {
    "a key or a tensor's name is not UTF-8": build([], [Weight(b"\xff", (1,), 0, b"1234")]),
    "a key is one of the package's own": build([text("GGUF.version", "mine")]),
    "a tensor type is newer than the package": build([], [Weight(b"t", (64,), 42, bytes(18))]),
    "a tensor without dimensions that is shown as bytes": build([], [Weight(b"t", (), 30, b"12")]),
    "q8_1 is too large there, so its data may run past the end": build(
        [], [Weight(b"t", (32,), 9, b"x" * 36)], end_pad=False
    ),
    "the alignment under a key with a NUL is not seen, so data is sought elsewhere": build(
        [number("general.alignment\0", U32, u32(4096))], [Weight(b"t", (1,), 0, b"1234")], alignment=4096
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("name", REFUSED_BY_PACKAGE)
def test_what_the_package_reads_otherwise_we_and_ggml_read(tmp_path: Path, ggml: GgmlReader, name: str) -> None:
    assert check_readers(ODD_ONES[name], tmp_path / "odd.gguf", ggml) == name


@pytest.mark.engine
@pytest.mark.parametrize("name", DIFFERENCES_OF_GGML)
def test_each_difference_of_ggml_is_there(tmp_path: Path, ggml: GgmlReader, name: str) -> None:
    """A file that shows it: ggml's reading is not what was written until the difference is named."""
    records = [text("a\0b", b"c\0d"), number("bool", BOOL, b"\7")]
    file = build(records, [Weight(b"t\0u", (3,), 0, b"1234" * 3)])
    check_readers(file, tmp_path / "odd.gguf", ggml)
    others = file.reading
    for other in DIFFERENCES_OF_GGML.keys() - {name}:
        others = DIFFERENCES_OF_GGML[other](others)
    assert ggml.read(tmp_path / "odd.gguf") != others


@pytest.mark.engine
def test_arrays_of_arrays_are_read_by_the_package_alone(tmp_path: Path, ggml: GgmlReader) -> None:
    """The format allows them and ggml does not read them; the package makes one list of all."""
    inner = array(U32, 2, u32(1) + u32(2))
    path = tmp_path / "nested.gguf"
    path.write_bytes(gguf([kv("v", ARRAY, array(ARRAY, 2, inner + inner))]))
    assert GGUFReader(path).fields["v"].contents() == [1, 2, 1, 2]
    assert ggml.read(path) is None
    with pytest.raises(BadFile, match="arrays"):
        open_gguf(path)


@pytest.mark.engine
@quick
@given(file=files())
def test_readers_agree(tmp_path: Path, ggml: GgmlReader, file: AnyFile) -> None:
    check_readers(file, tmp_path / "any.gguf", ggml)


@pytest.mark.engine
@pytest.mark.hard
def test_readers_agree_for_ten_minutes(tmp_path: Path, ggml: GgmlReader, capsys: pytest.CaptureFixture[str]) -> None:
    seen: Counter[str] = Counter()

    def say(words: str) -> None:
        with capsys.disabled():
            print(f"\nreaders: {words}", flush=True)

    def check(file: AnyFile) -> None:
        seen[check_readers(file, tmp_path / "any.gguf", ggml) or "read alike by all three"] += 1

    n = hunt(files(), check, say)
    say(f"{n} files; {dict(seen)}")
    assert seen.keys() == {"read alike by all three", *REFUSED_BY_PACKAGE}
