"""More than one machine: passes on the workers of a Dask cluster, through its concurrent.futures executor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from ..errors import MrropeError


@contextmanager
def connect(address: str, timeout: str = "10s") -> Iterator[Executor]:
    """The executor of the scheduler at `address`. Workers need the model and the texts at the same paths.

    A pass whose worker dies is given to another one, as often as Dask's `allowed-failures` says (3 times). Raises
    MrropeError where Dask is not installed, or nobody answers.
    """
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise MrropeError(
            "--cluster needs Dask",
            why="the package distributed is not installed",
            fix="pip install 'mrrope-gguf[cluster]'",
        ) from None
    client = Client.__new__(Client)  # to be closed where its construction fails: else it may stall a later one
    try:
        client.__init__(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:
        client.close()
        raise MrropeError(
            f"{address}: no Dask scheduler answers there",
            why=str(error),
            fix="start one with `dask scheduler`, and give the address it prints",
        ) from None
    with client, client.get_executor(pure=False) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False)  # Ctrl-C does not wait for passes that run
            raise
