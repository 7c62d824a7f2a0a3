"""Many prompts that begin alike, each shared beginning computed once.

The prompts are sorted, so that walking them is a depth-first walk of their trie: the cache is rolled back to what the
next prompt shares with the one before it, and only the rest is decoded. Sharing is valid for identical tokens at
identical positions under an identical table; an elastic table is a function of the position alone, and rolling back
rotates the keys again, within the cache's rounding.

Logits have the bits of each prompt evaluated alone, with the same threads. llama.cpp's CPU kernels give a token's row
other last bits in a batch of few rows (one row: another product; under 64: another flash attention) or in another place
in groups of four (repacked K-quants). So a prompt is decoded in pieces that end at multiples of Decoder.chunk, and a
rolled-back one goes on at a multiple of CUT rows into its piece, with CUT rows or more to go; `cut` says where. Where
kernels choose by other sizes (GPUs), exact=True goes back to the beginning of the piece, whose batch is then the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import EngineTrouble
from ..kernels import nll
from ..progress import Progress
from .decode import CHUNK, Decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Row = NDArray[np.float32]

CUT = 64  # rows: of a tile of flash attention, and many groups of four

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """Tokens to read, and what is asked after them: the loss of an answer, a greedy text, both or neither.

    The text ends after `generate` tokens, before a token that ends generation, or where stop(tokens so far) is true.
    """

    tokens: Tokens
    answer: Tokens = ()
    generate: int = 0
    stop: Callable[[Sequence[int]], bool] | None = None

    @property
    def continuation(self) -> int:
        """Tokens decoded after the prompt, at most: the last of an answer or of a text is never fed back."""
        return max(len(self.answer) - 1, 0) + max(self.generate - 1, 0)

    @property
    def n_ctx(self) -> int:
        """The context it takes."""
        return len(self.tokens) + max(len(self.answer) - 1, self.generate - 1, 0)


@dataclass(frozen=True)
class Result:
    """Negative log likelihoods of the answer's tokens, in nats, (len(answer),), and the tokens generated.

    greedy: whether there was an answer and each of its tokens has the largest logit at its place.
    """

    losses: tuple[float, ...] = ()
    generated: Tokens = ()
    greedy: bool = False


@dataclass(frozen=True)
class Plan:
    """Tokens to decode: of the prompts, shared and each alone, and after the prompts, which is the same for both.

    Work is counted in tokens; a token far into a prompt costs more than one near its beginning.
    """

    trie: int
    naive: int
    continuation: int

    @property
    def ratio(self) -> float:
        """How many times fewer tokens sharing decodes, continuations included."""
        return (self.naive + self.continuation) / max(self.trie + self.continuation, 1)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix.

    >>> shared((5, 6, 7), (5, 6, 8, 9))
    2
    """
    n = min(len(a), len(b))
    # slices compare at memory speed, where a loop over 100K tokens would not
    return bisect_left(range(1, n + 1), True, key=lambda k: a[:k] != b[:k])


def cut(n_shared: int, n: int, chunk: int = CHUNK, exact: bool = False) -> int:
    """Where decoding a prompt of `n` tokens goes on if `n_shared` < n of them are in the cache.

    >>> cut(1000, 2000), cut(1000, 1010), cut(1000, 2000, exact=True)
    (960, 896, 512)
    """
    first = n_shared // chunk * chunk
    if exact:
        return first
    end = min(first + chunk, n)
    whole = min(n_shared - first, end - first - CUT) // CUT * CUT
    return first + max(whole, 0)


