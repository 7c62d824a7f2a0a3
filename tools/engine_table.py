"""Writes the table in docs/engine.md: python -m tools.engine_table. tests/test_engine_archs.py proves every cell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.architectures import Arch, architectures
from mrrope_gguf.reexpress import RULES

PATH = Path(__file__).parent.parent / "docs" / "engine.md"
BEGIN = "<!-- written by python -m tools.engine_table; tests/test_engine_archs.py proves it -->\n"
END = "<!-- end of the table -->\n"

# test-llama-archs leaves these out, for the reasons in its source
_NO_VOCAB = "an encoder that llama.cpp's generator gives no vocabulary"
_DRAFT = "a draft that needs the model it drafts for"
NOT_BUILT = {
    **dict.fromkeys(("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"), _NO_VOCAB),
    **dict.fromkeys(("jina-bert-v2", "jina-bert-v3"), _NO_VOCAB),
    **dict.fromkeys(("eagle3", "dflash"), _DRAFT),
    "gemma4": "the generator has no fixture for its caches",
    "gemma4-assistant": "the generator has no fixture for its caches",
    "gemma-embedding": "the generator finds the results of embedding models inconsistent",
    "llama-embed": "the generator finds the results of embedding models inconsistent; arch llama's graph",
    "t5encoder": "the generator finds the results of embedding models inconsistent",
    "deepseek2-ocr": "the generator leaves it out",
    "graniteswitch": "the generator has no adapters for it",
    "chameleon": "half implemented in llama.cpp",
    "plm": "the generator has no tensor shapes for it",
    "clip": "no language model",
    "gptj": "llama.cpp has no graph for it",
    "wavtokenizer-dec": "the generator leaves it out",
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), "the generator's models of it hang"),
}
# built in memory, but llama.cpp cannot write them to a file
NOT_SAVED = ("apertus", "bitnet", "gemma3n", "step35", "t5")
# in the generator's models no layer with full attention rotates
NO_GLOBAL_ROPE = ("baichuan", "cohere2", "exaone-moe", "lfm2", "maple", "muse-glimmer", "smallthinker")
# the generator gives them sections, which makes their RoPE M-RoPE
WITH_SECTIONS = ("bailingmoe3", "glm4", "glm4moe", "hunyuan_vl")
# the generator gives it indexers
WITH_INDEXERS = ("hy_v4",)
# no model of these has one layer that takes the table, and nothing after it
NOT_ONE_LAYER = ("gemma3n", "hrm_text")
# qwen4exp's indexer wants a context without gaps: it is compared at its start only
FROM_ZERO = ("qwen4exp",)

OK, NO_ROPE, NOT_REACHED, NORM_AFTER, MROPE, NO_SHIFT = 0, -3, -4, -5, -6, -7  # enum llama_rope_table_status

MEANING = {
    "same": "without a table: a model's file gives the same logits as unpatched llama.cpp, bit for bit",
    "graph": "with a table: read off the built graph, every RoPE node of global layers turns by it and no other node"
    " changes; a table that changes nothing, and none again, give the first logits bit for bit",
    "refused": "a table is refused, by name, and nothing changes",
    "file": "an engine file equals `llama_rope_table_set` of its table on the original, bit for bit",
    "portable": "the portable file in unpatched llama.cpp equals the engine file here: bit for bit, within 1e-4 where"
    " it is re-expressed",
    "keys": "keys cached under one table and rotated to another give the logits of a fresh run",
    "keys kept": "a new table is refused, by name, while keys are cached, and they stay as they were",
    "and back": "keys cached under one table, rotated to another and back, give the logits of before",
    "shift": "after a context shift the logits are those of the same tokens at the new positions",
}
_UNMOVED = {
    **dict.fromkeys(("deepseek32", "dots3note", "glm-dsa"), "no: an indexer keeps keys of another layout"),
    "hy_v4": "not if it has indexers",
}
_ROPE = {"norm": "NORM", "neox": "NEOX", "mrope": "M-RoPE", "imrope": "interleaved M-RoPE", "none": "none"}
# a file of theirs can be made portable and engine, and the two are compared; the others' leak into sliding layers
_LEAKS = ("granite_swa", "llama4", "step35")


@dataclass(frozen=True)
class Expected:
    """What the patched engine must say of the generator's model of one architecture."""

    status: int  # of a table on an empty cache
    cached: int  # of another table on cached keys
    proofs: tuple[str, ...]  # keys of MEANING


