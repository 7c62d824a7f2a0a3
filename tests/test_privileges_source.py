"""What the sources never do: hand strings to a shell, run data as code, unpickle, write to names one can guess."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "mrrope_gguf").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])

# calls that run a string as a program or as a shell command, or build objects that a file names
FORBIDDEN = {
    "os.system", "os.popen", "os.execl", "os.execlp", "os.execv", "os.execvp", "os.spawnl", "os.spawnv", "os.spawnvp",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn", "commands.getoutput",
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "code.interact", "runpy.run_path",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.loads",
    "cloudpickle.loads", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "jsonpickle.decode",
    "tempfile.mktemp", "os.tempnam", "os.tmpnam", "tarfile.TarFile.extractall", "shutil.unpack_archive",
    "xml.etree.ElementTree.parse", "xml.dom.minidom.parse", "xml.sax.parse",
}  # fmt: skip
METHODS = {"extractall"}  # of whatever object: archives are unpacked member by member
RUNS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "telnetlib", "ftplib"}


def names_of(tree: ast.AST) -> dict[str, str]:
    """What each imported name means: {"sp": "subprocess"} of `import subprocess as sp`."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {top: top for top in (a.name.split(".")[0] for a in node.names if not a.asname)}
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    return found


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of a called thing, as far as the source tells: 'subprocess.run'."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "?"


def offences(source: str) -> Iterator[str]:
    """Each call or import of a source that must not be, as 'line: what'."""
    tree = ast.parse(source)
    names = names_of(tree)
    local = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {m}" for m in modules if m.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        if (name in FORBIDDEN and name not in local) or name.rpartition(".")[2] in METHODS:
            yield f"{node.lineno}: {name}"
        if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
            yield f"{node.lineno}: {name} without weights_only"
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None)
            if keyword.arg == "shell" and not off:
                yield f"{node.lineno}: {name}(shell=...)"
            if keyword.arg == "allow_pickle" and not off:
                yield f"{node.lineno}: {name}(allow_pickle=...)"
        if name in RUNS:
            command = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "args"), None)
            if isinstance(command, (ast.JoinedStr, ast.BinOp)) and not _is_list(command):
                yield f"{node.lineno}: {name} of one string"
            if isinstance(command, ast.Constant):
                yield f"{node.lineno}: {name} of one string"


def _is_list(node: ast.expr) -> bool:
    return isinstance(node, (ast.List, ast.Tuple)) or (isinstance(node, ast.BinOp) and _is_list(node.left))


def guessable(source: str) -> Iterator[str]:
    """Names of files made from the process's number: somebody else can have put a link there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr) and "getpid()" in (text := ast.unparse(node)) and "token_hex" not in text:
            yield f"{node.lineno}: {text}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_does(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert list(offences(source)) == []
    assert list(guessable(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.system('x')",
        "from os import popen as p; p('x')",
        "import subprocess as sp; sp.run('x', shell=True)",
        "import subprocess; subprocess.run(['x'], shell=loud)",
        "import subprocess; subprocess.run(f'rm {x}')",
        "import subprocess; subprocess.Popen(args='rm ' + x)",
        "import subprocess; subprocess.check_output('ls')",
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "from yaml import load",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import tarfile; tarfile.open(x).extractall(y)",
        "import tempfile; tempfile.mktemp()",
        "import torch; torch.load(x)",
    ],
)
def test_what_must_not_be_is_found(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess; subprocess.run(['x', y], shell=False)",
        "import subprocess; subprocess.run([*a, b] + c)",
        "import re; re.compile('x')",
        "def eval(args): ...\neval(1)",
        "host.eval(1)",
        "import torch; torch.load(x, weights_only=True)",
    ],
)
def test_what_may_be_is_not_found(source: str) -> None:
    assert not list(offences(source))


def test_a_name_that_can_be_guessed_is_found() -> None:
    assert list(guessable("path.with_name(f'.{name}.{os.getpid()}')"))
    assert not list(guessable("path.with_name(f'.{os.getpid()}-{secrets.token_hex(4)}')"))


def test_all_sources_are_looked_at() -> None:
    assert {"mrrope_gguf/engine/sdist.py", "mrrope_gguf/chat/run.py", "tools/train_tiny.py"} <= {
        path.relative_to(ROOT).as_posix() for path in SOURCES
    }
