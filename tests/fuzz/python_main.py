"""One Python target under atheris, or in a plain loop: `python -m tests.fuzz.python_main TARGET LIBRARY OPTION DIR`.

LIBRARY: the GGUF mutator, or "-". Options are libFuzzer's; the plain loop knows -max_total_time, -seed, -max_len and
-artifact_prefix. The first DIR takes what is found, all are read.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutate = Callable[[bytes, int, int], bytes]


def gguf_mutator(library: str) -> Mutate:
    mutate = ctypes.CDLL(library).gguf_mutate
    mutate.restype, mutate.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint32],
    )

    def call(data: bytes, most: int, seed: int) -> bytes:
        most = max(most, len(data))
        room = ctypes.create_string_buffer(data, most + 1)
        return room.raw[: mutate(room, len(data), most, seed % 2**32)]

    return call


def flip(data: bytes, most: int, seed: int) -> bytes:
    """For what has no structure to know."""
    rng = random.Random(seed)
    out = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out[: rng.randint(1, most)])


def mutator_of(name: str, library: str) -> Mutate:
    from tests.fuzz.json_mutate import mutate
    from tests.fuzz.python_targets import GGUF_TARGETS, JSON_TARGETS

    if name in GGUF_TARGETS and library != "-":
        return gguf_mutator(library)
    return mutate if name in JSON_TARGETS else flip


def with_atheris(name: str, library: str, arguments: list[str]) -> None:
    atheris: Any = importlib.import_module("atheris")  # optional, and without types

    _forget_editable()
    with atheris.instrument_imports(include=["mrrope_gguf"]):
        targets = importlib.import_module("tests.fuzz.python_targets")
    know = mutator_of(name, library)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return bytes(atheris.Mutate(data, most)) if seed % 4 == 0 else know(data, most, seed)

    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name], custom_mutator=mutate)
    atheris.Fuzz()


def _forget_editable() -> None:
    """Have the package found by its folder: atheris cannot look into what an editable install's finder loads."""
    importlib.import_module("mrrope_gguf._native")  # C++, whose place only that finder knows
    for name in [name for name in sys.modules if name.startswith("mrrope_gguf") and not name.endswith("._native")]:
        del sys.modules[name]
    sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__name__.startswith("ScikitBuild")]


def in_a_loop(name: str, library: str, arguments: list[str]) -> int:
    from tests.fuzz.python_targets import TARGETS

    options = {a[1:].partition("=")[0]: a.partition("=")[2] for a in arguments if a.startswith("-")}
    files = [p for a in arguments if not a.startswith("-") for p in sorted(Path(a).iterdir())]
    inputs = [path.read_bytes() for path in files] or [b"{}"]
    mutate, most, done = mutator_of(name, library), int(options.get("max_len", 4096)), 0
    rng = random.Random(int(options.get("seed", 0)) or None)
    end, queue = time.monotonic() + int(options["max_total_time"]), list(inputs)
    while time.monotonic() < end:
        data = queue.pop() if queue else rng.choice(inputs)
        if done >= len(inputs):
            for _ in range(rng.randint(1, 3)):
                data = mutate(data, most, rng.getrandbits(31))
        try:
            TARGETS[name](data)
        except Exception:
            traceback.print_exc()
            Path(f"{options.get('artifact_prefix', './')}crash-{rng.getrandbits(64):x}").write_bytes(data)
            return 1
        done += 1
    print(f"stat::number_of_executed_units: {done}", file=sys.stderr)
    return 0


def main() -> int:
    name, library, *arguments = sys.argv[1:]
    if "-plain" in arguments or importlib.util.find_spec("atheris") is None:
        return in_a_loop(name, library, [a for a in arguments if a != "-plain"])
    with_atheris(name, library, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
