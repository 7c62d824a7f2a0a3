"""The questions of every task by name, as prompts for the trie, and what an answer to one is worth.

Names: needle/HAY and needle-keys/HAY (HAY is `noise` or a text), ruler/TASK, retrieval/TASK, infinitebench/FILE and
longbench/FILE. The same question is put to every way: what is drawn depends on the task, the length and the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import MrropeError, Refused
from ..meter import Span
from . import longfiles, ruler_qa
from .essay import essay
from .grid import needle_grid
from .lm_eval_text import Vocabulary
from .needles import KEYS, QUESTION, haystack, tokens_of
from .passes import Result, TaskPass
from .retrieval import retrieval
from .ruler_tasks import find, ruler
from .samples import Pieces, Sample
from .scoring import METRICS, rouge1_recall
from .spec import Spec
from .trie import Prompt, plan
from .trie import Result as Said

DEPTHS = tuple(i / 10 for i in range(11))
TRIED = 20  # questions of a task's shortest length that are made before anything runs
GENERATE = 16  # tokens of a needle's answer: seven digits, each a token at worst, and what stands before them


@dataclass(frozen=True)
class Item:
    """One question. sample: its name among those of its length; depth: per cent of the text before the needle.

    tags: what must be named with the score, such as whose essay it is.
    """

    sample: str
    length: int
    seed: int
    prompt: Prompt
    references: tuple[str, ...]
    metric: str
    depth: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def result(self, task: str, way: str, said: Said, text: str) -> Result:
        """What the log keeps of an answer, by the schema that `mrrope report` reads."""
        score = METRICS[self.metric](text, self.references)
        return {
            "task": task, "way": way, "length": self.length, "depth": self.depth, "seed": self.seed,
            "tokens": len(self.prompt.tokens), "score": round(score, 6), "exact": score == 1.0,
            "rouge1": round(max(rouge1_recall(text, each) for each in self.references), 6),
            "loss": round(sum(said.losses) / len(said.losses), 6) if said.losses else None,
            "said": text, "expected": list(self.references), **({"tags": dict(self.tags)} if self.tags else {}),
        }  # fmt: skip


def items(llm: Any, spec: Spec, task: TaskPass) -> list[Item]:
    """All questions of a pass, lengths first. llm: tokenises, and detokenises where answers are cut short.

    Raises MrropeError for a task that is none or lacks its files, Refused for a length too short for it.
    """
    return [item for length in task.lengths for item in _of_length(llm, spec, task, length)]


def sample_names(task: TaskPass) -> tuple[str, ...]:
    """The names of a length's questions, in order, without making them: each holds all that its question depends on."""
    family = task.task.partition("/")[0]
    seeds = range(task.seed, task.seed + task.n)
    if family == "needle":
        return tuple(f"{round(100 * depth, 3):g}-{seed}" for seed in seeds for depth in task.depths)
    if family == "needle-keys":
        keys = task.keys_per_text
        return tuple(f"{i}-{seed}-of-{keys}" for seed in seeds for i in range(keys))
    return tuple(f"{i}{task.tag}" for i in range(task.n * task.keys_per_text))


def _of_length(llm: Any, spec: Spec, task: TaskPass, length: int) -> Iterator[Item]:
    family, _, name = task.task.partition("/")
    if family == "needle":
        return grid_items(llm, task, length, _prose(spec, name))
    if family == "needle-keys":
        return key_items(llm, task, length, _prose(spec, name))
    if family == "ruler":
        return sample_items(llm, task, _ruler(llm, spec, task, name, length))
    if family == "retrieval":
        made = retrieval(llm, name, length, n=task.n, seed=task.seed, questions=task.keys_per_text)
        return sample_items(llm, task, made)
    if family in ("infinitebench", "longbench"):
        return sample_items(llm, task, _file(llm, spec, family, name, length, task.n))
    raise MrropeError(f"{task.task}: no such task", why="its family is none", fix="see `mrrope eval --help`")


def _prose(spec: Spec, name: str) -> str | None:
    return None if name == "noise" else spec.text(name).read()


