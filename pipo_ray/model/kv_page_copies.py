"""KV pages on a GPU: what computes is given a copy of the page in RAM, and the newest pages are written there.

The GPU has a *place* for the newest page of each layer of each sequence, and two *groups* of places that pages pass
through, several of a layer at once. Copies from RAM ("KV load") run ahead of the computation by a group; a page that is
full is copied to its frame in RAM ("KV save"). The host waits for a copy only where it hands a frame to somebody who
knows nothing of CUDA: to the loader.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from pipo_ray.errors import ResourceError
from pipo_ray.pipeline.device_ops import DeviceOps, Event


@dataclass(eq=False)
class _Place:
    """A page of GPU memory, which may be used again once `free_at` has happened."""

    memory: Tensor
    free_at: Event | None = None


class PageCopies:
    """Copies of `frames` (uint8 [ram_pages, page_bytes], in RAM), `newest` places for pages that are written, and two
    groups of `group` for those that are only read.
    """

    def __init__(self, frames: Tensor, ops: DeviceOps, newest: int, group: int) -> None:
        self._frames, self._ops = frames, ops
        page_bytes = frames.shape[1]
        memory = ops.allocate((newest + 2 * group) * page_bytes).view(newest + 2 * group, page_bytes)
        self._newest = deque(_Place(row) for row in memory[:newest])
        self._groups = deque(_Place(rows) for rows in memory[newest:].split(group))
        self._written: dict[int, _Place] = {}  # by the frame that it will be copied to
        self._leaving: dict[int, Event] = {}  # copies from a frame, and to it, that may be under way
        self._arriving: dict[int, Event] = {}
        self._latest: Event | None = None  # copy into the next group
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
        place = self._written[frame]
        self._copy(frame, place.memory[None], place.free_at)
        self._ops.compute_waits_for(self._leaving[frame])

    def settle(self, frame: int) -> None:
        """The page is full: it goes to its frame, and its place is free."""
        place = self._written.pop(frame)
        target = self._frames[frame]
        done = self._ops.copy(place.memory, target, self._ops.record_on_compute(), "KV save")
        self._arriving[frame] = place.free_at = done
        self._newest.append(place)

    def close(self, frame: int) -> None:
        """The page is not needed any more."""
        if (place := self._written.pop(frame, None)) is not None:
            place.free_at = self._ops.record_on_compute()
            self._newest.append(place)

    def written(self, frame: int) -> Tensor:
        """The page that is written, on the GPU: uint8 [page_bytes]."""
        return self._written[frame].memory

    def into_group(self, row: int, frames: list[int]) -> None:
        """Put copies of these pages into the next group from `row` on: neighbours in RAM at once. The frames are not
        needed any more once `complete` returns.
        """
        group, index = self._groups[0], 0
        while index < len(frames):
            at, count = row + index, 1
            if (place := self._written.get(frames[index])) is not None:
                group.memory[at].copy_(place.memory)  # both are the computation's own
            else:
                while frames[index + count : index + count + 1] == [frames[index] + count]:
                    if frames[index + count] in self._written:
                        break
                    count += 1
                self._copy(frames[index], group.memory[at : at + count], group.free_at)
            index += count

    def group(self, num_pages: int) -> Tensor:
        """The pages [num_pages, page_bytes] that were put into the next group, for what is computed until `passed`."""
        if self._latest is not None:
            self._ops.compute_waits_for(self._latest)  # and for those before it, on the same stream
            self._latest = None
        return self._groups[0].memory[:num_pages]

    def passed(self) -> None:
        """What computes with the group was issued."""
        self._groups[0].free_at = self._ops.record_on_compute()
        self._groups.rotate(-1)

    def complete(self, frame: int) -> None:
        """Wait until all copies to and from the frame are done: somebody else is to read it or to write to it."""
        for events in (self._arriving, self._leaving):
            if (event := events.pop(frame, None)) is not None:
                event.synchronize()

    def is_complete(self, frame: int) -> bool:
        """Whether `complete` would not have to wait."""
        return all(event is None or event.query() for event in (self._arriving.get(frame), self._leaving.get(frame)))

    def _copy(self, first: int, target: Tensor, after: Event | None) -> None:
        """Copy the frames from `first` on to `target` [frames, page_bytes]."""
        frames = range(first, first + len(target))
        for frame in frames:
            if (event := self._arriving.pop(frame, None)) is not None:
                event.synchronize()
        source = self._frames[first : first + len(target)]
        self._latest = self._ops.copy(source, target, after, "KV load")
        self._leaving.update(dict.fromkeys(frames, self._latest))
