"""Reads a block store completely and compares it with its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipo_ray.errors import CheckpointError, StoreError
from pipo_ray.store.checksum import CHUNK_BYTES, range_checksum
from pipo_ray.store.manifest import Manifest, StoredBlock
from pipo_ray.store.safetensors_file import read_header


@dataclass(frozen=True)
class Problem:
    """A block that is not what the manifest says; `message` is one line."""

    block: str
    file: str
    message: str


def find_problems(folder: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Check every header entry and every checksum of the store in `folder`, stripes included; an empty list is a sound
    store.

    `progress` gets (bytes done, bytes in all). Memory is bounded. Raises StoreError if the manifest itself is unusable.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, manifest.total_bytes)

    problems: list[Problem] = []
    for file in manifest.files:
        blocks = [block for block in manifest.blocks if block.file == file]
        path = manifest.path(folder, blocks[0])
        try:
            entries = read_header(path).tensors
        except CheckpointError as error:
            message = str(error).removesuffix("; download or convert the checkpoint again")
            problems += [Problem(block.name, file, message) for block in blocks]
            continue
        with open(path, "rb", buffering=0) as opened:
            for block in blocks:
                for tensor in block.tensors:
                    entry = entries.get(tensor.key)
                    wanted = (tensor.dtype, tensor.shape, tensor.offset)
                    if entry is None or (entry.dtype, entry.shape, entry.offset) != wanted:
                        message = f"tensor {tensor.key!r} is elsewhere or something else in the file's header"
                        problems.append(Problem(block.name, file, message))
                problems += _compare(block, opened.fileno(), buffer, advance)
    return problems


def verify(folder: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Manifest:
    """As `find_problems`, but raises StoreError naming block and file, and returns the manifest of a sound store."""
    if problems := find_problems(folder, progress):
        first = problems[0]
        more = f" ({len({problem.block for problem in problems}) - 1} more blocks are damaged)" if problems[1:] else ""
        raise StoreError(
            f"block store {folder}: block {first.block!r} in {first.file}: {first.message}{more}; check the disk, "
            "remove the block store and pack the checkpoint again"
        )
    return Manifest.load(folder)


def _compare(block: StoredBlock, descriptor: int, buffer: memoryview, advance: Callable[[int], None]) -> list[Problem]:
    try:
        found = range_checksum(descriptor, block.offset, block.nbytes, buffer, advance)
    except (OSError, EOFError) as error:
        return [Problem(block.name, block.file, f"cannot be read ({error})")]
    if found == block.checksum:
        return []
    message = f"checksum {found} does not match the manifest's {block.checksum}"
    return [Problem(block.name, block.file, message)]
