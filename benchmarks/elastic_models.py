"""The two models of benchmarks.elastic, their weights widened to f16: the same values, and faster to read with.

`python -m benchmarks.elastic_models [smollm2] [gemma3]` makes those that are missing and prints their paths.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf import fetch


@dataclass(frozen=True)
class Measured:
    """A model, the context it is given here, and the width of the buckets its losses are counted in."""

    resource: fetch.Resource
    n_ctx_orig: int
    n_ctx: int
    bucket: int = 4096


MODELS = {"smollm2": Measured(fetch.SMOLLM2, 8192, 32768), "gemma3": Measured(fetch.GEMMA3, 32768, 66048)}


def widened(resource: fetch.Resource) -> Path:
    """The model's file with every matrix as f16 and every vector as f32, made once and kept beside it."""
    source = fetch.fetch(resource)
    target = source.with_name(f"{source.stem}.widened-f16.gguf")
    if not target.exists():
        _widen(source, target.with_suffix(f".{os.getpid()}"))
        os.replace(target.with_suffix(f".{os.getpid()}"), target)
    return target


def _widen(source: Path, target: Path) -> None:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    read = GGUFReader(source)
    write = GGUFWriter(target, read.fields["general.architecture"].contents())
    for name, item in read.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = item.types[1] if item.types[0] == GGUFValueType.ARRAY else None
            write.add_key_value(name, item.contents(), item.types[0], sub_type=inner)
    for tensor in read.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        write.add_tensor(tensor.name, values.astype(np.float32 if values.ndim == 1 else np.float16))
    write.write_header_to_file()
    write.write_kv_data_to_file()
    write.write_tensors_to_file()
    write.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models that are named, or all, and print their paths, one a line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic_models", description="widen models to f16")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)} (default: all)")
    names = parser.parse_args(argv).names or list(MODELS)
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"{unknown[0]}: no such model; there are {', '.join(MODELS)}")
    for name in names:
        print(widened(MODELS[name].resource))


if __name__ == "__main__":
    main()