def grid_items(llm: Any, task: TaskPass, length: int, prose: str | None) -> Iterator[Item]:
    """A prompt for each depth and seed, one needle in each."""
    for seed in range(task.seed, task.seed + task.n):
        with _Told(task, length):
            cells = needle_grid(llm, [length], task.depths, generate=GENERATE, prose=prose, seed=seed)
        for cell in cells:
            prompt = replace(cell.prompt(GENERATE), stop=_found(llm, (cell.value,)))
            percent = round(100 * cell.depth, 3)
            yield Item(f"{percent:g}-{seed}", length, seed, prompt, (cell.value,), "string_match_all", percent)


def key_items(llm: Any, task: TaskPass, length: int, prose: str | None) -> Iterator[Item]:
    """Several named keys in one text, each asked for: one prefill for all, and another task than one needle alone."""
    keys = KEYS[: task.keys_per_text]
    asked = {key: tokens_of(llm, QUESTION.format(key=key)) for key in keys}
    room = length - GENERATE - max(map(len, asked.values()))
    for seed in range(task.seed, task.seed + task.n):
        with _Told(task, length):
            hay = haystack(llm, room, keys, seed, prose)
        for i, (key, value) in enumerate(hay.values.items()):
            prompt = Prompt((*hay.tokens, *asked[key]), tuple(tokens_of(llm, " " + value)), GENERATE)
            prompt = replace(prompt, stop=_found(llm, (value,)))
            depth = round(100 * hay.positions[key] / len(hay.tokens), 1)
            yield Item(f"{i}-{seed}-of-{len(keys)}", length, seed, prompt, (value,), "string_match_all", depth)


class _Told:
    """Turns what a haystack of impossible size raises into an error that names it."""

    def __init__(self, task: TaskPass, length: int) -> None:
        self._what = f"{task.task}: no haystack of {length} tokens"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, _: object) -> None:
        if isinstance(error, ValueError):
            raise MrropeError(self._what, why=str(error), fix="another length, or a longer text") from None


def _ruler(llm: Any, spec: Spec, task: TaskPass, name: str, length: int) -> Iterator[Sample]:
    needs = find(name).needs
    prose = asked = None
    if needs == "essay" and spec.texts:
        first = spec.texts[0]
        prose = _essay(first.name, first.read(), "pd" if first.public_domain else "user")
    elif needs == "essay":
        raise MrropeError(f"ruler/{name}: hides its needles in prose", why="no text was named", fix="--text voyage-out")
    if needs == "documents":
        asked = documents(spec, name)
    return ruler(llm, name, length, n=task.n, seed=task.seed, essay=prose, documents=asked)


def documents(spec: Spec, name: str) -> ruler_qa.Documents | None:
    """The user's file of RULER's task qa_1 or qa_2, read; None without one."""
    load, source = {"qa_1": (ruler_qa.squad, "squad"), "qa_2": (ruler_qa.hotpotqa, "hotpotqa")}[name]
    found = [text for text in spec.files if text.name == source]
    return load(Path(found[0].path)) if found else None


@lru_cache(maxsize=2)
def _essay(name: str, text: str, tag: str) -> Any:
    return essay(text, name=name, tag=tag)


def _file(llm: Any, spec: Spec, family: str, name: str, length: int, n: int) -> Iterator[Sample]:
    path = Path(spec.text(name).path)
    if family == "infinitebench":
        return longfiles.infinitebench(llm, path, length, n=n)
    vocabulary = Vocabulary(llm, Path(spec.model).name)
    if vocabulary.template is None:  # such a model follows no instructions
        return longfiles.longbench(llm, path, length, base=True, n=n)
    return longfiles.longbench(llm, path, length, turn=_turn(llm, vocabulary), n=n)


