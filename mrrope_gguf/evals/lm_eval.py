"""A model class for lm-evaluation-harness (`pip install 'mrrope-gguf[lm-eval]'`) that runs llama.cpp in this process.

    from lm_eval import simple_evaluate
    from mrrope_gguf.evals.lm_eval import MrropeLM

    results = simple_evaluate(model=MrropeLM("model.gguf", n_ctx=4096), tasks=["my_task"])

Importing this module registers it as "mrrope". Requests are sorted, so that a beginning which many of them share (the
examples of a few-shot task, a question before its choices) is decoded once, with the bits that each alone would have;
logits are reduced to likelihoods chunk by chunk. Written for lm_eval 0.4.13.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MrropeError, Refused
from ..facts import read_facts
from ..gguf.source import Source
from ..progress import Bar, Progress
from ..text import printable
from .host import Host
from .identity import engine_identity, model_identity
from .lm_eval_text import Messages, Until, Vocabulary
from .losses import token_nll
from .trie import Prompt, Result, run
from .ways import Way, parse, reach

_MISSING: ImportError | None = None
try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:  # the module stays importable; the class says what to install
    _MISSING, TemplateLM = error, object

    def register_model(*_: str) -> Callable[[type], type]:
        return lambda cls: cls


if TYPE_CHECKING:
    from llama_cpp import Llama

log = logging.getLogger(__name__)

Scored = tuple[float, bool]
Request = tuple[Any, list[int], list[int]]  # (context, continuation) as text; tokens of both
_OF_NO_EFFECT = {"do_sample", "temperature", "top_p", "top_k", "min_p", "num_beams", "use_cache"}  # on greedy decoding


def require_lm_eval() -> None:
    """Raise MrropeError, with the extra to install, where lm_eval is not there."""
    if _MISSING is not None:
        raise MrropeError(
            "this needs lm-evaluation-harness, which is not installed",
            why=str(_MISSING),
            fix="pip install 'mrrope-gguf[lm-eval]'",
        )


@register_model("mrrope")
class MrropeLM(TemplateLM):  # type: ignore[misc]
    """A GGUF model for lm_eval.simple_evaluate. `close` it, or use it as a context manager.

    model: a GGUF file, or a llama_cpp.Llama, which then stays yours.
    n_ctx: the longest request in tokens; by default all that the file, the way or the Llama has. Longer ones lose
    tokens on the left, as the harness wants it.
    method, scale: a way of `mrrope_gguf.evals.ways` to run a file: "none", "truncate", "mrrope-uni", "elastic",
    "elastic:yarn", ...; None, the default, runs the file as it is, which is elastic where an extended file says so.
    elastic: as for `load`, where there is no method. share=False decodes every request alone.
    max_gen_toks: tokens generated where the task does not say. add_bos_token: None is the file's own word.
    batch_size, max_batch_size, device: what the harness passes to every model; of no effect.
    Other keywords are those of `load`.

    Raises MrropeError without lm_eval, and what Host or `load` raise.
    """

    def __init__(
        self, model: str | os.PathLike[str] | Llama, n_ctx: int | None = None, *, method: str | None = None,
        scale: float | None = None, elastic: bool | None = None, share: bool = True, max_gen_toks: int = 256,
        add_bos_token: bool | None = None, batch_size: object = None, max_batch_size: object = None,
        device: object = None, say: Callable[[str], object] | None = None, **llama: Any,
    ) -> None:  # fmt: skip
        require_lm_eval()
        super().__init__()
        self._host: Host | None = None
        self._owned: Llama | None = None
        self._share, self._max_gen_toks = share, max_gen_toks
        self._info: dict[str, object] = {"method": method, "scale": scale, "elastic": elastic, **_plain(llama)}
        self._info |= {"max_gen_toks": max_gen_toks, "add_bos_token": add_bos_token}
        if not isinstance(model, (str, os.PathLike)):
            self.llm = _taken(model, method, scale, elastic, llama)
        elif method is None:
            self.llm = self._owned = _as_it_is(model, n_ctx, scale, elastic, llama)
        else:
            n_ctx = self._switch(model, n_ctx, _one_way(method, scale, elastic), say, llama)
        self._file = Path(model if isinstance(model, (str, os.PathLike)) else self.llm.model_path)
        self.name = printable(self._file.name)
        self.max_length: int = min(n_ctx or self.llm.n_ctx(), self.llm.n_ctx())
        self.vocabulary = Vocabulary(self.llm, self.name, add_bos_token)
        self.decoded = 0  # tokens, of every request so far

    def _switch(
        self, path: str | os.PathLike[str], n_ctx: int | None, way: Way, say: Callable[[str], object] | None,
        llama: dict[str, Any],
    ) -> int:  # fmt: skip
        """Have the model run that way; the longest request in tokens."""
        with Source.open(path) as source:
            n_ctx_orig = reach(read_facts(source.index), force=bool(llama.get("force")))
        n_ctx = n_ctx or int(n_ctx_orig * (way.scale or 1.0))
        if way.kind == "truncate":
            n_ctx = min(n_ctx, n_ctx_orig)
        self._host = Host(path, n_ctx=n_ctx, say=say, **{"swa_full": True, **llama})
        self.llm = self._host.switch(way)
        return n_ctx

    def close(self) -> None:
        """Give up a model that was loaded here."""
        for mine in (self._host, self._owned):
            if mine is not None:
                mine.close()

    def __enter__(self) -> MrropeLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what the harness asks about the model -------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eos

    @property
    def prefix_token_id(self) -> int:
        """BOS, or EOS without one: the context of a text that has none."""
        return self.vocabulary.prefix

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """The file's name and a hash of its chat template: the harness keeps rendered requests under it."""
        digest = hashlib.sha256((self.vocabulary.template or "").encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9._-]', '_', self.name)}-{digest[:12]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text; BOS first where the model's texts have it, unless add_special_tokens is False."""
        tokens = self.vocabulary.encode(string, add_special_tokens)
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.vocabulary.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The file's own template, whatever name is asked for; None for False. Raises Refused where it has none."""
        return self.vocabulary.chat_template() if chat_template else None

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """As Vocabulary.chat does it."""
        return self.vocabulary.chat(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, object]:
        """What a result belongs to, for the harness's `config`: the file by hash, engine, way and context."""
        identity = model_identity(self._file) if self._file.is_file() else {"name": self.name}
        stored = {key: value for key, value in self.llm.metadata.items() if ".rope.scaling." in key}
        return {
            "model_file": identity, "engine": engine_identity(), "max_length": self.max_length,
            "rope_scaling": stored, **self._info,
        }  # fmt: skip

    # --- requests ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any) -> list[Scored]:
        """(log likelihood in nats, whether greedy decoding says the same) of each continuation after its context."""
        prompts = [self._scored(*request) for request in requests]
        self._warn_of_cuts(sum(len(p.tokens) < len(c) for p, (_, c, _) in zip(prompts, requests, strict=True)))

        def keep(index: int, result: Result) -> None:
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], _score(result))

        results = self._run("loglikelihood", prompts, keep, disable_tqdm)
        return [_score(result) for result in results]

    def _scored(self, texts: Any, context: list[int], continuation: list[int]) -> Prompt:
        """The prompt of a request, cut on the left: its last token is predicted, not read."""
        room = self.max_length + 1 - len(continuation)
        if not continuation or room < 1:
            shown = repr(printable(str(texts[1] if texts else ""), 40))
            raise Refused(
                f"{self.name}: the continuation {shown} cannot be scored",
                why=f"it has {len(continuation)} tokens; one or more are needed, and {self.max_length} at most",
                fix="a larger n_ctx, or another task" if continuation else "another task, or another target_delimiter",
            )
        return Prompt(tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood in nats of each whole text after BOS (or EOS), in windows of max_length + 1 tokens.

        Every token is predicted once; later windows begin with as many known tokens as there is room for. BOS itself
        is never predicted. A text that fits has the sum of evals.losses.token_nll of [prefix, *tokens].
        """
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        total = sum(len(read) - 1 for each in windows for read, _ in each)
        found: list[float] = []
        done = 0
        with Bar("loglikelihood_rolling", ("tok", 1)) as bar:
            progress = None if disable_tqdm else bar
            for text, each in zip(texts, windows, strict=True):
                losses: list[float] = []
                for read, n in each:
                    losses += token_nll(self.llm, read, _shifted(progress, done, total))[-n:].tolist()
                    done += len(read) - 1
                found.append(-math.fsum(losses))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        self.decoded += total
        return found

    def _windows(self, text: str) -> list[tuple[list[int], int]]:
        """(tokens, how many of the last are scored) of each window, as the harness lays them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        tokens = self.tok_encode(text, add_special_tokens=False)
        pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1) if tokens else ()
        disjoint = map(make_disjoint_window, pairs)
        return [([*context, *predicted], len(predicted)) for context, predicted in disjoint]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding says after each context, up to the first of the task's stop strings.

        A context is cut on the left to n_ctx - max_gen_toks. Raises Refused where sampling is asked for.
        """
        asked = [self._asked(*request.args) for request in requests]
        self._warn_of_cuts(sum(cut for _, _, cut in asked))

        def keep(index: int, result: Result) -> None:
            text = _said(self.vocabulary, result, asked[index][1])
            self.cache_hook.add_partial("generate_until", requests[index].args, text)

        results = self._run("generate_until", [prompt for prompt, _, _ in asked], keep, disable_tqdm)
        return [_said(self.vocabulary, result, stops) for result, (_, stops, _) in zip(results, asked, strict=True)]

    def _asked(self, context: str, gen_kwargs: dict[str, Any]) -> tuple[Prompt, list[str], bool]:
        """The prompt, its stop strings, and whether it was cut."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        wanted: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        end = self.vocabulary.piece(self.eot_token_id, control=True).decode(errors="replace")
        stops = handle_stop_sequences(wanted.pop("until"), eos=end)
        n = wanted.pop("max_gen_toks")
        self._check_decoding(wanted, n)
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        kept = tokens[-(self.max_length - n) :]
        prompt = Prompt(tuple(kept), generate=n, stop=Until(self.vocabulary, stops))
        return prompt, stops, len(kept) < len(tokens)

    def _check_decoding(self, wanted: dict[str, Any], n: int) -> None:
        if wanted["do_sample"]:
            raise Refused(
                f"{self.name}: the task asks for sampling, and this model class decodes greedily",
                why=f"its generation_kwargs have do_sample={wanted['do_sample']}, temperature={wanted['temperature']}"
                if "temperature" in wanted
                else "its generation_kwargs have do_sample=true",
                fix="--gen-kwargs do_sample=False (in Python: gen_kwargs='do_sample=False')",
            )
        if not 0 < n < self.max_length:
            raise Refused(
                f"{self.name}: {n} tokens cannot be generated",
                why=f"a context of {self.max_length} must hold them and a prompt before them",
                fix="a larger n_ctx, or --gen-kwargs max_gen_toks=N",
            )
        unknown = sorted(wanted.keys() - _OF_NO_EFFECT)
        if unknown:
            log.warning("generation_kwargs that have no effect here: %s", printable(", ".join(unknown)))

    def _run(
        self, label: str, prompts: list[Prompt], keep: Callable[[int, Result], object], quiet: bool
    ) -> list[Result]:
        with Bar(label, ("tok", 1)) as bar:
            before = self.decoded

            def count(done: int, total: int) -> None:
                self.decoded = before + done
                if not quiet:
                    bar(done, total)

            return run(self.llm, prompts, on_result=keep, progress=count, share=self._share)

    def _warn_of_cuts(self, n: int) -> None:
        if n:
            log.warning("%s: %d requests lost tokens on the left: the context is %d", self.name, n, self.max_length)


