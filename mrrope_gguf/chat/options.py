"""What was asked of `mrrope chat`: the command line, and where that is silent the variables that llama.cpp reads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import Refused
from ..text import printable

T = TypeVar("T")
SAMPLING = (
    "temp", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "seed", "n_predict", "reverse_prompt",
)  # fmt: skip
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
AUTO = -1  # of gpu_layers: as many as fit


@dataclass(frozen=True)
class Options:
    """One value for every flag; None is "not given". n_ctx 0 is the file's own. sampling: only what was given."""

    model: str | None = None
    hf: str | None = None
    n_ctx: int = 0
    files: tuple[str, ...] = ()
    prompt: str | None = None
    system: str | None = None
    session: str | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    n_batch: int = 512
    n_ubatch: int = 512
    gpu_layers: int = AUTO
    threads: int | None = None
    threads_batch: int | None = None
    scale: float | None = None
    method: str | None = None
    verbose: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


def from_args(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Options:
    """The options of a parsed command line (cli_chat.add_chat); LLAMA_ARG_* fill what it leaves open.

    Raises Refused for a variable whose value is none.
    """
    env = _Environment(os.environ if environ is None else environ)
    named = [name for name in (args.gguf, args.model_flag, args.hf) if name]
    if len(named) > 1:
        raise Refused("the model is named twice", why=" and ".join(map(printable, named)), fix="name one of them")
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if "n_predict" not in sampling and (n := env.get("N_PREDICT", int, None)) is not None:
        sampling["n_predict"] = n
    return Options(
        model=args.gguf or args.model_flag or (None if named else env.get("MODEL", str, None)),
        hf=args.hf or (None if named else env.get("HF_REPO", str, None)),
        n_ctx=_given(args.ctx_size, env.get("CTX_SIZE", _tokens, 0)),
        files=tuple(args.file or ()),
        prompt=args.prompt,
        system=args.system_prompt,
        session=args.session,
        type_k=_given(args.cache_type_k, env.get("CACHE_TYPE_K", _cache_type, "f16")),
        type_v=_given(args.cache_type_v, env.get("CACHE_TYPE_V", _cache_type, "f16")),
        flash_attn=_given(args.flash_attn, env.get("FLASH_ATTN", flash, True)),
        n_batch=_given(args.batch_size, env.get("BATCH", _positive, 512)),
        n_ubatch=_given(args.ubatch_size, env.get("UBATCH", _positive, 512)),
        gpu_layers=_given(args.gpu_layers, env.get("N_GPU_LAYERS", gpu_layers, AUTO)),
        threads=_given(args.threads, env.get("THREADS", int, None)),
        threads_batch=args.threads_batch,
        scale=args.scale,
        method=args.method,
        verbose=args.verbose,
        sampling=sampling,
    )


def gpu_layers(text: str) -> int:
    """A number of layers as -ngl takes it; "all" is more than any model has.

    >>> gpu_layers("auto"), gpu_layers("all"), gpu_layers("12")
    (-1, 1000000, 12)
    """
    if text in ("auto", "all"):
        return AUTO if text == "auto" else 10**6
    n = int(text)
    if n < -1:
        raise ValueError(text)
    return n


def flash(text: str) -> bool:
    """-fa on, off, or auto: on, as every backend of ours has it or does without by itself."""
    switches = {"on": True, "1": True, "true": True, "auto": True, "off": False, "0": False, "false": False}
    return switches[text.lower()]


class _Environment:
    """LLAMA_ARG_* of a process."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def get(self, name: str, read: Callable[[str], T], default: T | None) -> Any:
        text = self._values.get(f"LLAMA_ARG_{name}", "")
        if not text:
            return default
        try:
            return read(text)
        except (ValueError, KeyError, argparse.ArgumentTypeError):
            what = f"LLAMA_ARG_{name}={printable(text)}"
            raise Refused(what, why="it is no value for this setting", fix="change it, or unset it") from None


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _tokens(text: str) -> int:
    n = int(text)
    if not 0 <= n < 2**31:
        raise ValueError(text)
    return n


def _positive(text: str) -> int:
    n = int(text)
    if n < 1:
        raise ValueError(text)
    return n


def _cache_type(text: str) -> str:
    if text not in KV_TYPES:
        raise ValueError(text)
    return text
