"""KV pages on a GPU: what computes is given a copy of the page in RAM, and the newest pages are written there.

The GPU has a *place* for the newest page of each layer of each sequence, and some that pages pass through. Copies from
RAM ("KV load") run ahead of the computation as far as there are places; a page that is full is copied to its frame in
RAM ("KV save"). The host waits for a copy only where it hands a frame to somebody who knows nothing of CUDA: to the
loader.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from pipo_ray.errors import ResourceError
from pipo_ray.pipeline.device_ops import DeviceOps, Event


@dataclass(eq=False)
class _Place:
    """A page of GPU memory, which may be used again once `free_at` has happened."""

    memory: Tensor
    free_at: Event | None = None


class PageCopies:
    """Copies of `frames` (uint8 [ram_pages, page_bytes], in RAM), `newest` places for pages that are written, and
    `passing` for those that are only read.
    """

    def __init__(self, frames: Tensor, dtype: torch.dtype, ops: DeviceOps, newest: int, passing: int) -> None:
        self._frames, self._ops = frames, ops
        page_bytes = frames.shape[1]
        memory = ops.allocate((newest + passing) * page_bytes).view(newest + passing, page_bytes)
        places = [_Place(row.view(dtype)) for row in memory]
        self._dtype = dtype
        self._newest, self._passing = deque(places[:newest]), deque(places[newest:])
        self._written: dict[int, _Place] = {}  # by the frame that it will be copied to
        self._leaving: dict[int, Event] = {}  # copies from a frame, and to it, that may be under way
        self._arriving: dict[int, Event] = {}
        # Registering takes 0.4 s per GB; nobody waits for it.
        self._pinning = threading.Thread(target=lambda: ops.pin(frames.view(-1)), name="pin KV", daemon=True)
        self._pinning.start()

    def open(self, frame: int) -> None:
        """The page of `frame` is written on the GPU from here on."""
        if not self._newest:
            raise ResourceError("the GPU has no place for the newest KV page of one more sequence; raise --gpu-memory")
        place = self._newest.popleft()
        if place.free_at is not None:
            self._ops.compute_waits_for(place.free_at)
        self._written[frame] = place

    def reopen(self, frame: int) -> None:
        """The same, with what it has in RAM."""
        self.open(frame)
        self._load(frame, self._written[frame])

    def settle(self, frame: int) -> None:
        """The page is full: it goes to its frame, and its place is free."""
        place = self._written.pop(frame)
        done = self._ops.copy(place.memory, self._row(frame), self._ops.record_on_compute(), "KV save")
        self._arriving[frame] = place.free_at = done
        self._newest.append(place)

    def close(self, frame: int) -> None:
        """The page is not needed any more."""
        if (place := self._written.pop(frame, None)) is not None:
            place.free_at = self._ops.record_on_compute()
            self._newest.append(place)

    def read(self, frame: int) -> Tensor:
        """The page on the GPU, for what is computed until `passed`."""
        if (place := self._written.get(frame)) is None:
            place = self._passing[0]
            self._load(frame, place)
        return place.memory

    def passed(self, frame: int) -> None:
        """What computes with the page was issued."""
        if frame not in self._written:
            place = self._passing.popleft()
            place.free_at = self._ops.record_on_compute()
            self._passing.append(place)

    def complete(self, frame: int) -> None:
        """Wait until all copies to and from the frame are done: somebody else is to read it or to write to it."""
        for events in (self._arriving, self._leaving):
            if (event := events.pop(frame, None)) is not None:
                event.synchronize()

    def _load(self, frame: int, place: _Place) -> None:
        if (event := self._arriving.pop(frame, None)) is not None:
            event.synchronize()
        self._leaving[frame] = event = self._ops.copy(self._row(frame), place.memory, place.free_at, "KV load")
        self._ops.compute_waits_for(event)

    def _row(self, frame: int) -> Tensor:
        return self._frames[frame].view(self._dtype)
