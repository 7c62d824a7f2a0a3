"""Which files of a Hub repository `user/model[:quant]` means, by llama.cpp's rules (its common/download.cpp)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import Refused
from .text import printable

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
_SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://", re.IGNORECASE)
_SPEC = re.compile(r"([\w.-]+/[\w.-]+)(?:/(?:(?:blob|resolve|tree)/main(?:/|$))?(.*?))?(?:\?[^:]*)?(?::([\w.-]+))?$")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_LEAVES = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[a-z]:", re.IGNORECASE)  # names that lead out of the cache
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")  # projectors, data for quantising, drafts
_LISTED = 12


@dataclass(frozen=True)
class Wanted:
    """A repository and which of its models: by `file`, a path within it, by `quant`, or neither."""

    repo: str
    quant: str = ""
    file: str = ""

    def __str__(self) -> str:
        return self.repo + (f"/{self.file}" if self.file else f":{self.quant}" if self.quant else "")


def parse(text: str) -> Wanted:
    """What `text` asks for: user/model, user/model:quant, user/model/file.gguf, or a page's address on the Hub.

    Raises Refused for anything else.

    >>> parse("unsloth/Qwen3-8B-GGUF:q4_k_m")
    Wanted(repo='unsloth/Qwen3-8B-GGUF', quant='q4_k_m', file='')
    >>> parse("https://huggingface.co/user/model/blob/main/BF16/m.gguf").file
    'BF16/m.gguf'
    """
    found = _SPEC.match(_SITE.sub("", text.strip(), count=1))
    repo, file, quant = (found[1], found[2] or "", found[3] or "") if found else ("", "", "")
    if quant.lower().endswith(".gguf"):
        file, quant = quant, ""
    if not repo or (file and (quant or not file.lower().endswith(".gguf"))):
        raise Refused(
            f"{printable(text)}: this names nothing on the Hub",
            why="a model there is called user/model, user/model:quant or user/model/file.gguf",
            fix="for instance -hf HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:Q8_0; a file of your own goes without -hf",
        )
    return Wanted(repo, quant, file)


def models(names: Iterable[str]) -> list[str]:
    """The GGUF files that hold a language model, of a split one the first shard alone, sorted."""
    return sorted(name for name in names if _is_model(name) and _shard_number(name) == 1)


def choose(wanted: Wanted, names: Iterable[str]) -> tuple[str, ...]:
    """The files to fetch: one, or every shard of a split model in order.

    Without a quant: Q4_K_M, else Q8_0, else the first file. A quant is compared without case, as a whole word of the
    path; a file whose name ends in it goes before one where more follows.
    Raises Refused, with what there is, where nothing fits or a shard is missing.
    """
    names = sorted(name for name in names if not _LEAVES.search(name))
    there = models(names)
    if wanted.file:
        return _shards(wanted, _exact(wanted, names, there), names)
    if not there:
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        raise Refused(
            f"{wanted}: this repository has no model as GGUF",
            why=f"it has {_listed(ggufs)}, which is no language model" if ggufs else "it has no .gguf file at all",
            fix=f"look for a conversion, often called {wanted.repo.split('/')[1]}-GGUF",
        )
    for quant in [wanted.quant] if wanted.quant else DEFAULT_QUANTS:
        if fitting := _of_quant(quant, there):
            return _shards(wanted, fitting[0], names)
    if wanted.quant:
        raise Refused(
            f"{wanted}: there is no such quantisation",
            why=f"the repository has {_listed(there)}",
            fix=f"-hf {wanted.repo}:QUANT with one of those, or -hf {wanted.repo}/FILE",
        )
    return _shards(wanted, there[0], names)


def _is_model(name: str) -> bool:
    base = name.rsplit("/", 1)[-1].lower()
    return base.endswith(".gguf") and not any(part in base for part in _NO_MODELS)


def _shard_number(name: str) -> int:
    found = _SHARD.match(name)
    return int(found[2]) if found else 1


def _of_quant(quant: str, there: list[str]) -> list[str]:
    word = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?=[-./])", re.IGNORECASE)
    last = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?:-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE)
    return sorted((name for name in there if word.search(name)), key=lambda name: not last.search(name))


def _exact(wanted: Wanted, names: list[str], there: list[str]) -> str:
    exact = wanted.file if wanted.file in names else None
    found = exact or next((name for name in names if name.lower() == wanted.file.lower()), None)
    if found is None:
        raise Refused(
            f"{wanted}: there is no such file",
            why=f"the repository has {_listed(there) or 'no model as GGUF'}",
            fix=f"-hf {wanted.repo}/FILE with one of those",
        )
    if not _is_model(found):
        why = "it is a picture encoder, a draft or data for quantising, which goes with a model"
        fix = f"-hf {wanted.repo}"
        raise Refused(f"{wanted}: this file is no language model", why=why, fix=fix)
    return found


def _shards(wanted: Wanted, name: str, names: list[str]) -> tuple[str, ...]:
    found = _SHARD.match(name)
    if found is None:
        return (name,)
    count = int(found[3])
    wished = [f"{found[1]}-{i:05d}-of-{count:05d}{name[-5:]}" for i in range(1, count + 1)]
    missing = [shard for shard in wished if shard not in names]
    if missing:
        raise Refused(
            f"{wanted}: a part of the split model is missing",
            why=f"{count - len(missing)} of {count} are there; not {_listed(missing)}",
            fix="choose another quantisation, or ask the repository's owner",
        )
    return tuple(wished)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(printable(name) for name in names[:_LISTED]) + more
