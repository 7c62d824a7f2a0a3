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
