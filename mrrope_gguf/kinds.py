"""Whether a GGUF file is a language model at all: adapters, projectors and shards carry the same magic."""

from __future__ import annotations

from .architectures import Arch, architecture
from .errors import Refused
from .gguf.index import GGUFIndex
from .text import printable


def known_architecture(index: GGUFIndex) -> Arch:
    """The architecture of a model file. Raises Refused for other kinds of GGUF and for unknown architectures."""
    name = printable(index.path.name)
    if refusal := _foreign(index, name):
        raise refusal
    arch = architecture(index.arch)
    if arch is None:
        raise Refused(
            f"{name}: unknown architecture '{printable(index.arch)}'",
            why="the llama.cpp this was written for does not have it, so how it rotates cannot be told",
            fix="update mrrope-gguf, or see docs/architectures.md for the architectures it knows",
        )
    return arch


def _foreign(index: GGUFIndex, name: str) -> Refused | None:
    """The refusal for a GGUF that is not the (first part of the) model itself."""
    part, kind = index.get("split.no", most=0), index.get("general.type", most=0)
    if isinstance(part, int) and part > 0 and index.find("general.architecture") is None:
        return Refused(
            f"{name}: part {part + 1} of a split model of {index.get('split.count', '?')} files",
            why="only the first part holds the model's metadata",
            fix="name the first file, the one that ends in -00001-of-...",
        )
    if index.get("general.architecture", most=0) == "clip":
        kind = "mmproj"
    other = _OTHER_KINDS.get(kind) if isinstance(kind, str) else None
    return Refused(f"{name}: {other[0]}", why=other[1], fix=other[2]) if other else None


_OTHER_KINDS = {
    "adapter": (
        "a LoRA adapter, not a model",
        "an adapter changes weights and has no RoPE of its own",
        "extend the base model and load the adapter with it (not with a re-expressed one)",
    ),
    "mmproj": (
        "a projector for images or audio (mmproj), not a language model",
        "it has no context to extend",
        "extend the language model it belongs to; the projector is used as it is",
    ),
    "imatrix": (
        "an importance matrix, not a model",
        "it holds statistics for quantising a model",
        "name the model's own GGUF file",
    ),
}
