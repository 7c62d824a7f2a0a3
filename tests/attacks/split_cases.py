"""Split models: a shard missing, foreign, cut off or hostile, numbers that do not add up, tensors that come twice."""

from __future__ import annotations

from collections.abc import Callable

from tests.attacks.case import Accepts, Answer, Attack, Refuses, Says, everywhere
from tests.attacks.sound import Parts, llama
from tests.gguf_bytes import I32, STRING, U16, U32, head, string, u32, u64

CASES: dict[str, Attack] = {}
COUNT = 3


def u16(value: int) -> bytes:
    return (value % 2**16).to_bytes(2, "little")


def shard_name(i: int, count: int = COUNT, prefix: str = "m") -> str:
    return f"{prefix}-{i + 1:05d}-of-{count:05d}.gguf"


def shards(count: int = COUNT) -> list[Parts]:
    """The sound model in shards: all its metadata in the first, its tensors dealt out."""
    whole = llama()
    out = [Parts({"general.architecture": whole.kvs["general.architecture"]}) for _ in range(count)]
    out[0].kvs = whole.kvs
    for i, (name, record) in enumerate(whole.tensors.items()):
        out[i * count // len(whole.tensors)].tensors[name] = record
    for i, parts in enumerate(out):
        parts.put("split.no", U16, u16(i))
        parts.put("split.count", U16, u16(count))
        parts.put("split.tensors.count", I32, u32(len(whole.tensors)))
    return out


def add(
    name: str, change: Callable[[list[Parts]], None] | None, answer: Answer, *, files: dict[str, bytes] | None = None,
    given: int = 0, prefix: str = "m", note: str = "", origin: str = "", drop: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """The sound split with one `change` to its parts, `files` in place of some and `drop` left out."""
    parts = shards()
    if change:
        change(parts)
    made = {shard_name(i, prefix=prefix): one.data for i, one in enumerate(parts) if i not in drop} | (files or {})
    CASES[f"split-{name}"] = Attack(
        f"split-{name}",
        "split",
        made,
        everywhere(answer),
        given=shard_name(given, prefix=prefix),
        origin=origin,
        note=note,
    )


def at(parts: Parts, key: str, into: int = 0) -> int:
    """Where the value of a scalar record of `key` lies."""
    return parts.offset(key) + 8 + len(key) + 4 + into


def wrong(name: str, i: int, key: str, kind: int, value: bytes, blamed: int | None = None, note: str = "") -> None:
    """Shard i with another record; the error names it there (or the same record of shard `blamed`)."""
    parts = shards()
    parts[i].put(key, kind, value)
    there = parts[i if blamed is None else blamed]

    def change(made: list[Parts]) -> None:
        made[i].put(key, kind, value)

    add(name, change, Refuses(at(there, key), key), note=note)


def add_missing() -> None:
    for i in range(1, COUNT):
        add(f"shard-{i + 1}-missing", None, Says(f"is missing: {shard_name(i)}", "no file, no byte"), drop=(i,))
    add("shard-1-missing", None, Says(f"is missing: {shard_name(0)}", "no file, no byte"), drop=(0,), given=1)
    said = Says("a name that llama.cpp would not find", "the name is wrong, not a byte")
    whole = shards()[0].data
    CASES["split-other-name"] = Attack("split-other-name", "split", {"m.gguf": whole}, everywhere(said))
    few = Says("shard of the split model is missing", "no file, no byte")
    parts = shards()[0]
    parts.put("split.count", U16, u16(65535))
    CASES["split-count-65535"] = Attack(
        "split-count-65535", "split", {shard_name(0, 65535): parts.data}, everywhere(few), given=shard_name(0, 65535)
    )


def add_numbers() -> None:
    wrong("no-twice", 1, "split.no", U16, u16(0))
    wrong("no-beyond-count", 1, "split.no", U16, u16(9))
    wrong("no-65535", 2, "split.no", U16, u16(65535))
    wrong("no-u32", 1, "split.no", U32, u32(1))
    wrong("no-string", 1, "split.no", STRING, string("1"))
    for name, total in {"0": 0, "too-many": 99, "too-few": 1, "negative": -1, "2^31-1": 2**31 - 1}.items():
        wrong(f"total-{name}", 0, "split.tensors.count", I32, u32(total))
    wrong("total-u32", 0, "split.tensors.count", U32, u32(12))
    wrong("total-string", 0, "split.tensors.count", STRING, string("12"))
    for key, i in (("split.no", 1), ("split.tensors.count", 0)):
        parts = shards()
        del parts[i].kvs[key]

        def drop(made: list[Parts], key: str = key, i: int = i) -> None:
            del made[i].kvs[key]

        add(f"{key.removeprefix('split.')}-missing", drop, Refuses(parts[i].offset(key), key))


def add_tensors() -> None:
    def twice(made: list[Parts]) -> None:
        made[2].tensors["token_embd.weight"] = made[0].tensors["token_embd.weight"]

    parts = shards()
    twice(parts)
    add("tensor-twice", twice, Refuses(parts[2].tensor_offset("token_embd.weight"), "tensor name"))

    def moved(made: list[Parts]) -> None:
        made[0].tensors["output_norm.weight"] = made[2].tensors.pop("output_norm.weight")

    fine = Accepts("any shard may hold any tensor")
    add("tensor-in-another-shard", moved, fine)


def add_hostile_shards() -> None:
    second, sound = shard_name(1), shards()[1]
    assert len(sound.data) % 32 == 0  # so that its last byte belongs to a tensor
    cut = sound.data[:-1]
    last = list(sound.tensors)[-1]
    size = len(sound.tensors[last][2])
    field = f"tensor[{len(sound.tensors) - 1}].data ({last})"
    add("shard-2-cut-off", None, Refuses(len(sound.data) - size, field), files={second: cut})
    add("shard-2-empty", None, Refuses(0, "magic"), files={second: b""})
    add("shard-2-no-gguf", None, Refuses(0, "magic"), files={second: b"PK\3\4" + bytes(99)})
    add("shard-2-n_tensors-2^61", None, Refuses(8, "n_tensors"), files={second: b"GGUF" + u32(3) + u64(2**61) + u64(1)})
    add("shard-2-key-2^64-1", None, Refuses(24, "kv[0].key"), files={second: head(0, 1) + u64(-1) + bytes(99)})
    other = llama()
    add("shard-2-other-model", None, Refuses(other.offset("split.no"), "split.no"), files={second: other.data})
    add(
        "shard-2-folder",
        None,
        Says("a directory, not a GGUF file", "it is no file"),
        drop=(1,),
        files={f"{second}/x": b""},
    )


def add_paths() -> None:
    names = Accepts("shards are found by the name of the file that is given; no name in a file is ever a path")
    add("prefix-dots", None, names, prefix="..")

    def evil(made: list[Parts]) -> None:
        made[0].put("general.name", STRING, string("../../../../tmp/evil"))
        made[0].put("general.basename", STRING, string("/etc/passwd"))
        made[0].put("split.prefix", STRING, string("../../m"))

    add("names-with-paths", evil, names)


for _add in (add_missing, add_numbers, add_tensors, add_hostile_shards, add_paths):
    _add()
