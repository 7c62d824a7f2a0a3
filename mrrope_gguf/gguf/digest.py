"""What tells one model from another without reading all of it: 64 evenly spread MiB of a file stand for its data."""

from __future__ import annotations

import hashlib

from mrrope_gguf.gguf.copy import read_pieces
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.undo import prefix_end

MIB = 1 << 20
SAMPLES = 64  # MiB of a file that are hashed


def source_digest(source: Source) -> str:
    """sha256, in hex, of a model as it was before it was extended: of each shard's size, header and sampled data.

    A file whose header and size are the same, and which differs between the samples alone, is taken for the same.
    """
    digest = hashlib.sha256()
    for shard in source.shards:
        layout, lies = source.shard_layout(shard), source.shard_index(shard)
        header = prefix_end(source.index if shard == source.path else lies)
        for start, end in [(0, header), *samples(header, layout.size)]:
            pieces = layout.slice(start, end)
            digest.update(read_pieces(lambda at, n, lies=lies: lies.raw(at, at + n), pieces))  # type: ignore[misc]
        digest.update(layout.size.to_bytes(8, "little"))
    return digest.hexdigest()


def samples(start: int, end: int, count: int = SAMPLES, size: int = MIB) -> list[tuple[int, int]]:
    """The (start, end) in bytes of what is read of start..end: all of it, or `count` stretches of `size`.

    >>> samples(0, 10, count=3, size=4), samples(0, 100, count=3, size=4)
    ([(0, 4), (4, 8), (8, 10)], [(0, 4), (48, 52), (96, 100)])
    """
    if end - start <= count * size:
        return [(at, min(at + size, end)) for at in range(start, end, size)]
    starts = [start + i * (end - start - size) // (count - 1) for i in range(count)]
    return [(at, at + size) for at in starts]
