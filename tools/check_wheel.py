"""Install the newest wheel of a folder into a clean virtual environment and use it there.

python tools/check_wheel.py dist
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

USE = """
import numpy as np, mrrope_gguf as m
assert "site-packages" in m.__file__, m.__file__
t = m.rope_table("mrrope-pro", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=4)
assert (t.d_l, t.d_h, m.bound(t)) == (20, 46, 5490), (t.d_l, t.d_h, m.bound(t))
x = np.ones((3, 2, 128), np.float32)
assert np.isfinite(m.rope(x, np.arange(3), t)).all()
from mrrope_gguf.engine.pins import header, pins
assert header().is_file() and all(pin.patch.is_file() and "site-packages" in str(pin.patch) for pin in pins().values())
assert abs(float(m.nll(np.zeros((1, 8), np.float32), np.array([3]))[0]) - np.log(8)) < 1e-6
"""


def main() -> None:
    """Exit with an error if the wheel does not install or does not work."""
    wheels = sorted(Path(sys.argv[1]).glob("mrrope_gguf-*.whl"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin")
        python = str(binaries / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheels[-1])], check=True)
        subprocess.run([python, "-c", USE], check=True, cwd=folder)
        subprocess.run([str(binaries / "mrrope"), "doctor"], check=True, cwd=folder)
    print(f"{wheels[-1].name}: installs and works in a clean environment")


if __name__ == "__main__":
    main()
