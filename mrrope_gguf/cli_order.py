"""Words of the command line in any order: what argparse leaves over, or takes for an option's, put where it belongs."""

from __future__ import annotations

import argparse

_PLACES = ("model", "gguf", "dst")  # which argparse fills with nothing where an option stands between two words
_LISTS = ("texts", "files", "file")  # of options that take every word up to the next option, a model's file too


def arrange(args: argparse.Namespace, extra: list[str], kinds: tuple[str, ...] = ()) -> list[str]:
    """Put words where they belong; returns those that belong nowhere.

    Some argparse versions give an optional positional up at the first option (`eval kl --lengths 8k FILE`), and
    `--text a.txt kl m.gguf` is three texts to all of them. kinds: the words that `args.what` may be.

    >>> args = argparse.Namespace(model=None, dst=None)
    >>> arrange(args, ["a.gguf", "b.gguf", "c.gguf"]), args.model, args.dst
    (['c.gguf'], 'a.gguf', 'b.gguf')
    """
    end = extra.index("--") if "--" in extra else len(extra)
    if any(word.startswith("-") for word in extra[:end]):
        return extra
    extra = extra[:end] + extra[end + 1 :]
    words = _without_kind(args, extra, kinds) if "what" in args else extra
    for place in _PLACES:
        if words and getattr(args, place, words) is None:
            setattr(args, place, words.pop(0))
    if "names" in args:  # as many as there are
        args.names, words = [*args.names, *words], []
    for name in _LISTS:
        _give_back(args, getattr(args, name, None) or [], kinds)
    return words


def _without_kind(args: argparse.Namespace, extra: list[str], kinds: tuple[str, ...]) -> list[str]:
    """All words of a verb that says what and of which model, once `args.what` is taken out of them."""
    words = [word for word in (args.what, args.model, *extra) if word is not None]
    args.what = args.model = None
    for word in words:
        if word in kinds:
            args.what = word
            words.remove(word)
            break
    return words


def _give_back(args: argparse.Namespace, words: list[str], kinds: tuple[str, ...]) -> None:
    """Take what and model out of an option's words, where nothing else says them; its first word is its own."""
    place = "gguf" if "gguf" in args else "model"
    named = any(getattr(args, name, None) for name in (place, "model_flag", "hf"))
    for i in range(len(words) - 1, 0, -1):
        if not named and words[i].lower().endswith(".gguf"):
            setattr(args, place, words.pop(i))
            named = True
        elif getattr(args, "what", "") is None and words[i] in kinds:
            args.what = words.pop(i)
