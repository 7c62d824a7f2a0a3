"""What is fuzzed of the Python layer, one function a target: bytes in, nothing out, an exception for a broken promise.

The promises: a file ends in an answer or in one MrropeError that is fit to print, never in another exception; what is
refused leaves nothing behind; extend and revert bring every byte back. They hold for the real commands, so targets
write real files (on /dev/shm where there is one).
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import struct
import tempfile
import zlib
from binascii import b2a_base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

from mrrope_gguf.errors import FileTrouble, MrropeError
from mrrope_gguf.extend import extend
from mrrope_gguf.fit import fit
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.undo import undo_key
from mrrope_gguf.inspect import inspect
from mrrope_gguf.radix_file import read_radix
from mrrope_gguf.revert import revert
from mrrope_gguf.sessions.entry import check_state, read_head, seal
from mrrope_gguf.sessions.named import read_named, sealed
from mrrope_gguf.sessions.sampling import Sampling
from mrrope_gguf.sessions.transcript import Transcript
from mrrope_gguf.user_key import user_key
from tests.fuzz.seeds import extendable
from tests.gguf_bytes import STRING, kv, pad, string

Target = Callable[[bytes], None]
_RENDERINGS: tuple[Literal["auto", "portable", "engine"], ...] = ("auto", "portable", "engine")
_TOKENS = range(40)


@cache
def _scratch() -> Path:
    """A folder for one process; where a fuzzer ends without ceremony, who started it removes what TMPDIR names."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder, emptied afterwards."""
    folder = _scratch() / "models"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        for left in folder.iterdir():
            left.unlink()


def require(true: bool, promise: str) -> None:
    if not true:
        raise AssertionError(promise)


def _refusal(error: MrropeError) -> None:
    """What a user would see of it."""
    require(bool(error.what), "an error says what")
    for line in str(error).split("\n"):
        require(line.isprintable(), f"an error can be printed: {line!r}")


def _try(call: Callable[[], Any]) -> Any:
    """The call's result, None where it refused."""
    try:
        return call()
    except MrropeError as error:
        _refusal(error)
    return None


def show(data: bytes) -> None:
    """A stranger's GGUF to `inspect`, `fit` and `extend --dry-run`."""
    with _folder() as folder:
        path = folder / "model.gguf"
        path.write_bytes(data)
        found = _try(lambda: inspect(path))
        if found is not None:
            json.dumps(found.to_json())
            require(all(line.isprintable() for line in found.render().split("\n")), "inspect can be printed")
        fitted = _try(lambda: fit(path))
        if fitted is not None:
            json.dumps(fitted.to_json())
            require(all(line.isprintable() for line in fitted.render().split("\n")), "fit can be printed")
        for rendering in _RENDERINGS:
            _try(lambda: extend(path, scale=2, dry_run=True, rendering=rendering))  # noqa: B023
        require(set(folder.iterdir()) == {path} and path.read_bytes() == data, "looking changes nothing")


def edit(data: bytes) -> None:
    """Extend what can be extended, extend it again, and bring it back: the identity."""
    choice = zlib.crc32(data)
    rendering = _RENDERINGS[choice % 3]
    with _folder() as folder:
        source, once, twice, back = (folder / f"{name}.gguf" for name in ("source", "once", "twice", "back"))
        source.write_bytes(data)
        done = _try(lambda: extend(source, once, scale=2, rendering=rendering, force=True))
        if done is None:
            require(set(folder.iterdir()) == {source}, "a refusal leaves nothing behind")
            return
        original = _original(source, data)
        with open_gguf(once) as index:
            require(index.get(f"{index.arch}.context_length") == done.n_ctx, "the new file has the new context")
        revert(once, back)
        require(back.read_bytes() == original, "revert brings every byte back")
        if _try(lambda: extend(once, twice, scale=3.5, method="yarn", rendering=rendering)) is not None:
            revert(twice, back, force=True)
            require(back.read_bytes() == original, "revert of what was extended twice brings every byte back")
        require(source.read_bytes() == data, "the source is as it was")
        if choice >> 8 & 1:
            extend(source, scale=2, in_place=True, rendering=rendering, force=True)
            revert(source)
            require(source.read_bytes() == original, "an in-place change is undone to the byte")


