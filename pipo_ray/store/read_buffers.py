"""Page-aligned memory to read into with O_DIRECT, used again as soon as nobody looks at it any more."""

from __future__ import annotations

import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from pipo_ray.session.huge_pages import private_memory

_STEP_BYTES = 2 << 20  # a huge page
_SMALL_STEP_BYTES = 128 << 10
_MOST_KEPT_BYTES = 64 << 20


class ReadBuffers:
    """A pool of buffers. Fresh memory costs a page fault every 4 KiB, as much time as a fast drive takes to fill it.
    Thread-safe.
    """

    def __init__(self, most_kept_bytes: int = _MOST_KEPT_BYTES) -> None:
        """`most_kept_bytes` are those that nobody uses."""
        self._most_kept_bytes = most_kept_bytes
        # Reentrant: an array may be collected, and its memory given back, in the middle of taking another.
        self._lock = threading.RLock()
        self._free: list[NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Uint8 of shape (nbytes,), page-aligned, its contents undefined. It belongs to the caller until the array, and
        every view of it, are gone.
        """
        with self._lock:
            memory = min((free for free in self._free if len(free) >= nbytes), key=len, default=None)
            if memory is not None:
                self._free = [free for free in self._free if free is not memory]
        if memory is None:
            step = _STEP_BYTES if nbytes > _STEP_BYTES // 2 else _SMALL_STEP_BYTES
            memory = private_memory(-(-nbytes // step) * step)
        lent = np.frombuffer(memory.data, np.uint8, nbytes)  # not a view of `memory`: views hold on to what they are of
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            free = sorted([*self._free, memory], key=len)
            while sum(map(len, free)) > self._most_kept_bytes:
                free.pop()  # the largest: what is read in between in one piece is asked for seldom
            self._free = free
