"""All that ggml's own reader finds in a GGUF file, told by a process of its own, because ggml may abort.

with GgmlReader() as ggml:
    reading = ggml.read(path)     # None where it refuses the file

Run as a script it reads paths from stdin and answers each with a line of JSON. Strings come through its API as C
strings, so they end at a NUL here; other values are raw bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import ggml_oracle
from tests.gguf_bytes import ARRAY, SIZES, STRING

C_STRING = ctypes.c_char_p


class Record(NamedTuple):
    """A metadata record of `n` items; `value` holds their bytes: in one piece, or one for each string."""

    key: bytes
    type: int
    item: int | None
    n: int
    value: tuple[bytes, ...]


class Info(NamedTuple):
    """A tensor as a reader sees it; `dims` as the file has them, or four where the reader keeps no number of them."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


class Reading(NamedTuple):
    version: int
    alignment: int
    data_start: int
    records: list[Record]
    tensors: list[Info]


class GgmlReader:
    """A process that reads files with ggml; it is started again after an abort."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> GgmlReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def read(self, path: Path) -> Reading | None:
        """What ggml reads, None where it refuses. AssertionError where it ends the process."""
        worker = self._process or self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{path}\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            code = worker.wait(20)
            self._end()
            raise AssertionError(f"ggml ended its process ({code}) over {path}")
        found = json.loads(answer)
        return None if found is None else _decoded(found)

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
        return self._process

    def _end(self) -> None:
        worker, self._process = self._process, None
        if worker is None:
            return
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            pipe.close()
        worker.wait(20)


def _decoded(found: dict[str, Any]) -> Reading:
    records = [
        Record(bytes.fromhex(key), kind, item, count, tuple(map(bytes.fromhex, value)))
        for key, kind, item, count, value in found["records"]
    ]
    tensors = [Info(bytes.fromhex(name), tuple(dims), *rest) for name, dims, *rest in found["tensors"]]
    return Reading(found["version"], found["alignment"], found["data_start"], records, tensors)


# --- in the process of its own ----------------------------------------------------------------------------------------


def _library() -> Any:
    ggml = ggml_oracle.load()
    number, pointer, size = ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
    whole: dict[str, Any] = {"version": ctypes.c_uint32, "alignment": size, "n_kv": number}
    for name, result in whole.items():
        getattr(ggml, f"gguf_get_{name}").argtypes = [pointer]
        getattr(ggml, f"gguf_get_{name}").restype = result
    each = {"key": C_STRING, "kv_type": ctypes.c_int, "arr_type": ctypes.c_int, "val_str": C_STRING, "arr_n": size}
    each |= {"val_data": pointer, "arr_data": pointer, "tensor_type": ctypes.c_int}
    each["tensor_ne"] = ctypes.POINTER(number * 4)
    for name, result in each.items():
        getattr(ggml, f"gguf_get_{name}").argtypes = [pointer, number]
        getattr(ggml, f"gguf_get_{name}").restype = result
    ggml.gguf_get_arr_str.argtypes, ggml.gguf_get_arr_str.restype = [pointer, number, size], C_STRING
    return ggml


def _record(ggml: Any, gguf: int, i: int) -> list[Any]:
    kind, item, count = ggml.gguf_get_kv_type(gguf, i), None, 1
    if kind == ARRAY:
        item, count = ggml.gguf_get_arr_type(gguf, i), ggml.gguf_get_arr_n(gguf, i)
    if kind == STRING:
        value = [ggml.gguf_get_val_str(gguf, i)]
    elif item == STRING:
        value = [ggml.gguf_get_arr_str(gguf, i, n) for n in range(count)]
    elif item is not None:
        value = [ctypes.string_at(ggml.gguf_get_arr_data(gguf, i), count * SIZES[item]) if count else b""]
    else:
        value = [ctypes.string_at(ggml.gguf_get_val_data(gguf, i), SIZES[kind])]
    return [ggml.gguf_get_key(gguf, i).hex(), kind, item, count, [part.hex() for part in value]]


def _tensor(ggml: Any, gguf: int, i: int) -> list[Any]:
    dims = list(ggml.gguf_get_tensor_ne(gguf, i).contents)
    numbers = [getattr(ggml, f"gguf_get_tensor_{part}")(gguf, i) for part in ("type", "offset", "size")]
    return [ggml.gguf_get_tensor_name(gguf, i).hex(), dims, *numbers]


def _read(ggml: Any, path: str) -> dict[str, Any] | None:
    held = ctypes.c_void_p()
    gguf = ggml.gguf_init_from_file(os.fsencode(path), ggml_oracle.Params(True, ctypes.pointer(held)))
    if not gguf:
        return None
    found = {
        "version": ggml.gguf_get_version(gguf),
        "alignment": ggml.gguf_get_alignment(gguf),
        "data_start": ggml.gguf_get_data_offset(gguf),
        "records": [_record(ggml, gguf, i) for i in range(ggml.gguf_get_n_kv(gguf))],
        "tensors": [_tensor(ggml, gguf, i) for i in range(ggml.gguf_get_n_tensors(gguf))],
    }
    ggml.ggml_free(held)
    ggml.gguf_free(gguf)
    return found


if __name__ == "__main__":
    library = _library()
    for line in sys.stdin:
        print(json.dumps(_read(library, line.rstrip("\n"))), flush=True)
