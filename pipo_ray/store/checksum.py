"""The checksum of a byte range of a file, read once and not kept in the page cache."""

from __future__ import annotations

import os
from collections.abc import Callable

import xxhash

CHUNK_BYTES = 8 << 20


def range_checksum(
    descriptor: int,
    offset: int,
    nbytes: int,
    buffer: memoryview,
    advance: Callable[[int], None] | None = None,
) -> str:
    """xxh3_128 in hex of `nbytes` bytes from `offset` of an open file, read through `buffer`.

    `advance` is called with the number of bytes after each read. Raises EOFError if the file ends before, OSError.
    """
    # What is checked is the disk: a copy that is still in memory proves nothing about it.
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
    digest = xxhash.xxh3_128()
    end = offset + nbytes
    while offset < end:
        part = buffer[: min(len(buffer), end - offset)]
        count = os.preadv(descriptor, [part], offset)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset}, {end} are needed")
        digest.update(part[:count])
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        offset += count
        if advance is not None:
            advance(count)
    return digest.hexdigest()
