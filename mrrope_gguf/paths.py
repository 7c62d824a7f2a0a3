"""Where things are kept outside the checkout: a cache folder, which may be deleted at any time, and the user's data."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder of mrrope-gguf; MRROPE_CACHE names another one. It may not exist yet."""
    if named := os.environ.get("MRROPE_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "mrrope-gguf"


def data_dir() -> Path:
    """The user's data folder of mrrope-gguf, where conversations are kept; MRROPE_DATA names another one."""
    if named := os.environ.get("MRROPE_DATA"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        return cache_dir() / "data"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mrrope-gguf"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "mrrope-gguf"
