"""Small file systems of every kind for tests, in image files: made, mounted, and gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.needs import cannot

NEEDED = "MRROPE_NEED_MOUNTS"
# mkfs refuses less; the images are sparse
_MEGABYTES = {"ext4": 64, "xfs": 320, "btrfs": 128}


@contextmanager
def mounted(kind: str, directory: Path, *options: str, megabytes: int | None = None) -> Iterator[Path]:
    """A fresh file system of this kind (ext4, xfs, btrfs, tmpfs). Skips the test, with the reason, where it cannot.

    Fails it there if MRROPE_NEED_MOUNTS is set.
    """
    if sys.platform != "linux" or os.geteuid():
        cannot(f"mounting {kind} needs Linux and root", NEEDED)
    place = directory / kind
    place.mkdir()
    if kind == "tmpfs":
        _run("mount", "-t", "tmpfs", "-o", ",".join([f"size={megabytes}m", *options]), "tmpfs", str(place))
    else:
        if shutil.which(f"mkfs.{kind}") is None:
            cannot(f"mkfs.{kind} is not installed", NEEDED)
        image = directory / f"{kind}.img"
        with open(image, "wb") as file:
            file.truncate((megabytes or _MEGABYTES[kind]) << 20)
        _run(f"mkfs.{kind}", "-q", str(image))
        _run("mount", "-o", ",".join(["loop", *options]), str(image), str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        cannot(f"{' '.join(command[:3])}: {done.stderr.strip()}", NEEDED)
