"""The operations that faults are made in: an engine built and removed. Compilers run once, before the faults."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mrrope_gguf.engine import build, store
from mrrope_gguf.engine.cmake import Recipe, compile_targets
from mrrope_gguf.errors import Refused
from tests import toy_llama
from tests.faults.injector import Mode
from tests.faults.operation import Met, Operation, contents, fill, sha256


class Build(Operation):
    """`mrrope build`: an engine is whole or not there, fetched sources stay, nothing is left but the lock."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        aside = place.with_name(f"{place.name}.aside")
        os.environ["MRROPE_CACHE"] = str(place)
        fill(place, {})
        digest = toy_llama.put_sdist(place)
        toy_llama.use(aside / "patches", sha256=digest)
        (self.archive,) = (place / "sources").iterdir()
        self.source, self.digest = self.archive.read_bytes(), digest
        self.compiled = aside / "compiled"
        self._compile_once()
        self.after: dict[str, str] = {}

    def _compile_once(self) -> None:
        """Build with the real compilers and keep what they made; from now on it is copied by another process."""
        patch = pytest.MonkeyPatch()

        def compile_and_keep(recipe: Recipe, out: Path, *rest: object) -> None:
            compile_targets(recipe, out, 2)
            shutil.copytree(out / "bin", self.compiled, symlinks=True, dirs_exist_ok=True)

        patch.setattr(build, "compile_targets", compile_and_keep)
        self._build()
        patch.setattr(build, "configure", lambda *_: None)
        patch.setattr(build, "compile_targets", self._copy_compiled)

    def _copy_compiled(self, recipe: Recipe, out: Path, *rest: object) -> None:
        out.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", str(self.compiled), str(out / "bin")], check=True)

    def _build(self) -> store.Engine:
        return build.build(backend="cpu", server=False, release=toy_llama.RELEASE)

    def prepare(self) -> None:
        fill(self.place, {})
        self.archive.parent.mkdir(parents=True)
        self.archive.write_bytes(self.source)

    def act(self) -> None:
        self._build()

    def finished(self) -> None:
        self.after = self._found()

    def _found(self) -> dict[str, str]:
        """Every file, but for when it was built."""
        return {name: "" if name.endswith(store.INFO) else digest for name, digest in contents(self.place).items()}

    def look(self, met: Met, mode: Mode) -> list[str]:
        wrong = [] if self.archive.exists() and sha256(self.archive) == self.digest else ["the sources are lost"]
        found = self._found()
        for engine in store.installed():
            prefix = f"engines/{engine.key}/"
            here, whole = ({k: v for k, v in files.items() if k.startswith(prefix)} for files in (found, self.whole))
            if here != whole:
                wrong.append(f"an engine that is not whole counts as one: {sorted(here)}")
        return wrong

    @property
    def whole(self) -> dict[str, str]:
        return self.after

    def recovered(self) -> list[str]:
        found = self._found()
        folders = sorted(path.name for path in (self.place / "engines").iterdir() if path.is_dir())
        wrong = [] if found == self.after else [f"there is {sorted(found)}, not {sorted(self.after)}"]
        return wrong if len(folders) == len(store.installed()) else [*wrong, f"left over: {folders}"]

    def close(self) -> None:
        del os.environ["MRROPE_CACHE"]


class RemoveBuild(Build):
    """`mrrope build --remove`: the engine is whole, or none; it is gone after the next run."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.prepared = place.with_name(f"{place.name}.aside") / "prepared"
        super().prepare()
        self._build()
        shutil.rmtree(self.prepared, ignore_errors=True)
        shutil.copytree(place, self.prepared, symlinks=True)
        self._whole = self._found()

    @property
    def whole(self) -> dict[str, str]:
        return self._whole

    def prepare(self) -> None:
        fill(self.place, {})
        shutil.copytree(self.prepared, self.place, symlinks=True, dirs_exist_ok=True)

    def act(self) -> None:
        store.remove([engine.key for engine in store.installed()])

    def again(self) -> None:
        try:
            self.act()
        except Refused as error:
            if "names no build" not in error.what:
                raise
        store.remove([])
