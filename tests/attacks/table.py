"""docs/attacks.md: every attack, what the commands answer and what stock llama.cpp does, asked anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.attacks.case import COMMANDS, READS, Accepts, Answer, Attack, Refuses
from tests.attacks.cases import CASES, GROUPS
from tests.attacks.launcher import MIB, ROOT, Launcher, Ran
from tests.attacks.stock import ACCEPTS, REFUSES

PAGE = ROOT / "docs" / "attacks.md"
ADDRESS, SECONDS = 4096 * MIB, 10  # what stock may take: enough for any header it accepts
_HEAD = """# Hostile files

{total} files that a stranger could send, one malformation each, and what happens when `mrrope inspect`, `extend` (to a
new file and `--in-place`), `fit` and `chat` are given one: an answer of one error, exit code 1, within 1 s of CPU and
64 MiB of memory beyond what the command takes for a sound file, nothing written, the file as it was. An error names the
field and the byte it stands at. Beside it, what stock llama.cpp does with the same file
{release}: *reader* is ggml's `gguf_init_from_file` with the checks that the loader makes of tensor
extents and names, *load* is `llama_model_load_from_file`, a context and one token. Each ran in a process of its own,
held to 4 GiB and 10 s.

Made by `python -m tests.attacks`; tests/test_attacks_stock.py asks stock again and compares this page. `make test-hard`
runs every command on every file; CI gives a malformed header to `inspect` and one other command by turns, the other
files to all (tests/test_attacks.py). Numbers in brackets are notes below each table: why one command accepts what
others refuse, and where we are stricter than stock. **What stock refuses or dies of, `chat` refuses**, the command that
hands a file to llama.cpp; {crashes} of these files end a process that loads them with stock, and none ends ours.
"""


@dataclass(frozen=True)
class Stock:
    """What ggml's reader and llama.cpp's loader do: accepts, refuses, SIGABRT, ..., hangs."""

    reader: str
    load: str

    @property
    def accepts(self) -> bool:
        return self.load == "accepts"

    @property
    def dies(self) -> bool:
        return self.load not in ("accepts", "refuses")


def stock_verdicts(folder: Path) -> dict[str, Stock]:
    """Ask stock about every attack."""
    out = {}
    with Launcher("stock", folder / "launcher") as launcher:
        for name, attack in CASES.items():
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            given = str(attack.write(work))
            # a file of gigabytes is mapped whole, which costs address space and no memory
            address = ADDRESS + max(attack.sizes.values(), default=0)
            ran = [launcher.run([how, given], work, address=address, seconds=SECONDS) for how in ("ggml", "llama")]
            out[name] = Stock(*map(_verdict, ran))
    return out


def _verdict(ran: Ran) -> str:
    if ran.hung:
        return "hangs"
    if ran.code < 0:
        return {-6: "aborts", -11: "crashes", -8: "crashes", -7: "crashes"}.get(ran.code, f"signal {-ran.code}")
    return {ACCEPTS: "accepts", REFUSES: "refuses"}[ran.code]


def disagreements(stock: dict[str, Stock]) -> Iterator[str]:
    """Attacks that we take though stock does not, or that we refuse for no reason written down."""
    for name, attack in CASES.items():
        ours = attack.answers["chat"]  # the command that hands a file to llama.cpp
        if isinstance(ours, Accepts) and not stock[name].accepts:
            yield f"{name}: stock {stock[name].load}, chat accepts it"
        if stock[name].accepts and attack.refuses and not attack.note:
            yield f"{name}: stock accepts it, and no note says why we do not"
        if not stock[name].accepts and stock[name].reader == "accepts" and attack.group == "header" and not attack.note:
            yield f"{name}: ggml's reader accepts it, and no note says why we do not"


def page(stock: dict[str, Stock]) -> str:
    from importlib.metadata import version

    crashes = sum(one.dies for one in stock.values())
    release = f"(llama-cpp-python {version('llama-cpp-python')})"
    parts = [_HEAD.format(total=len(CASES), release=release, crashes=crashes)]
    for group, title in GROUPS.items():
        parts.append(_section(title, [a for a in CASES.values() if a.group == group], stock))
    return "\n".join(parts)


def _section(title: str, attacks: list[Attack], stock: dict[str, Stock]) -> str:
    notes: dict[str, int] = {}

    def numbered(text: str) -> str:
        return f" [{notes.setdefault(text, len(notes) + 1)}]" if text else ""

    rows = []
    for attack in attacks:
        seen = stock[attack.name]
        theirs = f"{seen.reader} | {seen.load}"
        ours = "; ".join(_answers(attack, numbered))
        rows.append(f"| {attack.name} | {ours}{numbered(attack.note)} | {theirs} | {attack.origin} |")
    head = ["| file | mrrope | reader | load | seen before |", "|---|---|---|---|---|"]
    listed = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join([f"## {title}", "", *head, *rows, *([""] if listed else []), *listed, ""])


def _answers(attack: Attack, numbered: object) -> Iterator[str]:
    """One phrase for each answer, with the commands that give it where they differ."""
    assert callable(numbered)
    grouped: dict[Answer, list[str]] = {}
    for command in COMMANDS:
        grouped.setdefault(attack.answers[command], []).append(command)
    for answer, commands in sorted(grouped.items(), key=lambda pair: isinstance(pair[0], Accepts)):
        who = "" if len(grouped) == 1 else f"{_names(commands)}: "
        match answer:
            case Refuses(offset, field):
                yield f"{who}refused, `{field}` at {offset}"
            case Accepts(why):
                yield f"{who}accepted{numbered(why)}"
            case _:
                yield f"{who}refused, “{answer.words}”{numbered(answer.why)}"


def _names(commands: list[str]) -> str:
    return "all but inspect" if tuple(commands) == READS else ", ".join(commands)
