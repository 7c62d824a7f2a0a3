"""The command line of `mrrope serve`; cli.py puts it into the whole."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Refused
from .text import printable

if TYPE_CHECKING:
    from .cli import Verbs
    from .serve import Wish

METHODS = ("mrrope-uni", "mrrope-pro")
_SWITCH = {
    **dict.fromkeys(("on", "enabled", "true", "1"), True),
    **dict.fromkeys(("off", "disabled", "false", "0"), False),
}
_NUMBERS = ("ctx_size", "parallel", "batch_size", "ubatch_size", "cache_ram", "threads", "port")

# what is not given is taken from the environment, under llama.cpp's names
_ENVIRONMENT = {
    "ctx_size": "CTX_SIZE", "cache_type_k": "CACHE_TYPE_K", "cache_type_v": "CACHE_TYPE_V", "flash_attn": "FLASH_ATTN",
    "parallel": "N_PARALLEL", "kv_unified": "KV_UNIFIED", "batch_size": "BATCH", "ubatch_size": "UBATCH",
    "cache_ram": "CACHE_RAM", "n_gpu_layers": "N_GPU_LAYERS", "threads": "THREADS", "rpc": "RPC", "host": "HOST",
    "port": "PORT", "elastic": "ROPE_ELASTIC",
}  # fmt: skip


def add_serve(
    verbs: Verbs,
    model: Callable[[argparse.ArgumentParser], None],
    tokens: Callable[[str], int],
    kv_types: Sequence[str],
) -> None:
    p = verbs.add_parser(
        "serve", help="the patched llama-server on a file: OpenAI's API and a web page",
        usage="mrrope serve MODEL [options] [-- llama-server's own arguments]",
    )  # fmt: skip
    model(p)
    p.add_argument("-hf", metavar="USER/MODEL[:QUANT]", help="a model from the Hugging Face Hub in place of MODEL")
    p.add_argument("-c", "--ctx-size", type=tokens, metavar="N", help="tokens, of all slots (default: the file's)")
    p.add_argument("-ctk", "--cache-type-k", choices=kv_types, help="default: f16")
    p.add_argument("-ctv", "--cache-type-v", choices=kv_types, help="default: f16")
    p.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), help="default: on")
    p.add_argument("-np", "--parallel", type=_positive, metavar="N", help="slots (default: 4 that share the context)")
    p.add_argument("-kvu", "--kv-unified", action="store_true", default=None, help="slots of -np N share it too")
    p.add_argument("-b", "--batch-size", type=_positive, metavar="N", help="default: 2048")
    p.add_argument("-ub", "--ubatch-size", type=_positive, metavar="N", help="default: 512")
    p.add_argument(
        "-cram", "--cache-ram", type=_number, metavar="MIB",
        help="for conversations that wait (default: half of what is left, 8192 at most)",
    )  # fmt: skip
    p.add_argument("-ngl", "--n-gpu-layers", metavar="N", help="layers on the GPU (default: as many as fit)")
    p.add_argument("-t", "--threads", type=_positive, metavar="N", help="default: all cores")
    p.add_argument("-tb", "--threads-batch", type=_positive, metavar="N", help="for prompts (default: the same)")
    p.add_argument("--rpc", metavar="HOST:PORT,...", help="hand layers to rpc-servers on other machines")
    p.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    p.add_argument("--port", type=_port, metavar="N", help="default: 8080; 0 for any that is free")
    grow = p.add_mutually_exclusive_group()
    grow.add_argument("--elastic", dest="elastic", action="store_true", default=None, help="S grows")
    grow.add_argument("--static", dest="elastic", action="store_false", help="S is fixed (default: as the file says)")
    p.add_argument("--method", choices=METHODS, help="a table for a file that was not extended")
    p.add_argument("-s", "--scale", type=float, metavar="S", help="its S: new context / the file's")
    p.add_argument("--page", action=argparse.BooleanOptionalAction, default=True, help="the web page (default: with)")
    p.add_argument("-f", "--force", action="store_true", help="start it though memory will not do")
    p.add_argument("-v", "--verbose", action="store_true", help="the server's whole log (default: its warnings)")
    p.set_defaults(extra=(), kv_types=tuple(kv_types))


def split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The arguments of serve, and those after `--`, which are llama-server's.

    >>> split(["serve", "m.gguf", "--", "--temp", "0"])
    (['serve', 'm.gguf'], ('--temp', '0'))
    >>> split(["inspect", "--", "-m.gguf"])
    (['inspect', '--', '-m.gguf'], ())
    """
    words = list(argv)
    if words[:1] != ["serve"] or "--" not in words:
        return words, ()
    at = words.index("--")
    return words[:at], tuple(words[at + 1 :])


def wish(args: argparse.Namespace, path: Path) -> Wish:
    """What was asked for. Refused where a LLAMA_ARG_ variable is none of its kind's values."""
    from .serve import Wish
    from .serve_net import rpc_servers

    given = {name: getattr(args, name) for name in _ENVIRONMENT}
    for name, value in given.items():
        if value is None:
            given[name] = _from_environment(name, args.kv_types)
    return Wish(
        path,
        n_ctx=given["ctx_size"] or 0,
        type_k=given["cache_type_k"] or "f16",
        type_v=given["cache_type_v"] or "f16",
        flash_attn=given["flash_attn"] or "on",
        n_slots=given["parallel"],
        unified=given["kv_unified"],
        n_batch=given["batch_size"] or 2048,
        n_ubatch=given["ubatch_size"] or 512,
        cache_ram=given["cache_ram"],
        method=args.method,
        scale=args.scale,
        elastic=given["elastic"],
        n_gpu_layers=given["n_gpu_layers"],
        threads=given["threads"],
        threads_batch=args.threads_batch,
        rpc=rpc_servers(given["rpc"]) if given["rpc"] else (),
        host=given["host"] or "127.0.0.1",
        port=8080 if given["port"] is None else given["port"],
        page=args.page,
        verbose=args.verbose,
        force=args.force,
        extra=tuple(args.extra),
    )


def _from_environment(name: str, kv_types: Sequence[str]) -> Any:
    """The value of LLAMA_ARG_..., None where it is not set or asks for llama-server's own default."""
    variable = f"LLAMA_ARG_{_ENVIRONMENT[name]}"
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if name in _NUMBERS:
        if text.removeprefix("-").isdecimal() and text.isascii():
            return None if text.startswith("-") and name != "cache_ram" else int(text)
        raise _no_value(variable, text, "a number")
    if name in ("kv_unified", "elastic"):
        if text.lower() in _SWITCH:
            return _SWITCH[text.lower()]
        raise _no_value(variable, text, "on or off")
    choices = {"flash_attn": ("on", "off", "auto"), "cache_type_k": kv_types, "cache_type_v": kv_types}.get(name)
    if choices and text not in choices:
        raise _no_value(variable, text, ", ".join(choices))
    return text


def _no_value(variable: str, text: str, wanted: str) -> Refused:
    return Refused(f"{variable}={printable(text)}", why=f"it is {wanted}", fix=f"correct it, or unset {variable}")


def _positive(text: str) -> int:
    return _whole(text, 1, 1 << 20)


def _number(text: str) -> int:
    return _whole(text, -1, 1 << 40)


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _whole(text: str, least: int, most: int) -> int:
    if not text.removeprefix("-").isdecimal() or not text.isascii() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)
