"""The Python targets, each in a process of its own: under atheris where it is installed, else in a plain loop."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.native_targets import CORPUS, FRESH, Outcome, mutator, outcome
from tests.fuzz.python_targets import GGUF_TARGETS

ROOT = Path(__file__).parent.parent.parent
MAX_LEN = 8192  # an extended file has padding of a block


def has_atheris() -> bool:
    """`pip install atheris`: wheels for Linux, Python 3.11 to 3.13."""
    return importlib.util.find_spec("atheris") is not None


def run(name: str, seconds: int, scratch: Path, *, plain: bool = False, seed: int = 0) -> Outcome:
    """Fuzz a target for `seconds`; what was found new lies in `scratch`/NAME-found, what broke it as crash-*."""
    found = scratch / f"{name}-found"
    found.mkdir(parents=True, exist_ok=True)
    library = mutator(scratch) if name in GGUF_TARGETS else None
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_LEN}", f"-seed={seed}", f"-artifact_prefix={scratch}/"]
    options += ["-timeout=30", "-rss_limit_mb=1536", "-print_final_stats=1", *(["-plain"] if plain else [])]
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="mrrope-fuzz-", dir=memory) as folder:
        command = [sys.executable, "-m", "tests.fuzz.python_main", name, str(library or "-"), *options]
        done = subprocess.run(
            [*FRESH, *command, str(found), str(CORPUS / name)],
            capture_output=True, text=True, errors="replace", cwd=ROOT, timeout=seconds + 180, check=False,
            env={**os.environ, "TMPDIR": folder, "XDG_CACHE_HOME": folder, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return outcome(done.returncode, done.stdout + done.stderr)