def _original(source: Path, data: bytes) -> bytes:
    """What `revert` should bring back: of a file that came extended, the file it was made from."""
    with Source.open(source) as opened:
        if not opened.was_extended:
            return data
    revert(source, source.with_name("original.gguf"))
    return source.with_name("original.gguf").read_bytes()


@cache
def _extended() -> tuple[bytes, bytes, bytes, bytes, int]:
    """An extended file without its undo record: up to n_kv, records, tensor infos, data; and the records it had."""
    with _folder() as folder:
        source, out = folder / "source.gguf", folder / "out.gguf"
        source.write_bytes(extendable())
        extend(source, out, scale=2)
        with open_gguf(out) as index:
            kvs = [index.raw(kv.start, kv.end) for kv in index.kvs.values() if kv.key != undo_key("llama")]
            infos, data = index.raw(index.infos_start, index.infos_end), index.raw(index.data_start, index.size)
            return bytes(index.raw(0, 16)), b"".join(kvs), bytes(infos), bytes(data), len(index.kvs)


def undo(data: bytes) -> None:
    """An undo record made by a stranger: its JSON, NUL and literal bytes are the input."""
    head, kvs, infos, tensors, n = _extended()
    text = b2a_base64(zlib.compress(data, 1), newline=False)
    record = kv(undo_key("llama"), STRING, string(text))
    with _folder() as folder:
        path, back = folder / "model.gguf", folder / "back.gguf"
        path.write_bytes(pad(head + struct.pack("<Q", n) + kvs + record + infos) + tensors)
        before = path.read_bytes()
        _try(lambda: inspect(path))
        _try(lambda: extend(path, back, scale=3))
        back.unlink(missing_ok=True)
        _try(lambda: revert(path, back))
        require(path.read_bytes() == before, "the file is as it was")


def radix(data: bytes) -> None:
    """A table of a user's own."""
    with _folder() as folder:
        path = folder / "table.json"
        path.write_bytes(data)
        found = _try(lambda: read_radix(path))
        if found is not None:
            require(all(0 < factor < float("inf") for factor in (*found.radix, found.lead)), "a table is of numbers")


def session(data: bytes) -> None:
    """A conversation on disk: as it is, and with the proof that the user's key would give it."""
    folder = _scratch() / "named"
    folder.mkdir(exist_ok=True)
    path = folder / "a.json"
    try:
        for raw in (data, sealed(data.rstrip() or b" ", user_key(folder.parent))):
            path.write_bytes(raw)
            values = _try(lambda: read_named(path))
            if values is not None:
                _go_on(values)
    finally:
        path.unlink(missing_ok=True)


def _go_on(values: dict[str, Any]) -> None:
    """What a chat does with a conversation it has read."""
    _try(lambda: Sampling().but(**values["sampling"]))
    vocabulary = cast(Any, SimpleNamespace(n_vocab=100))  # no more of it is asked for
    require(all(0 <= token < 100 for token in Transcript.from_json(vocabulary, values["pieces"]).tokens), "tokens are")


def state(data: bytes) -> None:
    """A saved state: any bytes at its end, and facts of any kind under the user's own key."""
    path = _scratch() / "state"
    key = bytes(32)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        whole = struct.pack("<4sII", b"qsgg", 2, len(_TOKENS)) + struct.pack(f"<{len(_TOKENS)}i", *_TOKENS) + b"state"
        os.write(fd, whole)
        seal(fd, key, list(_TOKENS), whole=True, scale=1.0, parts={"model": "m"}, model="m")
        check_state(fd, read_head(fd, key, {"model": "m"}))
        os.pwrite(fd, data, max(os.fstat(fd).st_size - len(data), 0))
        try:
            head = read_head(fd, key)
            check_state(fd, head)
        except FileTrouble as error:
            _refusal(error)
        else:
            require(list(head.tokens) == list(_TOKENS), "what is accepted is what was saved")
    finally:
        os.close(fd)
        with suppress(OSError):
            path.unlink()


TARGETS: dict[str, Target] = {
    "show": show,
    "edit": edit,
    "undo": undo,
    "radix": radix,
    "session": session,
    "state": state,
}
GGUF_TARGETS, JSON_TARGETS = ("show", "edit"), ("undo", "radix", "session")
