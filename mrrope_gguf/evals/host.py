"""One model on which ways are switched, so that a comparison loads it as seldom as can be.

On the patched engine the unextended file is loaded once and its table set: `none` and every static way share that load.
An elastic way needs a file that says so and a load of its own. On a stock library every static way is an extended file.
Such files are made when they are needed, in a private folder, and are gone as soon as llama.cpp has them open.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import engine
from ..errors import EngineTrouble, FileTrouble, Refused
from ..extend import choose_rendering, extend
from ..facts import RopeFacts, obstacle, read_facts
from ..gguf.source import Source
from ..model import load
from ..progress import Progress
from ..revert import revert
from ..text import printable
from .ways import SAMPLED, Way, reach

if TYPE_CHECKING:
    from llama_cpp import Llama

PREFIX = ".mrrope-eval-"
_File = tuple[str, str, float | None]  # kind, method and scale of an extended file


class Host:
    """A model and the llama_cpp.Llama that runs it now, if any. Use it as a context manager, or `close` it.

    path: a GGUF file, or any shard of a split one; an extended file is measured from its original, which `say` is told.
    n_ctx: tokens of every context, however long the model's own is. None of flash_attn, n_threads (both for prompts and
    for single tokens), type_k, type_v and further arguments of Llama changes from way to way.
    force: as for `extend`, drop a scaling the model was trained with. folder: where extended files are made; by default
    beside the model, where they can share its blocks, else in the system's folder for temporary files. progress: called
    with (bytes done, bytes in all) where such a file must really be copied.

    facts: of the original; n_ctx_orig: the context that scales count from; options: of every load; sets_tables: whether
    tables are set on one load, and not made into files. Raises BadFile, Refused or FileTrouble for a
    file that cannot be measured, EngineTrouble without libllama.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, n_ctx: int, flash_attn: bool = True, n_threads: int | None = None,
        type_k: str | int | None = None, type_v: str | int | None = None, force: bool = False,
        folder: str | os.PathLike[str] | None = None, say: Callable[[str], object] | None = None,
        progress: Progress | None = None, **llama: Any,
    ) -> None:  # fmt: skip
        self.path, self.n_ctx, self.force = Path(path), n_ctx, force
        self.name = printable(self.path.name)
        self.facts, self._was_extended = _original_facts(self.path, self.name)
        self.n_ctx_orig = reach(self.facts, force=force)
        self.settings = {"flash_attn": flash_attn, "n_threads": n_threads, "type_k": type_k, "type_v": type_v}
        threads = {} if n_threads is None else {"n_threads": n_threads, "n_threads_batch": n_threads}
        types = {name: kind for name, kind in (("type_k", type_k), ("type_v", type_v)) if kind is not None}
        self.options = {"flash_attn": flash_attn, **threads, **types, **llama}
        self._folder, self._progress = Path(folder) if folder is not None else None, progress
        self.sets_tables = engine.loaded_library().has_rope_table and self.facts.arch.hook
        self._llm: Llama | None = None
        self._file: _File | None = None
        self.say: Callable[[str], object] = say or (lambda _: None)
        self._left: list[Path] = []  # folders of files in use that this system does not let go
        if self._was_extended:
            window = f"{self.n_ctx_orig} tokens"
            self.say(f"note: {self.name} is an extended file: it is measured from its original ({window})")

    def check(self, ways: Iterable[Way]) -> None:
        """Raise what `switch` would raise for any of these ways, before anything is loaded.

        Refused for a model without a table to set, or with a scaling of its own; EngineTrouble for ways that this
        library cannot run. All elastic ways are named at once.
        """
        ways = list(ways)
        tabled = [way for way in ways if not way.plain]
        if tabled and (refusal := obstacle(self.facts, self.name)):
            raise refusal
        elastic = [way.name for way in ways if way.kind == "elastic"]
        if elastic:
            self._check_elastic(", ".join(elastic))
        for way in tabled:
            table = way.at(int(SAMPLED[0] * self.n_ctx_orig), self.n_ctx_orig)
            table.table(self.facts, self.name, force=self.force)
            if way.kind == "static" and not self.sets_tables:
                self._check_portable(way.name)

    def switch(self, way: Way, length: int | None = None) -> Llama:
        """The model turned to `way`, its memory empty. length: in tokens, for a way of mode B.

        A Llama that was returned before is the same one, or closed: only one has a context at a time. Ways that need
        files, elastic ones among them, are best asked for one after the other. Raises as `check` and `load` do.
        """
        way = way.at(length, self.n_ctx_orig)
        self.check([way])
        file = self._file_for(way)
        if self._llm is None or file != self._file:
            self._unload()
            self._llm, self._file = self._open(file), file
        _empty(self._llm)
        if self.sets_tables and file is None:
            engine.set_table(self._llm, way.table(self.facts, self.name, force=self.force))
        return self._llm

    def plain(self) -> Llama:
        """The model as it is, its memory empty. Raises as `load` does."""
        return self.switch(Way("none", "none", "none", 1.0))

    def close(self) -> None:
        """Give up the model and whatever was made for it."""
        self._unload()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_elastic(self, names: str) -> None:
        if not engine.has_elastic():
            because, fix = engine.why_stock()
            stock = f"the libllama in {engine.loaded_library().path.parent} has static tables only"
            raise EngineTrouble(f"{names}: needs the patched engine", why=f"{stock}; {because}", fix=fix)
        arch = self.facts.arch
        if arch.static_only or not arch.hook:
            note = f" ({arch.note})" * bool(arch.note)
            raise Refused(
                f"{self.name}: {names}: this model has no elastic context",
                why=f"cached keys of architecture '{arch.name}' cannot be rotated again{note}",
                fix="measure the static methods alone",
            )

    def _check_portable(self, name: str) -> None:
        """EngineTrouble unless a file can carry this way's table to a stock library, and to no layer besides."""
        arch = self.facts.arch
        why = f"in a file the {arch.leak} would reach the sliding-window layers of '{arch.name}' too" * bool(arch.leak)
        with Source.open(self.path) as source:
            try:
                choose_rendering(self.facts, source, "portable")
            except Refused as error:
                why = f"no file can carry a table for architecture '{arch.name}' ({error.why})"
        if why:
            because, fix = engine.why_stock()
            raise EngineTrouble(
                f"{self.name}: {name} cannot be measured on a stock library",
                why=f"{why}; {because}",
                fix=fix if arch.hook else "measure none and truncate alone",
            )

    def _file_for(self, way: Way) -> _File | None:
        """The extended file a way needs; None for the original."""
        if way.plain or (way.kind == "static" and self.sets_tables):
            return None
        return way.kind, way.method, way.scale

    def _open(self, file: _File | None) -> Llama:
        if file is None and not self._was_extended:
            return self._load(self.path)
        with self._private() as folder:
            out = folder / self.path.name
            if file is None:
                return self._load(revert(self.path, out, progress=self._progress).path)
            kind, method, scale = file
            elastic = kind == "elastic"
            made = extend(
                self.path, out, method=method, scale=scale, elastic=elastic, force=self.force,
                rendering="engine" if elastic else "portable", progress=self._progress,
            )  # fmt: skip
            return self._load(made.path, elastic=elastic)

    def _load(self, path: Path, elastic: bool | None = None) -> Llama:
        return load(path, self.n_ctx, past_window=True, elastic=elastic, **self.options)

    @contextmanager
    def _private(self) -> Iterator[Path]:
        """A folder that is gone at the end, though what lies in it be open: systems but Windows keep an open file."""
        folder = self._make_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                self._left.append(folder)

    def _make_folder(self) -> Path:
        places = [self._folder] if self._folder else [self.path.resolve().parent, Path(tempfile.gettempdir())]
        for place in places:
            try:
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            except OSError as error:
                trouble = error
        raise FileTrouble(
            f"{self.name}: no place for an extended file",
            why=str(trouble),
            fix="free some space, or name a folder that can be written",
        )

    def _unload(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            with engine.capture():  # llama.cpp remarks on the size of what it frees
                llm.close()
        while self._left:
            shutil.rmtree(self._left.pop(), ignore_errors=True)


def _original_facts(path: Path, name: str) -> tuple[RopeFacts, bool]:
    """The facts of the model before it was extended, and whether it was."""
    with Source.open(path) as source:
        facts = read_facts(source.index)
        if facts.mrrope is not None:
            raise Refused(
                f"{name}: this extended file cannot be measured",
                why="its undo record is gone, so the model it was made from cannot be had back to compare with",
                fix="measure the original file",
            )
        return facts, source.was_extended


def _empty(llm: Llama) -> None:
    """Forget every token, so that a table can be set whatever the architecture."""
    api = engine.llama_cpp()
    llm.reset()
    api.llama_memory_clear(api.llama_get_memory(llm._ctx.ctx), False)
