"""`make bench`: every benchmark, one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("kernels", "bound", "open", "extend")


def main() -> int:
    """Run them all; the exit code is that of the first that failed."""
    for name in NAMES:
        print(f"\n== {name}", flush=True)
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
