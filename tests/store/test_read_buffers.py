"""Memory for reads that is used again."""

from __future__ import annotations

import gc

import numpy as np
import torch

from pipo_ray.store.read_buffers import _MOST_KEPT_BYTES, ReadBuffers


def _address(array: np.ndarray) -> int:  # type: ignore[type-arg]
    return int(array.ctypes.data)


def test_memory_is_page_aligned_and_large_enough() -> None:
    buffers = ReadBuffers()
    for nbytes in (1, 4096, (2 << 20) + 1):
        lent = buffers.take(nbytes)
        assert lent.shape == (nbytes,)
        assert _address(lent) % 4096 == 0


def test_it_is_lent_again_only_when_the_last_view_is_gone() -> None:
    buffers = ReadBuffers()
    first = buffers.take(100)
    address = _address(first)
    view = torch.from_numpy(first[10:20]).view(torch.int16)
    del first
    assert _address(buffers.take(100)) != address
    view[:] = 7
    others = [buffers.take(100) for _ in range(3)]
    for other in others:
        other[:] = 0
    assert view.eq(7).all()
    del view, others, other
    gc.collect()
    assert address in {_address(lent) for lent in [buffers.take(100) for _ in range(8)]}


def test_small_reads_find_memory_after_large_ones() -> None:
    buffers = ReadBuffers()
    large = [buffers.take(_MOST_KEPT_BYTES // 2) for _ in range(3)]
    del large
    small = [buffers.take(1000) for _ in range(4)]
    addresses = {_address(lent) for lent in small}
    del small
    gc.collect()
    assert sum(map(len, buffers._free)) <= _MOST_KEPT_BYTES
    assert addresses & {_address(lent) for lent in [buffers.take(1000) for _ in range(8)]}