def _taken(model: Any, method: str | None, scale: float | None, elastic: bool | None, llama: dict[str, Any]) -> Any:
    """A Llama that is there already, which nothing can be asked of any more."""
    given = {"method": method, "scale": scale, "elastic": elastic, **llama}
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise Refused(
            f"{', '.join(named)}: not for a model that is loaded",
            why="they say how a file is opened, and this is a Llama",
            fix="pass the file's path, or load the model as you want it",
        )
    return model


def _as_it_is(
    path: str | os.PathLike[str], n_ctx: int | None, scale: float | None, elastic: bool | None, llama: dict[str, Any]
) -> Llama:
    from ..model import load

    if scale is not None:
        raise Refused(
            f"scale={scale:g} without a method",
            why="without a method a file runs as it is",
            fix="name a method too, such as mrrope-pro or elastic, or leave the scale out",
        )
    return load(path, n_ctx, elastic=elastic, **{"swa_full": True, **llama})


def _one_way(method: str, scale: float | None, elastic: bool | None) -> Way:
    (way,) = parse([method], scale)
    if elastic is not None:
        raise Refused(
            f"method={method!r} and elastic={elastic}",
            why="elastic= is for a file as it is; a method says itself whether its table grows",
            fix="method='elastic', or 'elastic:METHOD'",
        )
    if way.by_length:
        raise Refused(
            f"{way.name}: not for lm-evaluation-harness",
            why="it has a table for each length, and requests of many lengths share their beginnings",
            fix=f"method='{way.method}' with a scale, or 'elastic:{way.method}', whose table follows the length",
        )
    return way


def _plain(llama: dict[str, Any]) -> dict[str, object]:
    return {name: value if isinstance(value, (int, float, str, bool)) else repr(value) for name, value in llama.items()}


def _score(result: Result) -> Scored:
    return -math.fsum(result.losses), result.greedy


def _said(vocabulary: Vocabulary, result: Result, stops: list[str]) -> str:
    from lm_eval.models.utils import postprocess_generated_text

    return str(postprocess_generated_text(vocabulary.decode(result.generated), stops, None))


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress of one window as that of all."""
    return (lambda now, _: progress(done + now, total)) if progress else None
