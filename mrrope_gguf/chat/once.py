"""One question, one answer: stdout is the model's text alone."""

from __future__ import annotations

import sys

from ..errors import ContextFull, FileTrouble, Refused
from ..plain_text import decode, not_text
from .plan import TALK
from .speaker import Speaker
from .window import meter

_MOST = 32 << 20
INTERRUPTED = 130


def piped() -> str:
    """The question in stdin, of which the last line end is none of. Raises Refused for what is no question."""
    try:
        data = sys.stdin.buffer.read(_MOST + 1) if sys.stdin else b""
    except OSError as error:
        why = error.strerror or str(error)
        raise FileTrouble("stdin cannot be read", why=why, fix="give the question with -p") from None
    if what := not_text(data[:65536]):
        fix = "give documents with -f and the question with -p"
        raise Refused(f"stdin: this is {what}, not a question", why="a question is text", fix=fix)
    if len(data) > _MOST:
        raise Refused("stdin: too long for a question", why=f"more than {_MOST >> 20} MiB", fix="take a part of it")
    return require(decode(data)[0].rstrip("\r\n"))


def require(question: str) -> str:
    """The question, if it is one. Raises Refused."""
    if not question.strip():
        raise Refused("there is no question", why="what was given is empty", fix="give one with -p or by a pipe")
    return question


def answer_once(speaker: Speaker, question: str) -> int:
    """Ask, print the answer; returns the exit code: 0, or 130 if Ctrl-C ended it.

    Raises ContextFull where there is no room, after as much of the answer as there was.
    """
    try:
        done = speaker.say(question)
    except ContextFull as full:
        wanted = -(-(full.tokens + TALK) // 256) * 256
        fix = f"-c {wanted}, or a shorter text"
        if speaker.session.messages:
            fix += "; in a conversation at the terminal /drop forgets the oldest turns"
        raise ContextFull(full.what, why=full.why, fix=fix, tokens=full.tokens, window=full.window) from None
    speaker.talk.say(meter(speaker.used, speaker.session.window, speaker.session.scale, speaker.full_scale))
    return 0 if done else INTERRUPTED
