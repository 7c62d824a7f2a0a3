"""The malformed headers of tests/bad_gguf.py as attacks, and what each kind of them was first found in."""

from __future__ import annotations

from tests import bad_gguf
from tests.attacks.case import Attack, Refuses, everywhere

# the first that a name begins with; where GGUF parsers were broken by such a file before
ORIGINS = {
    "n_kv-": "CVE-2024-23605: n_kv overflows an allocation",
    "n_tensors-": "CVE-2024-21836: n_tensors overflows an allocation",
    "key-length-": "CVE-2024-23496: a string's length overflows a buffer",
    "string-length-": "CVE-2024-23496: a string's length overflows a buffer",
    "tensor-name-length-": "CVE-2024-23496: a string's length overflows a buffer",
    "array-u8-count-": "CVE-2024-21825: an array's count overflows; PyPI gguf 0.19.0 hangs",
    "array-f64-count-": "CVE-2024-21825: an array's count overflows; PyPI gguf 0.19.0 hangs",
    "array-str-count-": "CVE-2024-21825: an array's count overflows; PyPI gguf 0.19.0 hangs",
    "array-str-item-length-": "CVE-2024-21825 and CVE-2024-23496 together",
    "array-nested": "legal in the specification, refused by ggml",
    "n_dims-": "CVE-2024-21802: dimensions past the end of their array",
    "dims[": "CVE-2024-21802: dimensions that are believed",
    "elements-": "CVE-2026-33298: the product of dimensions overflows",
    "nbytes-": "CVE-2026-33298: a tensor's bytes overflow",
    "pad-wraps": "GGML_PAD wraps",
    "sizes-wrap": "CVE-2025-53630 and CVE-2026-27940: the sum of tensor sizes overflows",
    "second-offset-": "tensors that overlap, or leave a gap",
    "alignment-": "padding by a divisor of 0, or one that wraps",
    "key-twice": "two readers, two values",
    "tensor-twice": "two readers, two tensors",
    "git-lfs": "not an attack: what a clone without git-lfs holds",
}
STRICTER = {
    "nbytes-block-product-wraps": "ggml lets ne0 * 34 wrap, so a row of 2^59 bytes passes for one of a few; its loader "
    "refuses the shape later, a tool that only reads the header does not",
}


def origin(name: str) -> str:
    return next((text for start, text in ORIGINS.items() if name.startswith(start)), "")


def _attack(name: str, bad: bad_gguf.Bad) -> Attack:
    answers = everywhere(Refuses(bad.offset, bad.field))
    return Attack(name, "header", {"m.gguf": bad.data}, answers, origin=origin(name), note=STRICTER.get(name, ""))


CASES = {name: _attack(name, bad) for name, bad in bad_gguf.CASES.items()}