def expected(arch: Arch) -> Expected:
    """The statuses and the proofs of an architecture; no proofs where the generator does not build it."""
    status = _status(arch)
    cached = status or _cached(arch)
    if arch.name in NOT_BUILT:
        return Expected(status, cached, ())
    proofs = [] if arch.name in NOT_SAVED else ["same"]
    if status:
        if arch.rope != "none":
            proofs += [*_portable(arch), "refused", *(["shift"] if arch.hook and arch.name != "baichuan" else [])]
        return Expected(status, status, tuple(proofs))
    proofs.append("graph")
    if arch.name not in NOT_SAVED:
        proofs.append("file")
    proofs += _portable(arch)
    if arch.cached:
        proofs += ["keys kept"] if cached else ["and back"] if arch.name in NOT_ONE_LAYER else ["keys"]
        if cached not in (MROPE, NO_SHIFT) and arch.name not in NORMS_WITH_WEIGHTS and arch.name not in WITH_SECTIONS:
            proofs.append("shift")
    return Expected(status, cached, tuple(proofs))


# a norm with weights does not commute with a rotation: no shift of their keys is right, here or in stock
NORMS_WITH_WEIGHTS = ("hunyuan-moe", "hunyuan-dense", "hunyuan_vl", "maincoder")


def _status(arch: Arch) -> int:
    if arch.rope == "none" or arch.name in NO_GLOBAL_ROPE:
        return NO_ROPE
    return OK if arch.hook else NOT_REACHED


def _cached(arch: Arch) -> int:
    if arch.norm_after_rope:
        return NORM_AFTER
    if arch.rope in ("mrope", "imrope") or arch.name in WITH_SECTIONS:
        return MROPE
    return NO_SHIFT if (arch.static_only and arch.cached) or arch.name in WITH_INDEXERS else OK


def _portable(arch: Arch) -> list[str]:
    direct = (arch.portable or arch.longrope) and arch.name not in (*NOT_SAVED, *NO_GLOBAL_ROPE, *_LEAKS)
    return ["portable"] if direct or arch.name in RULES else []


def _cells(arch: Arch) -> list[str]:
    portable = "yes" if arch.portable or arch.longrope else "re-expressed" if arch.name in RULES else ""
    table = "yes" if arch.hook else f"no: {arch.note}"
    if arch.swa == "only":
        table = "global layers with RoPE, if a model has any"
    keys = ""
    if arch.hook:
        cached = _cached(arch)
        keys = {
            OK: "yes" if arch.cached else "no cache",
            NORM_AFTER: "no: normalized after RoPE",
            MROPE: "no: M-RoPE" + (", if it has sections" if arch.name in WITH_SECTIONS else ""),
            NO_SHIFT: _UNMOVED.get(arch.name, "no: the cache has no shift"),
        }[cached]
    proofs = ", ".join(expected(arch).proofs) or f"not run: {NOT_BUILT[arch.name]}"
    return [f"`{arch.name}`", _ROPE[arch.rope], portable, table, keys, proofs]


def table() -> str:
    """The generated part of docs/engine.md."""
    rotating = [arch for arch in architectures().values() if arch.rope != "none"]
    still = [arch for arch in architectures().values() if arch.rope == "none"]
    rows = [["architecture", "pairs", "portable file", "engine table", "cached keys move", "proven"], ["---"] * 6]
    rows += [_cells(arch) for arch in rotating]
    notes = {name: f" (not run: {why})" for name, why in NOT_BUILT.items()}
    notes |= dict.fromkeys(NOT_SAVED, " (run, but llama.cpp writes no file of it to compare)")
    named = "; ".join(f"`{arch.name}`{notes.get(arch.name, '')}" for arch in still)
    meanings = "".join(f"- **{word}**: {meaning}.\n" for word, meaning in MEANING.items())
    return (
        f"{BEGIN}\n"
        + "".join(f"| {' | '.join(row)} |\n" for row in rows)
        + f"\nWithout RoPE, so no table is taken; where not said otherwise proven by *same*: {named}.\n"
        + f"\nWhat the last column says, each of random weights and run in CI:\n\n{meanings}\n{END}"
    )


def page() -> str:
    """docs/engine.md with the table in it brought up to date."""
    text = PATH.read_text(encoding="utf-8")
    return text[: text.index(BEGIN)] + table() + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
