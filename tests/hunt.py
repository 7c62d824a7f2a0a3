"""Long hunts with Hypothesis: rounds of fresh examples for as long as is asked, each round's seed told.

The seed of a round that failed makes it again: MRROPE_TEST_SEED=... make test-hard.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T")
ROUND = 200  # examples
SECONDS = float(os.environ.get("MRROPE_TEST_HUNT_SECONDS", "600"))


def hunt(
    strategy: st.SearchStrategy[T], check: Callable[[T], None], say: Callable[[str], None], seconds: float = SECONDS
) -> int:
    """Give `check` examples of `strategy` for so long, and return how many there were. It raises as `check` does."""
    seen, ends = 0, time.monotonic() + seconds
    given_seed = os.environ.get("MRROPE_TEST_SEED")
    while time.monotonic() < ends:
        number = int(given_seed) if given_seed else int.from_bytes(os.urandom(6), "big")
        say(f"seed {number} after {seen} examples")

        def one(example: T) -> None:
            nonlocal seen
            seen += 1
            check(example)

        _round(strategy, one, number)
        if given_seed:
            break
    return seen


def _round(strategy: st.SearchStrategy[T], check: Callable[[T], None], number: int) -> None:
    quiet = list(HealthCheck)
    phases = (Phase.generate, Phase.shrink)
    run = settings(max_examples=ROUND, deadline=None, database=None, phases=phases, suppress_health_check=quiet)
    seed(number)(run(given(strategy)(check)))()
