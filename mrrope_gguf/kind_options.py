"""Options of a command that only some of its kinds have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from .errors import Refused

# by option: what it is in the arguments, and the kinds that have it
Options = Mapping[str, tuple[str, tuple[str, ...]]]


def require_meaning(
    args: argparse.Namespace, verb: str, kind: str, options: Options, fixes: Mapping[str, str] | None = None
) -> None:
    """Refused for an option that this kind would ignore: what was asked for would not be done.

    fixes: by option, what to do instead, where that is more than leaving it out.
    """
    for option, (name, kinds) in options.items():
        given = getattr(args, name)
        if given is not None and given is not False and given != [] and kind not in kinds:
            raise Refused(
                f"{verb} {kind}: {option} means nothing here",
                why=f"it belongs to {' and '.join(kinds)}",
                fix=(fixes or {}).get(option, "leave it out"),
            )
