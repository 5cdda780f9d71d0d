"""Memory for the keys and values of one sequence on the CPU: several layers in a mapping.

Where many threads compute, each `munmap` interrupts all their cores: with a mapping for every layer's keys and another
for its values, giving back 7 sequences of 48 layers took 110 ms on a virtual machine with 16 cores.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

MAPPING_BYTES = 32 << 20
"""A mapping is no larger, unless a layer is. Linux frees some 38 MiB before it interrupts the other cores once more
(`MAX_GATHER_BATCH_COUNT`), so with more there is little left to gain.
"""

_LEAST_BYTES = 1 << 16
"""Bytes of a layer below which its memory comes from the allocator: here a layer is whole pages."""


class SequenceMemory:
    """Where the layers of one sequence lie. What is not touched takes no memory, and what is given back is the
    system's at once: a heap in which caches that stay lie among activations that come and go promises neither.

    A mapping is there as long as a tensor in it, or this, is.
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._used = 0
        self._places: dict[int, tuple[mmap.mmap, int, int]] = {}  # by layer: from which byte on, how many

    def pair(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory [heads, capacity, head_dim] for a layer's keys and for its values, which are like `keys` and `values`
        [heads, _, head_dim], as torch has it on another device than the CPU.
        """
        shapes = [(like.shape[0], capacity, like.shape[2]) for like in (keys, values)]
        key_bytes, value_bytes = (
            _whole_pages(math.prod(shape) * like.dtype.itemsize)
            for shape, like in zip(shapes, (keys, values), strict=True)
        )
        if keys.device.type != "cpu" or key_bytes + value_bytes < _LEAST_BYTES:
            return keys.new_empty(shapes[0]), values.new_empty(shapes[1])
        mapping, start = self._room(key_bytes + value_bytes)
        self._places[layer] = mapping, start, key_bytes + value_bytes
        return (
            _tensor(mapping, start, shapes[0], keys.dtype),
            _tensor(mapping, start + key_bytes, shapes[1], values.dtype),
        )

    def give_back(self, layer: int) -> None:
        """The pages of a layer are the system's again while others of its mapping are in use. What its tensors held is
        gone.
        """
        place = self._places.pop(layer, None)
        if place is not None:
            mapping, start, size = place
            mapping.madvise(mmap.MADV_DONTNEED, start, size)

    def _room(self, size: int) -> tuple[mmap.mmap, int]:
        if self._mapping is None or self._used + size > len(self._mapping):
            # So many layers as this one; address space that no layer comes for takes no memory.
            self._mapping, self._used = _map(max(1, MAPPING_BYTES // size) * size), 0
        start = self._used
        self._used += size
        return self._mapping, start


def _map(size: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Huge pages, where the system gives them unasked, would break both promises: heads lie apart, so the first token
    # would touch all that is reserved, and what no layer came for, and of a huge page nothing is given back before all
    # of it is. Nor are they faster: 8 sequences of OPT-30B's shape, 517 MB, took 271 ms to fill instead of 198, and 2
    # to give back instead of 24.
    with contextlib.suppress(OSError):  # a kernel without huge pages knows no such advice
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


def _tensor(mapping: mmap.mmap, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A view, which keeps the mapping."""
    return torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
