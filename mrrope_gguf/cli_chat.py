"""The command line of the verbs around a conversation; cli.py puts it into the whole."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cli import Verbs


def add_export(verbs: Verbs, model: Callable[[argparse.ArgumentParser], None], tokens: Callable[[str], int]) -> None:
    p = verbs.add_parser("export", help="hand a model over to Ollama, LM Studio or llama-server")
    p.add_argument("target", choices=("ollama", "lmstudio", "llama-server"), help="a Modelfile; a place; a command")
    model(p)
    p.add_argument("-o", "--out", metavar="DIR", help="write there: a Modelfile, or into LM Studio's folder of models")
    p.add_argument("-c", "--ctx-size", type=tokens, default=0, metavar="N", help="tokens (default: all of the file's)")
    p.add_argument("-f", "--force", action="store_true", help="replace what is there")


def add_chat(verbs: Verbs, tokens: Callable[[str], int], kv_types: tuple[str, ...]) -> None:
    from .chat.options import flash, gpu_layers

    p = verbs.add_parser("chat", help="talk with a model about long documents; one answer with -p or in a pipe")
    p.add_argument("gguf", nargs="?", metavar="MODEL", help="a GGUF file (any shard of a split one)")
    p.add_argument("-m", "--model", dest="model_flag", metavar="FILE", help="the same, as llama.cpp spells it")
    p.add_argument(
        "-hf", "-hfr", "--hf-repo", dest="hf", metavar="USER/MODEL[:QUANT]", help="from the Hugging Face Hub"
    )
    p.add_argument("-c", "--ctx-size", type=tokens, metavar="N", help="tokens of context (default 0: from the model)")
    p.add_argument("-f", "--file", action="extend", nargs="+", metavar="FILE", help="text, Markdown, HTML or PDF")
    p.add_argument("-p", "--prompt", metavar="TEXT", help="answer this once, and leave")
    p.add_argument("-sys", "--system-prompt", metavar="TEXT", help="instructions for the model")
    p.add_argument("--session", metavar="NAME", help="keep the conversation under this name, or go on with it")
    p.add_argument("-ctk", "--cache-type-k", choices=kv_types, metavar="TYPE", help="of the KV cache (default: f16)")
    p.add_argument("-ctv", "--cache-type-v", choices=kv_types, metavar="TYPE", help=", ".join(kv_types))
    p.add_argument("-fa", "--flash-attn", type=flash, metavar="on|off|auto", help="default: on")
    p.add_argument("-b", "--batch-size", type=_count, metavar="N", help="tokens read at once (default: 512)")
    p.add_argument("-ub", "--ubatch-size", type=_count, metavar="N", help="the same within llama.cpp (default: 512)")
    p.add_argument(
        "-ngl", "--gpu-layers", "--n-gpu-layers", type=gpu_layers, metavar="N", help="a number, auto (default) or all"
    )
    p.add_argument("-t", "--threads", type=_count, metavar="N", help="default: half of the cores, and all to read")
    p.add_argument("-tb", "--threads-batch", type=_count, metavar="N", help="for reading (default: as -t)")
    p.add_argument("--scale", type=float, metavar="S", help="of a file that was not extended: new / own context")
    p.add_argument("--method", choices=("mrrope-uni", "mrrope-pro"), help="its table (default: mrrope-uni)")
    p.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's whole log")
    _add_sampling(p)


def _add_sampling(p: argparse.ArgumentParser) -> None:
    own = p.add_argument_group("sampling, as llama.cpp has it")
    own.add_argument("--temp", "--temperature", type=float, metavar="T", help="default: 0.8; 0 takes the likeliest")
    own.add_argument("--top-k", type=int, metavar="N", help="default: 40")
    own.add_argument("--top-p", type=float, metavar="P", help="default: 0.95")
    own.add_argument("--min-p", type=float, metavar="P", help="default: 0.05")
    own.add_argument("--typical", "--typical-p", dest="typical_p", type=float, metavar="P", help="default: 1, off")
    own.add_argument("--repeat-last-n", type=int, metavar="N", help="default: 64")
    own.add_argument("--repeat-penalty", type=float, metavar="X", help="default: 1, none")
    own.add_argument("--presence-penalty", type=float, metavar="X", help="default: 0, none")
    own.add_argument("--frequency-penalty", type=float, metavar="X", help="default: 0, none")
    own.add_argument("-s", "--seed", type=int, metavar="N", help="default: -1, another one each time")
    own.add_argument(
        "-n", "--predict", "--n-predict", dest="n_predict", type=int, metavar="N", help="most tokens of an answer"
    )
    own.add_argument("-r", "--reverse-prompt", action="append", metavar="TEXT", help="text that ends an answer")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
