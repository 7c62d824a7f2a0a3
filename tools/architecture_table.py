"""Writes docs/architectures.md from architectures.py: python -m tools.architecture_table."""

from __future__ import annotations

from pathlib import Path

from mrrope_gguf.architectures import GROUPS, Arch, architectures

PATH = Path(__file__).parent.parent / "docs" / "architectures.md"
_ROPE = {"norm": "NORM", "neox": "NEOX", "mrope": "M-RoPE", "imrope": "interleaved M-RoPE", "none": "none"}
_SWA = {
    "": "",
    "own-base": "base of their own",
    "same-base": "same base",
    "literal": "never scaled",
    "only": "the only ones with RoPE",
}
_HEAD = """# Architectures

What llama.cpp's architectures do with RoPE, and so what an extended file of each can be. This page is written by
`python -m tools.architecture_table` from mrrope_gguf/architectures.py; `python -m tools.check_architectures TREE`
compares that table with a llama.cpp source tree.

- **portable**: stock llama.cpp reads the factors from the file: `rope_freqs`, or `long` (rope_factors_long.weight,
  used above the original context only). Without either, the patched engine reads the table from metadata.
- **pairs**: NORM rotates values (2i, 2i+1) of a head together, NEOX (i, i + n_rot/2).
- **sliding layers**: what an architecture's sliding-window layers rotate with, in models that have some. They are
  never extended. Where they are the only ones with RoPE there is nothing to extend.
- **elastic**: whether keys in the cache can be re-rotated when the scale grows.
"""


def _cells(arch: Arch) -> list[str]:
    portable = ", ".join(word for word, has in (("rope_freqs", arch.portable), ("long", arch.longrope)) if has)
    notes = [arch.note] if arch.note else []
    if arch.leak:
        what = {"factors": "factors reach", "attn_factor": "the temperature reaches"}[arch.leak]
        notes.append(f"in a portable file {what} sliding layers too")
    if arch.norm_after_rope:
        notes.append("queries and keys are normalised after RoPE, which cancels the temperature")
    if arch.draft:
        notes.append("draft model")
    if not arch.hook and arch.rope != "none":
        notes.append("cannot be extended")
    elastic = "" if arch.static_only or not arch.hook else "yes"
    return [f"`{arch.name}`", _ROPE[arch.rope], portable, _SWA[arch.swa], elastic, "; ".join(notes)]


def _section(group: str, meaning: str) -> str:
    members = [arch for arch in architectures().values() if arch.group == group]
    title = f"\n## {group}: {meaning}\n\n"
    if group == "H":
        named = "; ".join(f"`{arch.name}`" + f" ({arch.note})" * bool(arch.note) for arch in members)
        return f"{title}{named}.\n"
    rows = [["architecture", "pairs", "portable", "sliding layers", "elastic", "notes"], ["---"] * 6]
    rows += [_cells(arch) for arch in members]
    return title + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def text() -> str:
    """The whole page."""
    return _HEAD + "".join(_section(group, meaning) for group, meaning in GROUPS.items())


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
