"""The package as a user meets it: public names, lazy imports, a help that comes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mrrope_gguf

HEAVY = ("numpy", "llama_cpp", "matplotlib")
ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


@pytest.mark.parametrize("name", mrrope_gguf.__all__)
def test_public_name_is_there(name: str) -> None:
    assert getattr(mrrope_gguf, name) is not None


@pytest.mark.parametrize("name", ["bound", "extend", "fit", "inspect", "revert"])
def test_function_survives_import_of_its_module(name: str) -> None:
    code = f"import mrrope_gguf.{name}; import mrrope_gguf as m; print(callable(m.{name}))"
    assert run(code) == "True"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mrrope_gguf.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "[]"


def test_extend_imports_nothing_heavy(tmp_path: Path) -> None:
    from tests.tiny import make

    make(tmp_path / "tiny.gguf")
    code = (
        "import sys\nfrom mrrope_gguf.cli import main\n"
        f"assert main(['extend', r'{tmp_path / 'tiny.gguf'}', r'{tmp_path / 'long.gguf'}', '--scale', '4']) == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "[]"


def test_no_module_needs_unix_at_load() -> None:
    code = (
        "import sys, pkgutil, importlib\n"
        "for name in ('fcntl', 'resource', 'termios', 'pwd', 'grp'): sys.modules[name] = None\n"
        "import mrrope_gguf\n"
        "names = [m.name for m in pkgutil.walk_packages(mrrope_gguf.__path__, 'mrrope_gguf.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    assert int(run(code)) > 20