def pieces(start: int, n: int, chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Bounds of the batches from `start` to `n`, which end at multiples of `chunk`.

    >>> list(pieces(896, 1600))
    [(896, 1024), (1024, 1536), (1536, 1600)]
    """
    while start < n:
        end = min((start // chunk + 1) * chunk, n)
        yield start, end
        start = end


def order(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of the prompts in the order of the walk."""
    return sorted(range(len(prompts)), key=lambda i: prompts[i].tokens)


def plan(prompts: Sequence[Prompt], *, chunk: int = CHUNK, exact: bool = False) -> Plan:
    """What `run` would decode, without running anything.

    >>> plan([Prompt((1,) * 2000 + (q,) * 100) for q in range(2, 22)])
    Plan(trie=4304, naive=42000, continuation=0)
    """
    trie = 0
    held: Tokens = ()
    for i in order(prompts):
        tokens = prompts[i].tokens
        trie += len(tokens) - _start(held, tokens, chunk, exact)
        held = tokens
    naive = sum(len(p.tokens) for p in prompts)
    return Plan(trie, naive, sum(p.continuation for p in prompts))


def _start(held: Tokens, tokens: Tokens, chunk: int, exact: bool) -> int:
    """The first token to decode if the cache holds `held`: none if they are the same."""
    common = shared(held, tokens)
    return common if common == len(tokens) == len(held) else cut(common, len(tokens), chunk, exact)


def run(
    llm: Any,
    prompts: Sequence[Prompt],
    *,
    done: Mapping[int, Result] | None = None,
    on_result: Callable[[int, Result], object] | None = None,
    on_logits: Callable[[int, Row], object] | None = None,
    progress: Progress | None = None,
    share: bool = True,
    exact: bool = False,
) -> list[Result]:
    """Evaluate every prompt on a llama_cpp.Llama; results in the order of the prompts. Empties the model's cache.

    done: results of an earlier run by index; those prompts are skipped.
    on_result(index, result): called when a prompt is finished, in the order of the walk.
    on_logits(index, row): called with the logits after each prompt, float32 (n_vocab,), before it goes on.
    progress(done, total): in decoded tokens; the total falls where a text ends early, and rises where the memory
    could not be rolled back (a recurrent one, or sliding windows without swa_full=True): there each prompt is
    evaluated alone. share=False does that everywhere. exact: see the module's docstring.

    Raises ValueError for a prompt without tokens, EngineTrouble, before anything is decoded, for one that does not fit.
    """
    known = dict(done or {})
    left = [i for i in order(prompts) if i not in known]
    for i in left:
        _check(i, prompts[i], llm.n_ctx())
    with Decoder(llm) as decoder:
        walk = _Walk(llm, decoder, progress, share, exact)
        walk.expect([prompts[i] for i in left])
        for i in left:
            row = walk.read(prompts[i].tokens)
            if on_logits:
                on_logits(i, row)
            known[i] = walk.ask(prompts[i], row)
            if on_result:
                on_result(i, known[i])
    return [known[i] for i in range(len(prompts))]


def _check(index: int, prompt: Prompt, n_ctx: int) -> None:
    if not prompt.tokens:
        raise ValueError(f"prompt {index} has no tokens")
    if prompt.n_ctx > n_ctx:
        raise EngineTrouble(
            f"prompt {index} does not fit in the context",
            why=f"its {len(prompt.tokens)} tokens take {prompt.n_ctx} with what follows, and the context has {n_ctx}",
            fix="load the model with a larger n_ctx, or leave the longest prompts out",
        )


class _Walk:
    """The cache on its way from prompt to prompt: `held` are the tokens of the last one, `row` the logits after it."""

    def __init__(self, llm: Any, decoder: Decoder, progress: Progress | None, share: bool, exact: bool) -> None:
        self.decoder, self.progress, self.share, self.exact = decoder, progress, share, exact
        self.vocab = decoder.api.llama_model_get_vocab(llm.model)
        self.held: Tokens = ()
        self.row: Any = None
        self.decoded = self.total = 0

    def expect(self, prompts: Sequence[Prompt]) -> None:
        work = plan(prompts, chunk=self.decoder.chunk, exact=self.exact)
        self.total = (work.trie if self.share else work.naive) + work.continuation

    def read(self, tokens: Tokens) -> Row:
        """Have exactly `tokens` in the cache; the logits after them, (n_vocab,)."""
        start = _start(self.held, tokens, self.decoder.chunk, self.exact) if self.share else 0
        self._reach(tokens, start)
        return self.row  # type: ignore[no-any-return]

    def _reach(self, tokens: Tokens, start: int) -> None:
        """Decode from `start` on what the cache should hold, or everything if it cannot go back there."""
        if start == 0 or not self.decoder.try_rewind(start):
            self.total += start
            self.decoder.clear()
            start = 0
        for first, end in pieces(start, len(tokens), self.decoder.chunk):
            for logits in self.decoder.logits(tokens[first:end], every=False):
                self.row = logits[0].copy()
            self._count(end - first)
        self.held = tokens

    def ask(self, prompt: Prompt, row: Row) -> Result:
        """What is wanted after the tokens in the cache. Leaves more of them there, which `read` removes."""
        losses, greedy = self._losses(prompt.answer, row)
        if prompt.generate and self.decoder.n_past != len(prompt.tokens):
            self._reach(prompt.tokens, len(prompt.tokens))
        return Result(losses, self._text(prompt, row), greedy)

    def _losses(self, answer: Tokens, row: Row) -> tuple[tuple[float, ...], bool]:
        found: list[float] = nll(row[None], answer[:1]).tolist() if answer else []
        greedy = bool(answer) and int(row.argmax()) == answer[0]
        for logits in self.decoder.logits(answer[:-1]):
            part = answer[len(found) : len(found) + len(logits)]
            found += nll(logits, part).tolist()
            greedy = greedy and logits.argmax(1).tolist() == list(part)
            self._count(len(logits))
        return tuple(found), greedy

    def _text(self, prompt: Prompt, row: Row) -> Tokens:
        said: list[int] = []
        fed = 0
        while len(said) < prompt.generate:
            if said:
                (logits,) = self.decoder.logits(said[-1:], every=False)
                self._count(1)
                row, fed = logits[0], fed + 1
            token = int(row.argmax())
            if self.decoder.api.llama_vocab_is_eog(self.vocab, token):
                break
            said.append(token)
            if prompt.stop and prompt.stop(said):
                break
        unused = max(prompt.generate - 1, 0) - fed
        if unused:
            self.total -= unused
            self._count(0)
        return tuple(said)

    def _count(self, n: int) -> None:
        self.decoded += n
        if self.progress:
            self.progress(self.decoded, self.total)
