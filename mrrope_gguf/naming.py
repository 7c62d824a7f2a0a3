"""File names by GGUF's convention: BaseName-SizeLabel-FineTune-Version-Encoding, the context as a size attribute.

Source: ggml's naming document, whose own attribute example reads `...-8B-ContextLength128k-...`.
"""

from __future__ import annotations

import re
from pathlib import Path

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_CONTEXT = re.compile(r"[- ]ContextLength\d+[km]?(?=[-. ]|$)", re.IGNORECASE)
# 8B, 270m, 1.5B, 8x7B, 0.6b; then further size attributes such as -A3B
_SIZE = re.compile(r"[-_]\d+(?:x\d+)?(?:\.\d+)?[KMBTQ](?:[-_]A\d+(?:\.\d+)?[KMBTQ])?(?=[-_.]|$)", re.IGNORECASE)
_ENCODING = re.compile(r"[-_.](?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32|FP16)$", re.IGNORECASE)


def context_label(n_ctx: int) -> str:
    """`n_ctx` tokens as the convention writes them.

    >>> context_label(32768), context_label(1048576), context_label(10000)
    ('32k', '1024k', '10000')
    """
    return f"{n_ctx // 1024}k" if n_ctx % 1024 == 0 else str(n_ctx)


def with_context(text: str, n_ctx: int) -> str:
    """A model's file stem or display name with its new context after the size label, replacing one already there.

    >>> with_context("SmolLM2-135M-Instruct.Q4_1", 32768)
    'SmolLM2-135M-ContextLength32k-Instruct.Q4_1'
    >>> with_context("my-model-Q8_0", 65536)
    'my-model-ContextLength64k-Q8_0'
    >>> with_context("Qwen3-30B-A3B-ContextLength128k-Q4_K_M-00001-of-00003", 262144)
    'Qwen3-30B-A3B-ContextLength256k-Q4_K_M-00001-of-00003'
    """
    shard = _SHARD.search(text)
    stem = _CONTEXT.sub("", text[: shard.start()] if shard else text)
    size = _SIZE.search(stem) or _SIZE.search(stem.replace(" ", "-"))
    encoding = _ENCODING.search(stem)
    at = size.end() if size else encoding.start() if encoding else len(stem)
    dash = " " if " " in stem else "-"
    return f"{stem[:at]}{dash}ContextLength{context_label(n_ctx)}{stem[at:]}{shard.group() if shard else ''}"


def default_path(source: Path, n_ctx: int) -> Path:
    """Where `extend` writes when no DST is given: beside the source, its name with the new context.

    The Hub's cache belongs to the Hub's programs, which delete what they do not know: from there, the current folder.
    """
    name = with_context(source.stem, n_ctx) + source.suffix
    return Path.cwd() / name if in_hub_cache(source) else source.with_name(name)


def in_hub_cache(path: Path) -> bool:
    """Whether a path leads through the cache that the Hub's programs share: models--USER--NAME/snapshots/REVISION/...

    >>> in_hub_cache(Path("/c/models--user--m/snapshots/1f/Q8_0/m.gguf")), in_hub_cache(Path("/models--a/m.gguf"))
    (True, False)
    """
    parents = path.absolute().parents
    return any(folder.name == "snapshots" and folder.parent.name.startswith("models--") for folder in parents)