def _turn(llm: Any, vocabulary: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the model's chat template puts before a user's only message, and behind it."""
    mark = "<<the message>>"
    try:
        before, after = vocabulary.chat([{"role": "user", "content": mark}]).split(mark)
    except (MrropeError, ValueError) as error:
        why = error.why if isinstance(error, MrropeError) else "it does not show a user's message once"
        what = "LongBench v2: the model's chat template cannot be applied"
        raise Refused(what, why=why, fix="leave this file out, or mend the template") from None
    return tuple(vocabulary.encode(before)), Pieces(llm, special=True)(after.encode(errors="replace").decode())


def sample_items(llm: Any, task: TaskPass, samples: Iterator[Sample]) -> Iterator[Item]:
    for sample in samples:
        monotone = sample.metric in ("string_match_all", "string_match_part")
        stop = _found(llm, sample.references, sample.metric) if monotone else None
        prompt = Prompt(sample.tokens, _answer(llm, sample), sample.generate, stop)
        depth = round(100 * sample.positions[0] / sample.n_prompt, 1) if len(sample.positions) == 1 else None
        yield Item(
            f"{sample.index}{task.tag}", sample.length, sample.seed, prompt, sample.references, sample.metric,
            depth if task.task != "ruler/vt" else None, sample.tags,
        )  # fmt: skip


def _answer(llm: Any, sample: Sample) -> tuple[int, ...]:
    """The tokens of the one right answer behind the prompt, for its loss; none where there are several."""
    if len(sample.references) != 1:
        return ()
    before = llm.detokenize(list(sample.tokens[-1:])).decode("utf-8", errors="replace")
    answer = tokens_of(llm, ("" if before[-1:].isspace() or before[-1:] in "(\"'" else " ") + sample.references[0])
    return tuple(answer[: sample.generate])  # the context has room for no more


def _found(llm: Any, references: Sequence[str], metric: str = "string_match_all") -> Callable[[Sequence[int]], bool]:
    """Whether an answer has all it is looked for: what follows could not change a score that only looks for strings."""
    return lambda said: METRICS[metric](text_of(llm, said), references) == 1.0


def text_of(llm: Any, tokens: Sequence[int]) -> str:
    """What a model said, without the spaces around it."""
    return str(llm.detokenize(list(tokens)).decode("utf-8", errors="replace")).strip()


def cost(llm: Any, spec: Spec, task: TaskPass) -> tuple[tuple[Span, ...], ...]:
    """What is read and written for each length of a pass, at most: answers may end early.

    Of RULER and benchmark files only first questions are made: they share little, so these stand for the others.
    Raises as `items` does for a length that is too short for the task.
    """
    if task.task.startswith(("ruler/", "infinitebench/", "longbench/")):
        asked, like = len(task.samples), []
        for length in task.lengths:
            # of the shortest length some more are made: one may need more room than another
            some = islice(_of_length(llm, spec, task, length), TRIED if length == task.lengths[0] else 1)
            like.append(max((shown(llm, item, task) for item in some), key=lambda prompt: len(prompt.tokens)))
        return tuple(
            (*[Span(0, len(p.tokens))] * asked, Span(len(p.tokens), asked * p.generate, single=True)) for p in like
        )
    found: list[tuple[Span, ...]] = []
    before = 0
    prompts: list[Prompt] = []
    for length in task.lengths:
        new = [shown(llm, item, task) for item in _of_length(llm, spec, task, length)]
        prompts += new
        read = plan(prompts).trie
        longest = max(len(prompt.tokens) for prompt in new)
        whole, rest = divmod(max(read - before, 0), longest)
        answers = Span(longest, sum(len(prompt.answer) for prompt in new))
        written = Span(longest, sum(prompt.generate for prompt in new), single=True)
        found.append((*[Span(0, longest)] * whole, Span(longest - rest, rest), answers, written))
        before = read
    return tuple(found)


def shown(llm: Any, item: Item, task: TaskPass) -> Prompt:
    """The question, or what truncation leaves of it: the last tokens that fit in the model's own context, BOS kept."""
    prompt = item.prompt
    room = task.window - max(prompt.n_ctx - len(prompt.tokens), prompt.generate)
    if task.way != "truncate" or len(prompt.tokens) <= room:
        return prompt
    tokens = prompt.tokens[-room:]
    if prompt.tokens[0] == llm.token_bos():
        tokens = (prompt.tokens[0], *tokens[1:])
    return replace(prompt, tokens=tokens)
