"""Finding the shards of a split model: from any of them, and refusing what llama.cpp would not load."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mrrope_gguf.errors import BadFile, FileTrouble
from mrrope_gguf.gguf.index import open_split
from tests.bad_gguf import ARCH, SOUND
from tests.gguf_bytes import I32, U16, U32, gguf, kv, tensor, u32


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def shard(number: int, count: int = 3, total: int = 3, name: str | None = None) -> bytes:
    kvs = [ARCH] if number == 0 else []
    kvs += [kv("split.no", U16, u16(number)), kv("split.count", U16, u16(count))]
    kvs.append(kv("split.tensors.count", I32, u32(total)))
    return gguf(kvs, [tensor(name or f"t{number}", (8,))], [bytes([number]) * 32])


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"m-{i + 1:05d}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(shard(i))
    return paths


@pytest.mark.parametrize("given_shard", range(3))
def test_split_is_found_from_any_shard(split: list[Path], given_shard: int) -> None:
    assert open_split(split[given_shard]) == split
    assert open_split(str(split[given_shard])) == split


def test_whole_file_is_its_own_split(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(SOUND)
    assert open_split(path) == [path]
    path.write_bytes(shard(0, count=1, total=1))
    assert open_split(path) == [path]


def test_missing_shard_is_named(split: list[Path]) -> None:
    split[1].unlink()
    with pytest.raises(FileTrouble, match=r"m-00002-of-00003\.gguf"):
        open_split(split[2])


def test_shard_with_another_name_is_refused(split: list[Path]) -> None:
    with pytest.raises(FileTrouble, match=r"-00001-of-00003\.gguf"):
        open_split(split[0].rename(split[0].with_name("model.gguf")))
    bare = split[1].rename(split[1].with_name("-00002-of-00003.gguf"))
    with pytest.raises(FileTrouble, match="rename"):
        open_split(bare)


def wrong_type(number: int) -> bytes:
    kvs = [ARCH, kv("split.no", U32, u32(number)), kv("split.count", U16, u16(3))]
    return gguf(kvs, [tensor(f"t{number}", (8,))], [b"\0" * 32])


@pytest.mark.parametrize(
    ("number", "content", "field"),
    [
        (0, shard(0, total=4), "split.tensors.count"),
        (1, shard(2), "split.no"),
        (1, SOUND, "split.no"),
        (1, shard(1, name="t0"), "tensor name"),
        (2, wrong_type(2), "split.no"),
        (2, shard(2)[:-1], "tensor[0].data (t2)"),
        (0, gguf([ARCH, kv("split.count", U32, u32(3))]), "split.count"),
        (0, gguf([ARCH, kv("split.count", U16, u16(3))]), "split.no"),
    ],
)
def test_shard_that_does_not_belong_is_refused(split: list[Path], number: int, content: bytes, field: str) -> None:
    split[number].write_bytes(content)
    with pytest.raises(BadFile) as caught:
        open_split(split[0])
    assert caught.value.field == field
