"""The operations that faults are made in: a model written anew, changed in place, put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mrrope_gguf import extend, revert
from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.gguf.names import journal_path
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.write import WriteReport
from tests import tiny
from tests.faults.injector import VANISHING, Mode
from tests.faults.operation import BUS, KILLED, Met, Operation, contents, fill
from tests.faults.operations_build import Build, RemoveBuild


class _OnModel(Operation):
    """Before and after of the files of one model in `place`, by name."""

    n_shards = 1
    arch = "llama"

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        aside = place.with_name(f"{place.name}.aside")
        aside.mkdir(parents=True, exist_ok=True)
        self.path = place / tiny.make(aside / "m.gguf", self.arch, n_layer=1, split=self.shards).name
        self.start = {path.name: path.read_bytes() for path in sorted(aside.iterdir())}
        self.prepare()
        self.before = contents(place)
        self.after: dict[str, str] = {}

    @property
    def shards(self) -> int | None:
        return self.n_shards if self.n_shards > 1 else None

    def prepare(self) -> None:
        fill(self.place, self.start)

    def took(self, written: WriteReport | None) -> None:
        assert written is not None
        self.way = written.how

    def finished(self) -> None:
        self.after = contents(self.place)
        assert self.after != self.before


class ExtendNew(_OnModel):
    """extend SRC DST. The source is what it was, the new model whole or not there, and what is left goes next time."""

    def act(self) -> None:
        self.took(extend(self.path, self.place / "new.gguf", scale=4.0).written)

    def again(self) -> None:
        try:
            self.act()
        except FileTrouble as error:
            if "the file exists" not in error.what:
                raise

    def look(self, met: Met, mode: Mode) -> list[str]:
        found, wrong = contents(self.place), []
        wrong += [f"{name} is lost" for name, digest in self.before.items() if found.get(name) != digest]
        new = {name: digest for name, digest in found.items() if name.startswith("new")}
        whole = {name: digest for name, digest in self.after.items() if name not in self.before}
        if new and new != whole:
            wrong += self._in_part(new, whole, met.how == KILLED or mode.lasting)
        if met.how != KILLED and not mode.lasting and (left := [name for name in found if name.startswith(".")]):
            wrong.append(f"left over: {left}")
        return wrong

    def _in_part(self, new: dict[str, str], whole: dict[str, str], may: bool) -> list[str]:
        """What is wrong about a new model of which a part is there."""
        return [f"the new file is not whole: {list(new)}"]

    def recovered(self) -> list[str]:
        found = contents(self.place)
        return [] if found == self.after else [f"there is {sorted(found)}, not {sorted(self.after)}, or other bytes"]


class ExtendVanishing(ExtendNew):
    """extend SRC DST where the source is deleted or cut short meanwhile: DST is the whole new model, or not there."""

    modes = VANISHING

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.victim = self.path

    def look(self, met: Met, mode: Mode) -> list[str]:
        found = contents(self.place)
        wrong = [f"left over: {name}" for name in found if name.startswith(".") and met.how != BUS]
        whole = found.get("new.gguf", self.after["new.gguf"]) == self.after["new.gguf"]
        return wrong if whole else [*wrong, "the new file is not whole"]

    def again(self) -> None:
        self.path.write_bytes(self.start[self.path.name])
        super().again()


class ExtendSplit(ExtendNew):
    """The shards of a new model: all or none, or, cut short, some of them under a journal that nobody reads past."""

    n_shards = 3

    def _in_part(self, new: dict[str, str], whole: dict[str, str], may: bool) -> list[str]:
        first = self.place / min(whole)
        journal = journal_path(first)
        others = {name for name in new if new[name] != whole.get(name) and not name.startswith(journal.name)}
        if others or not may:
            return [f"of the new model there is {sorted(new)}; not whole: {sorted(others)}"]
        if new.keys().isdisjoint(whole):
            return []  # a journal at most: nothing has its name
        if not journal.exists():
            return [f"of the new model there is {sorted(new)}, and no journal"]
        try:
            with Source.open(first):
                return ["a new model that is there in part opens"]
        except FileTrouble as error:
            return [] if "mrrope revert" in error.fix else [f"it says: {error}"]


class ExtendOver(ExtendNew):
    """extend --force over a file that is there: that, or the new one."""

    def prepare(self) -> None:
        fill(self.place, {**self.start, "new.gguf": b"a model that was there"})

    def act(self) -> None:
        self.took(extend(self.path, self.place / "new.gguf", scale=4.0, force=True).written)

    def look(self, met: Met, mode: Mode) -> list[str]:
        found = contents(self.place)
        wrong = [] if found.get("new.gguf") in (self.before["new.gguf"], self.after["new.gguf"]) else ["DST is lost"]
        return wrong + [name for name in self.start if found.get(name) != self.before[name]]


class InPlace(_OnModel):
    """extend --in-place. The model is what it was, or finished, or says what brings it back; the next run does it."""

    def act(self) -> None:
        self.took(extend(self.path, scale=4.0, in_place=True).written)

    def look(self, met: Met, mode: Mode) -> list[str]:
        found = {name: digest for name, digest in contents(self.place).items() if name in self.before}
        if found in (self.before, {name: self.after[name] for name in self.before}):
            return []
        if met.how != KILLED and not mode.lasting:
            return ["the model is neither what it was nor finished"]
        if not journal_path(self.path).exists():
            return ["the model is changed in part, and there is no journal"]
        try:
            with Source.open(self.path):
                return ["a model that is changed in part opens"]
        except FileTrouble as error:
            return [] if "mrrope revert" in error.fix else [f"it says: {error}"]

    def recovered(self) -> list[str]:
        """Finished; and what it was comes back."""
        wrong = []
        found = contents(self.place)
        if found != self.after:
            wrong.append(f"there is {sorted(found)} and not {sorted(self.after)}, or other bytes")
        revert(self.path)
        if contents(self.place) != self.before:
            wrong.append("reverted it is not what it was")
        return wrong


class InPlaceSplit(InPlace):
    """Rows of tensors in several shards change."""

    n_shards = 3
    arch = "qwen2"

    def act(self) -> None:
        self.took(extend(self.path, scale=4.0, rendering="portable", in_place=True).written)


class Revert(InPlace):
    """revert in place."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.extend()
        self.start = {path.name: path.read_bytes() for path in sorted(place.iterdir())}
        self.before = contents(place)

    def extend(self) -> None:
        extend(self.path, scale=4.0, in_place=True)

    def act(self) -> None:
        self.took(revert(self.path))

    def again(self) -> None:
        try:
            self.act()
        except Refused as error:
            if "no undo record" not in error.what:
                raise

    def recovered(self) -> list[str]:
        return [] if contents(self.place) == self.after else [f"there is {sorted(contents(self.place))}"]


class RevertSplit(Revert):
    n_shards = 3
    arch = "qwen2"

    def extend(self) -> None:
        extend(self.path, scale=4.0, rendering="portable", in_place=True)


def _saved(name: str) -> Callable[[Path], Operation]:
    def make(place: Path) -> Operation:
        from tests.faults import operations_saved  # these load libllama

        kinds: dict[str, Callable[[Path], Operation]] = {
            "sessions": operations_saved.Sessions,
            "sessions-new": operations_saved.SessionsNew,
            "eval": operations_saved.Evaluation,
        }
        return kinds[name](place)

    return make


OPERATIONS: dict[str, Callable[[Path], Operation]] = {
    "extend": ExtendNew,
    "extend-over": ExtendOver,
    "extend-vanishing": ExtendVanishing,
    "extend-split": ExtendSplit,
    "in-place": InPlace,
    "in-place-split": InPlaceSplit,
    "revert": Revert,
    "revert-split": RevertSplit,
    "build": Build,
    "build-remove": RemoveBuild,
    **{name: _saved(name) for name in ("sessions", "sessions-new", "eval")},
}
