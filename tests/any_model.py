"""Models that `extend` takes, of many architectures, as headers with bytes for weights: a Hypothesis strategy.

Nothing could run them; everything about their files is as odd as a sound file may be (see any_gguf): foreign records
among their own in any order, any alignment, padding that is not zero, tensors of any type, one file or several.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests import gguf_bytes as g
from tests.any_gguf import ALIGNMENT, ALIGNMENTS, TYPES, AnyFile, Weight, build, keys, number, text, values
from tests.ggml_reader import Record

# architectures by how they are rendered: by a stock tensor, by metadata alone, re-expressed under --portable
PORTABLE = ("llama", "mistral3", "minicpm", "granite", "exaone", "apertus", "phi3")
ENGINE = ("qwen2", "qwen3", "gemma3", "gemma2", "stablelm", "smollm3", "internlm2", "xverse", "falcon", "glm4")
REEXPRESSED = ("qwen2", "internlm2", "xverse", "ernie4_5")
MAY_FORGET = ("general.name", "general.tags", "general.finetune", "general.uuid", "general.base_model.0.name")


@dataclass(frozen=True)
class Model:
    """The files of a model, shard 1 first, and how it is to be extended."""

    arch: str
    files: tuple[AnyFile, ...]
    options: dict[str, Any] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """The files in an empty folder, under names that llama.cpp finds."""
        n = len(self.files)
        names = [f"m-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)] if n > 1 else ["m.gguf"]
        for name, file in zip(names, self.files, strict=True):
            (folder / name).write_bytes(file.data)
        return [folder / name for name in names]


def u32(key: str, value: int) -> Record:
    return number(key, g.U32, g.u32(value))


def f32(key: str, value: float) -> Record:
    return number(key, g.F32, struct.pack("<f", value))


@st.composite
def _tensor(draw: st.DrawFn, name: str, n_rows: int, *, bias: bool = False) -> Weight:
    if bias:
        return Weight(name.encode(), (n_rows,), 0, draw(st.binary(min_size=1, max_size=1)) * (4 * n_rows))
    kind = draw(st.sampled_from(sorted(TYPES)))
    block, size = TYPES[kind]
    columns = draw(st.integers(1, 2)) * (block if block > 1 else 8)
    seed, n = draw(st.binary(min_size=2, max_size=5)), columns // block * size * n_rows
    return Weight(name.encode(), (columns, n_rows), kind, (seed * (n // len(seed) + 1))[:n])


@st.composite
def _weights(draw: st.DrawFn, n_layer: int, n_head: int, n_head_kv: int, head_dim: int, biases: bool) -> list[Weight]:
    out = [draw(_tensor("token_embd.weight", 3))]
    for i in range(n_layer):
        for part, heads in (("attn_q", n_head), ("attn_k", n_head_kv)):
            out.append(draw(_tensor(f"blk.{i}.{part}.weight", heads * head_dim)))
            if biases:
                out.append(draw(_tensor(f"blk.{i}.{part}.bias", heads * head_dim, bias=True)))
        out.append(draw(_tensor(f"blk.{i}.ffn_up.weight", 4)))
    return draw(st.permutations(out))


@st.composite
def _own_records(draw: st.DrawFn, arch: str, n_layer: int, heads: tuple[int, int, int]) -> list[Record]:
    """What llama.cpp and `extend` ask for."""
    n_head, n_head_kv, head_dim = heads
    n_ctx = draw(st.sampled_from([64, 256, 2048, 8192, 131072]))
    out = [
        text("general.architecture", arch),
        u32(f"{arch}.context_length", n_ctx),
        u32(f"{arch}.embedding_length", n_head * head_dim),
        u32(f"{arch}.block_count", n_layer),
        u32(f"{arch}.feed_forward_length", 4),
        u32(f"{arch}.attention.head_count", n_head),
        u32(f"{arch}.attention.head_count_kv", n_head_kv),
        f32(f"{arch}.rope.freq_base", draw(st.sampled_from([1e4, 5e5, 1e6]))),
    ]
    if arch == "stablelm":
        out.append(u32(f"{arch}.rope.dimension_count", head_dim // 2))
    if arch in ("gemma2", "gemma3"):
        out.append(u32(f"{arch}.attention.sliding_window", 16))
    if draw(st.integers(0, 3)) == 0 and arch != "phi3":
        out += [text(f"{arch}.rope.scaling.type", "linear"), f32(f"{arch}.rope.scaling.factor", 2.0)]
    return out


@st.composite
def _others(draw: st.DrawFn, arch: str) -> list[Record]:
    """Records that are none of extend's business, a large one perhaps; what it reads for a name, of odd types; and keys
    that read like its own up to a NUL, of which llama.cpp takes the first.
    """
    twins = [
        u32(f"{arch}.context_length\0x", 128),
        f32(f"{arch}.rope.freq_base\0", 2e4),
        text("general.name\0", "another"),
        text(f"{arch}.rope.scaling.type\0", "none"),
    ]
    taken = [key for key in draw(st.lists(keys, unique=True, max_size=5)) if not key.startswith(ALIGNMENT)]
    out = [draw(values(key)) for key in taken]
    if draw(st.booleans()):
        n = draw(st.integers(1, 9000))
        out.append(Record(b"tokenizer.ggml.tokens", g.ARRAY, g.STRING, n, tuple(b"w%d" % i for i in range(n))))
    out += [draw(values(key.encode())) for key in draw(st.lists(st.sampled_from(MAY_FORGET), unique=True, max_size=3))]
    return out + [twin for twin in twins if not draw(st.integers(0, 9))]


@st.composite
def _options(draw: st.DrawFn) -> dict[str, Any]:
    methods = ["mrrope-uni", "mrrope-pro", "yarn", "yarn-turns", "ntk", "linear", "llama3"]
    return {
        "method": draw(st.sampled_from(methods)),
        "scale": draw(st.sampled_from([1.5, 2, 4, 32, 512])),
        "elastic": draw(st.booleans()),
    }


@st.composite
def models(draw: st.DrawFn) -> Model:
    arch = draw(st.sampled_from([*PORTABLE, *ENGINE, "ernie4_5"]))
    # of fewer layers gemma3 has none that sees everything
    n_layer, head_dim = 6 if arch == "gemma3" else draw(st.integers(1, 4)), draw(st.sampled_from([8, 16]))
    n_head = draw(st.sampled_from([2, 4]))
    n_head_kv = draw(st.sampled_from([1, n_head]))
    records = draw(_own_records(arch, n_layer, (n_head, n_head_kv, head_dim))) + draw(_others(arch))
    weights = draw(_weights(n_layer, n_head, n_head_kv, head_dim, arch == "qwen2"))
    if arch in PORTABLE and arch != "phi3" and draw(st.integers(0, 3)) == 0:
        own = [draw(st.floats(1, 8, width=32)) for _ in range(head_dim // 2)]
        weights.append(Weight(b"rope_freqs.weight", (head_dim // 2,), 0, struct.pack(f"<{len(own)}f", *own)))
    if not draw(st.integers(0, 7)):
        weights = []
    options = draw(_options())
    if arch in REEXPRESSED and weights and draw(st.booleans()):
        options["rendering"] = "portable"
    else:
        options["rendering"] = draw(st.sampled_from(["auto", "engine"]))
    again = draw(_options()) | {"rendering": options["rendering"]}
    return Model(arch, draw(_files(records, weights)), options, again)


@st.composite
def _files(draw: st.DrawFn, records: list[Record], weights: list[Weight]) -> tuple[AnyFile, ...]:
    """One file, or shards with the metadata in the first; a shard may hold no tensors."""
    alignment = draw(st.sampled_from(ALIGNMENTS))
    shape: dict[str, Any] = {
        "alignment": alignment,
        "version": draw(st.sampled_from([2, 3])),
        "fill": draw(st.sampled_from([b"\0", b"x"])),
        "rest": draw(st.sampled_from([b"", b"", b"garbage"])),
    }
    aligned = [Record(ALIGNMENT, g.U32, None, 1, (g.u32(alignment),))]
    count = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    if count == 1:
        return (build(draw(st.permutations(records + aligned)), weights, **shape, end_pad=draw(st.booleans())),)
    # the table's tensor is where llama.cpp and `extend` put it
    places = [0 if w.name == b"rope_freqs.weight" else draw(st.integers(0, count - 1)) for w in weights]
    out = []
    for i in range(count):
        kvs = [*(records if i == 0 else []), *_split_records(i, count, len(weights)), *aligned]
        mine = [weight for weight, place in zip(weights, places, strict=True) if place == i]
        out.append(build(draw(st.permutations(kvs)), mine, **shape, end_pad=draw(st.booleans())))
    return tuple(out)


def _split_records(i: int, count: int, n_tensors: int) -> list[Record]:
    return [
        number("split.no", g.U16, struct.pack("<H", i)),
        number("split.count", g.U16, struct.pack("<H", count)),
        number("split.tensors.count", g.I32, struct.pack("<i", n_tensors)),
    ]
