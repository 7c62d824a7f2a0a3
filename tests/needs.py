"""What a test needs and may lack: a reason to skip it, or a failure where CI has made sure that it is there."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def cannot(reason: str, needed: str) -> NoReturn:
    """Skip the running test for `reason`; fail it where the environment variable `needed` is set.

    MRROPE_NEED_MOUNTS: root, loop devices, mkfs of every kind. MRROPE_NEED_COMPILERS: clang with libFuzzer, and g++ for
    32 bits. MRROPE_NEED_VULKAN: a Vulkan device and headers.
    """
    if os.environ.get(needed):
        pytest.fail(f"{needed} is set, and {reason}")
    pytest.skip(reason)
