"""A conversation with a model, documents included, that is there again at once when it is opened again.

with mrrope_gguf.ChatSession(mrrope_gguf.load("model.gguf"), documents=[book], name="book") as chat:
    for piece in chat.say("Who is the narrator?"):
        print(piece, end="")
"""

from __future__ import annotations

import os
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import ContextFull, MrropeError, Refused
from .progress import Progress
from .sessions.named import Named
from .sessions.reader import CHUNK, SAVE_FROM, Reader, Reading, Stop, in_a_line
from .sessions.sampling import Sampler, Sampling
from .sessions.store import Store, shared
from .sessions.stream import Stream
from .sessions.template import ChatTemplate, Message
from .sessions.transcript import Transcript, Vocabulary

if TYPE_CHECKING:
    from llama_cpp import Llama

_SEAM = 8  # tokens before a question that its first word may change
SAVE_AT_END = 256  # tokens of a conversation without a name that are worth a saved state

Finish = str  # "stop", "length", "window" or "interrupted"
Document = str | tuple[str, str]


class ChatSession:
    """A conversation on a llama_cpp.Llama, which stays usable by itself.

    system: instructions. documents: texts, or (name, text), put before the first question and read once.
    name: keep the conversation under this name, and go on with it if it is there.
    store: the folder of saved states; None is the user's, False saves nothing.
    on_progress(done, total): after every `chunk` tokens of a prompt. on_note(line): what is worth knowing and stops
    nothing, such as a damaged state that was refused; by default a warning.
    sampling: llama.cpp's parameters by name, see sessions.sampling.Sampling; `say` may change them for one answer.

    A context manager: `close` saves. Raises Refused for an encoder, a name in use, or a name whose conversation has
    another system prompt or other documents; FileTrouble where a named conversation cannot be kept or read.
    """

    def __init__(
        self, llm: Llama, system: str | None = None, documents: Sequence[Document] = (), *, name: str | None = None,
        store: str | os.PathLike[str] | Literal[False] | None = None, on_progress: Progress | None = None,
        on_note: Callable[[str], object] | None = None, chunk: int = CHUNK, **sampling: Any,
    ) -> None:  # fmt: skip
        self._llm, self._on_progress = llm, on_progress
        self._on_note, self._told = on_note, set[str]()
        if name is not None and store is False:
            raise Refused("a session with a name needs a store", why="store=False saves nothing", fix="leave it out")
        self.sampling = Sampling().but(**sampling)
        self.system = system
        self.documents = [("", one) if isinstance(one, str) else (one[0], one[1]) for one in documents]
        self._messages: list[Message] = []
        self.finish_reason: Finish = ""
        self.window: int = llm.n_ctx()
        self.vocabulary = Vocabulary(llm)
        self._template = ChatTemplate(llm)
        if self._template.note:
            self._note(self._template.note)
        kept = None if store is False else Store(store, note=self._note)
        self._reader = Reader(llm, kept, self._note, chunk)
        self._transcript, self._settled = Transcript(self.vocabulary), False
        self._opening_tokens: array[int] | None = None
        self._named = Named(kept.folder / "named", name) if kept and name is not None else None
        self._created = time.time()
        self._answering: object = None  # the answer that is being written
        try:
            self._reopen(sampling)
        except BaseException:
            if self._named:
                self._named.close()
            raise

    @property
    def name(self) -> str | None:
        """The name it is kept under."""
        return self._named.name if self._named else None

    @property
    def messages(self) -> list[Message]:
        """The turns so far, {"role": "user" | "assistant", "content": ...} by turns."""
        return [dict(message) for message in self._messages]

    @property
    def tokens_used(self) -> int:
        """Tokens of the conversation so far, documents included: what the next question comes on top of."""
        return len(self._so_far())

    @property
    def scale(self) -> float:
        """S in effect: 1 while the model is as it was, and growing with the conversation on the patched engine."""
        return self._reader.memory.scale

    @property
    def reading(self) -> Reading:
        """How the last prompt came into memory."""
        return self._reader.last

    def count(self, text: str) -> int:
        """Tokens of a text within the conversation."""
        return len(self.vocabulary.encode(self.vocabulary.shield(text), first=False))

    def read(self, *, stop: Stop | None = None) -> bool:
        """Read, or restore, what is there before the next question; False if stop() ended it. Saves a long reading.

        `say` does it too; this lets somebody see that the document is read before they ask. Raises as `say` does.
        """
        tokens = self._so_far()
        if not tokens:
            return True
        self._check_room(len(tokens))
        done = self._reader.bring(tokens, opening=len(self._opening()), progress=self._on_progress, stop=stop)
        if done:
            self._reader.secure()
        return done

    def say(self, text: str, *, stop: Stop | None = None, **sampling: Any) -> Iterator[str]:
        """Ask, and get the answer in pieces as they are written. It runs as far as the pieces are taken.

        stop(): asked after each chunk and token; True ends it. Whatever ends an answer early (stop, Ctrl-C, leaving
        the loop) keeps what was written; while the question is still being read, the question is dropped and what was
        read of it is kept, so that asking again goes on from there. `finish_reason` says what ended the answer.

        Raises ContextFull, at once, where the question does not fit, and after the last piece where the answer filled
        the window: nothing is ever shifted out. Refused for a sampling parameter that is none.
        """
        return self._turn([*self._messages, {"role": "user", "content": text}], stop, sampling)

    def ask(self, text: str, **options: Any) -> str:
        """The whole answer to `say`."""
        return "".join(self.say(text, **options))

    def regenerate(self, *, stop: Stop | None = None, **sampling: Any) -> Iterator[str]:
        """Another answer to the last question; the old one stays until the new one begins. Raises as `say` does."""
        self._need_turns(1)
        return self._turn(self._messages[:-1], stop, sampling)

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question. Raises Refused if there is none."""
        self._need_turns(1)
        question = self._messages[-2]["content"]
        self._change(self._messages[:-2])
        return question

    def drop_oldest(self, n: int = 1) -> int:
        """Forget the n oldest questions and answers; returns the tokens used then.

        System prompt and documents stay, and need not be read again; what followed them has moved, and must be.
        Raises Refused if there are not so many.
        """
        self._need_turns(n)
        self._change(self._messages[2 * n :])
        return self.tokens_used

    def clear(self) -> None:
        """Forget all questions and answers; system prompt and documents stay."""
        self._change([])

    def save(self) -> bool:
        """Save the conversation and what the model holds of it. False, with a note, if one of them was not possible."""
        done = self._reader.save()
        return self._keep_named() and done

    def keep_as(self, name: str) -> None:
        """Keep the conversation under this name from here on; under another one it stays as it is.

        Raises Refused for a name that is taken or in use, or without a store; FileTrouble.
        """
        if self._reader.store is None:
            raise Refused("a session with a name needs a store", why="store=False saves nothing", fix="leave it out")
        if self._named and name == self._named.name:
            return
        named = Named(self._reader.store.folder / "named", name)
        try:
            if named.load() is not None:
                why = "it holds another conversation, which would be lost"
                raise Refused(f"the session {name!r} is there already", why=why, fix="take another name")
        except BaseException:
            named.close()
            raise
        self._named, before = named, self._named
        self._keep_named()
        if before:
            before.close()

    def close(self) -> None:
        """Save what is worth it and give up the name."""
        try:
            if self._reader.unsaved >= (1 if self._named else SAVE_AT_END):
                self._reader.save()
            self._keep_named()
        finally:
            if self._named:
                self._named.close()
                self._named = None

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn(self, messages: list[Message], stop: Stop | None, changes: dict[str, Any]) -> Iterator[str]:
        sampling = self.sampling.but(**changes)
        transcript = self._transcript.for_prompt(self._render(messages))
        self._check_room(len(transcript.tokens))
        return self._answer(messages, transcript, sampling, stop)

    def _answer(
        self, messages: list[Message], transcript: Transcript, sampling: Sampling, stop: Stop | None
    ) -> Iterator[str]:
        self.finish_reason = "interrupted"
        self._answering = mine = object()
        tokens = transcript.tokens
        if not self._reader.bring(tokens, opening=len(self._opening()), progress=self._on_progress, stop=stop):
            return
        stream = Stream([*sampling.reverse_prompt, *self._template.stops])
        written: list[int] = []
        try:
            for piece in self._write(tokens, written, stream, sampling, stop):
                yield piece
                if self._answering is not mine:
                    raise Refused("this answer was given up", why="the conversation has changed", fix="ask again")
        finally:
            if self._answering is mine:
                self._commit(messages, transcript, stream, written)
        if self.finish_reason == "window":
            raise self._full(len(tokens) + len(written), "the answer has filled the context")

    def _commit(self, messages: list[Message], transcript: Transcript, stream: Stream, written: list[int]) -> None:
        """Make an answer, as far as it got, part of the conversation."""
        stream.push(b"", last=True)  # what was held back, if it was cut short
        transcript.add(stream.whole, written)
        self._transcript = transcript
        self._change([*messages, {"role": "assistant", "content": stream.text}], settled=True)
        if self._reader.unsaved >= SAVE_FROM:
            self._reader.save()

    def _write(
        self, prompt: list[int], written: list[int], stream: Stream, sampling: Sampling, stop: Stop | None
    ) -> Iterator[str]:
        memory = self._reader.memory
        if sampling.repeat_last_n < 0:  # the whole context, as llama.cpp's programs have it
            sampling = sampling.but(repeat_last_n=self.window)
        recent = prompt[max(len(prompt) - int(sampling.repeat_last_n), 0) :]
        with Sampler(sampling, self.vocabulary.n_vocab, recent) as sampler:
            while True:
                token = sampler.sample(self._llm._ctx.ctx)
                if self.vocabulary.ends(token):
                    reason: Finish = "stop"
                    break
                written.append(token)
                if shown := stream.push(self.vocabulary.piece(token)):
                    yield shown
                if len(written) == 1:
                    self._reader.secure()
                if reason := self._reason(len(written), stream, sampling, stop):
                    break
                memory.read([token])
        if rest := stream.push(b"", last=True):
            yield rest
        self.finish_reason = reason

    def _reason(self, n: int, stream: Stream, sampling: Sampling, stop: Stop | None) -> Finish:
        """Why the answer ends here, or nothing."""
        if stream.cut:
            return "stop"
        if n == sampling.n_predict:
            return "length"
        if stop is not None and stop():
            return "interrupted"
        return "window" if self._reader.memory.n >= self.window else ""

    def _render(self, messages: Sequence[Message]) -> str:
        shield = self.vocabulary.shield
        head = self._head()
        given = [{"role": "system", "content": head}, *messages] if head else messages
        return self._template.render([{**one, "content": shield(one["content"])} for one in given])

    def _head(self) -> str:
        """What stands before all questions."""
        texts = [f"# {name}\n\n{text.strip()}" if name else text.strip() for name, text in self.documents]
        return "\n\n".join(filter(None, [self.system, *texts]))

    def _opening(self) -> array[int]:
        """The tokens that come before any question, whatever it is."""
        if self._opening_tokens is None:
            found = self._before_question([], Transcript(self.vocabulary))
            self._opening_tokens = found[: max(len(found) - _SEAM, 0)] if self._head() else array("i")
        return self._opening_tokens

    def _so_far(self) -> list[int]:
        """The tokens of the conversation up to the last answer."""
        if self._settled:
            return self._transcript.tokens
        asked = self._transcript.for_prompt(self._render([*self._messages, {"role": "user", "content": "?"}]))
        kept = asked.through(len(self._messages) // 2)
        return kept or list(self._before_question(self._messages, asked) if self._messages else self._opening())

    def _before_question(self, messages: list[Message], transcript: Transcript) -> array[int]:
        """The tokens that come before the next question, or are in it whatever it is."""
        probes = ([*messages, {"role": "user", "content": probe}] for probe in ("Why?", "2 + 2"))
        one, other = (array("i", transcript.for_prompt(self._render(given)).tokens) for given in probes)
        return one[: shared(one, other)]

    def _check_room(self, n: int) -> None:
        if n >= self.window:
            raise self._full(n, "the conversation does not fit in the context")

    def _full(self, n: int, what: str) -> ContextFull:
        """The error with its numbers, and how many turns would have to go."""
        over, turns = n - self.window + 1, 0
        while over > 0 and 2 * turns < len(self._messages):
            over -= sum(self.count(one["content"]) for one in self._messages[2 * turns : 2 * turns + 2])
            turns += 1
        documents = f", {len(self._opening())} of them before the first question" if self._head() else ""
        fix = "load the model with a larger n_ctx, or `mrrope extend` it further"
        if over <= 0:
            fix = f"drop_oldest({turns}) makes room for a start; or {fix}"
        return ContextFull(
            what,
            why=f"it has {n} tokens{documents}, and the window {self.window}",
            fix=fix,
            tokens=n,
            window=self.window,
        )

    def _need_turns(self, n: int) -> None:
        turns = len(self._messages) // 2
        if not 0 < n <= turns:
            raise Refused("there is no such turn", why=f"{n} asked for, {turns} there", fix="ask something first")

    def _change(self, messages: list[Message], *, settled: bool = False) -> None:
        self._messages, self._settled, self._answering = messages, settled, None
        self._keep_named()

    def _keep_named(self) -> bool:
        if self._named is None:
            return True
        state = self._reader.state
        values: dict[str, Any] = {
            "created": self._created, "path": str(Path(self._llm.model_path).absolute()),
            "system": self.system, "documents": [list(one) for one in self.documents],
            "messages": self._messages, "pieces": self._transcript.to_json(), "tokens": self.tokens_used,
            "sampling": {**vars(self.sampling)}, "state": f"{state.parent.name}/{state.name}" if state else "",
            "n_ctx": self.window,
        }  # fmt: skip
        try:
            mark = self._reader.fingerprint()
            self._named.save({**values, "model": mark.name, "parts": dict(mark.parts)})
        except (MrropeError, OSError) as error:
            self._note(f"the session was not saved: {in_a_line(error)}")
            return False
        return True

    def _reopen(self, given: dict[str, Any]) -> None:
        """Go on with the conversation that is kept under this name, if there is one."""
        values = self._named.load() if self._named else None
        if values is None:
            return
        documents = [(str(name), str(text)) for name, text in values["documents"]]
        if (self.system is not None and self.system != values["system"]) or (
            self.documents and self.documents != documents
        ):
            raise Refused(
                f"the session {values['name']!r} has another beginning",
                why="its system prompt or documents are not those that were given",
                fix="leave them out to go on with it, or take another name",
            )
        self.system, self.documents, self._created = values["system"], documents, values["created"]
        self.sampling = Sampling().but(**{**values["sampling"], **given})
        self._messages = [{part: one[part] for part in ("role", "content")} for one in values["messages"]]
        del self._messages[len(self._messages) // 2 * 2 :]
        mark = self._reader.fingerprint()
        if mark.parts["model"] == values["parts"].get("model"):
            self._transcript = Transcript.from_json(self.vocabulary, values["pieces"])
        if changes := mark.differences(values["parts"]):
            self._note(f"the session is read again, for the model is not as it was: {changes}")

    def _note(self, line: str) -> None:
        """Say something once."""
        if line in self._told:
            return
        self._told.add(line)
        if self._on_note:
            self._on_note(line)
        else:
            warnings.warn(line, stacklevel=3)
