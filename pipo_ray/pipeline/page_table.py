"""The table of KV pages between RAM and disk, in shared memory: what is to be moved, what has been, and how each page
in the file was sealed.

A *frame* is a page of RAM. The compute worker owns all frames; to move one it posts a request, and while that is open
the frame is the loader's:

    compute: SAVE or LOAD (frame <-> page of the file) --loader--> DONE or FAILED

A frame has at most one open request. So requests need no order: nothing is loaded whose save is not done. A loader that
was killed finds every open request in the frames' rows and does it again. When the compute worker is new, it begins a
new epoch and waits until the loader, which moves nothing for the old one any more, has acknowledged that.

Layout, little-endian 64-byte rows: the header, the ring's counter, one per frame; the ring, a uint64 for each frame; a
seal of four uint64 per page of the file. The loader alone writes seals, and DONE behind them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from pipo_ray.pipeline import futex
from pipo_ray.pipeline.slots import ROW_BYTES, U8, StoppedError
from pipo_ray.pipeline.tracing import NO_TRACE

_WAIT_SLICE_S = 0.5
_WORDS = ROW_BYTES // 8
_SEAL_WORDS = 4
_NO_FRAME = (1 << 64) - 1
# Header words (uint64). Compute writes the first two, the loader the others.
_EPOCH, _FIRST, _EPOCH_SEEN, _NONCE, _ASKED, _BUFFERED = range(6)
_POSTED = _WORDS  # the low half is the futex that the loader sleeps on
# Words of a frame's row: uint32 word 0 is the state (the futex); uint64 words from 1 on.
_NUMBER, _PAGE, _ERROR, _JOINS = 1, 2, 3, 4


class FrameState(IntEnum):
    """What is to become of a frame, or has."""

    IDLE = 0
    SAVE = 1
    LOAD = 2
    DONE = 3
    FAILED = 4


MOVING = (FrameState.SAVE, FrameState.LOAD)
"""Of a frame that the loader has been asked to move."""


@dataclass(frozen=True)
class PageRequest:
    """Move `frame` to `page` of the file, or the other way round; with `joins` it may be one transfer with the request
    before it.
    """

    number: int
    kind: FrameState
    frame: int
    page: int
    joins: bool


@dataclass(frozen=True)
class Seal:
    """By which a page that comes back is known to be what was written: `nonce` is that of its encryption, or 0 where
    there is none; `tag` 16 bytes.
    """

    nonce: int
    tag: bytes


class PageTable:
    """The table over `memory` (uint8, at least `PageTable.nbytes(...)` bytes, zeroed once by the driver). `stopped`
    tells when everybody is to stop.
    """

    def __init__(self, memory: U8, num_frames: int, num_pages: int, stopped: Callable[[], bool]) -> None:
        needed = self.nbytes(num_frames, num_pages)
        if memory.nbytes < needed:
            raise ValueError(f"page table needs {needed} bytes, got {memory.nbytes}")
        self.num_frames, self.num_pages = num_frames, num_pages
        self._memory, self._address, self._stopped = memory, memory.ctypes.data, stopped
        self.trace = NO_TRACE
        self._words64 = memory[:needed].view(np.uint64)
        self._words32 = memory[:needed].view(np.uint32)
        ring = (2 + num_frames) * _WORDS
        self._ring = self._words64[ring : ring + num_frames]
        self._seals = self._words64[ring + num_frames :].reshape(num_pages, _SEAL_WORDS)

    @staticmethod
    def nbytes(num_frames: int, num_pages: int) -> int:
        """Bytes of a table."""
        return ROW_BYTES * (2 + num_frames) + 8 * num_frames + 8 * _SEAL_WORDS * num_pages

    @property
    def stopped(self) -> bool:
        """Whether everybody is to stop."""
        return self._stopped()

    def state(self, frame: int) -> FrameState:
        """What a frame is at."""
        return FrameState(int(self._words32[2 * self._row(frame)]))

    # -- compute's side
    # -------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """A new compute worker: no request of its predecessor is open any more. Raises StoppedError."""
        self._post([_NO_FRAME])  # whoever sleeps looks at the epoch
        self._words64[_FIRST] = self.posted
        self._words64[_EPOCH] = epoch = self.epoch + 1
        self._post([_NO_FRAME])
        while int(self._words64[_EPOCH_SEEN]) != epoch:
            if self.stopped:
                raise StoppedError
            time.sleep(0.0005)
        for frame in range(self.num_frames):
            self._words32[2 * self._row(frame)] = FrameState.IDLE

    def post(self, kind: FrameState, moves: Sequence[tuple[int, int]]) -> None:
        """Ask for each of these frames to be saved to, or loaded from, its page of the file: (frame, page). Those that
        are neighbours in the file may be one transfer, which fails as one.
        """
        posted = self.posted
        for number, (frame, page) in enumerate(moves, posted):
            row = self._row(frame)
            self._words64[row + _NUMBER] = number
            self._words64[row + _PAGE] = page
            self._words64[row + _JOINS] = number > posted
            self._words32[2 * row] = kind
        self._post([frame for frame, _ in moves])

    def wait(self, frame: int) -> float:
        """Until the frame's request is done, or has failed; seconds waited. Raises StoppedError."""
        state = self.state(frame)
        if state not in MOVING:
            return 0.0
        begin = time.perf_counter()
        while state in MOVING:
            if self.stopped:
                raise StoppedError
            futex.wait(self._address + 8 * self._row(frame), int(state), _WAIT_SLICE_S)
            state = self.state(frame)
        end = time.perf_counter()
        self.trace.add("wait for KV pages", begin, end, {"frame": frame})
        return end - begin

    def error(self, frame: int) -> int:
        """The error number with which the frame's request has failed."""
        return int(self._words64[self._row(frame) + _ERROR])

    # -- loader's side
    # --------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of compute workers that there were."""
        return int(self._words64[_EPOCH])

    @property
    def first(self) -> int:
        """The first request of this epoch."""
        return int(self._words64[_FIRST])

    @property
    def posted(self) -> int:
        """Requests that were ever posted."""
        return int(self._words64[_POSTED])

    def acknowledge(self, epoch: int) -> None:
        """Loader: nothing is moved for an older epoch any more."""
        self._words64[_EPOCH_SEEN] = epoch

    def open_requests(self, first: int, stop: int) -> list[PageRequest]:
        """Requests first:stop that are open, in order."""
        found = [request for frame in range(self.num_frames) if (request := self._request(frame)) is not None]
        return sorted((one for one in found if first <= one.number < stop), key=lambda one: one.number)

    def request(self, number: int) -> PageRequest | None:
        """Request `number`, one of the last `num_frames`; None if it is not open."""
        frame = int(self._ring[number % self.num_frames])
        if frame == _NO_FRAME:
            return None
        request = self._request(frame)
        return request if request is not None and request.number == number else None

    def wait_posted(self, seen: int) -> None:
        """Sleep until more than `seen` were posted, for half a second at most."""
        if self.posted == seen:
            futex.wait(self._address + 8 * _POSTED, seen & 0xFFFFFFFF, _WAIT_SLICE_S)

    def finish(self, request: PageRequest, error: int = 0) -> None:
        """Loader: it is done, or has failed with this error number."""
        row = self._row(request.frame)
        self._words64[row + _ERROR] = error
        self._words32[2 * row] = FrameState.FAILED if error else FrameState.DONE
        futex.wake(self._address + 8 * row)

    def next_nonce(self) -> int:
        """Loader, one thread at a time: a number that no page was encrypted with before; also not by a predecessor."""
        self._words64[_NONCE] += np.uint64(1)
        return int(self._words64[_NONCE])

    def seal(self, page: int) -> Seal:
        """Of what was last written to `page`."""
        return Seal(int(self._seals[page, 0]), self._seals[page, 1:3].tobytes())

    def set_seal(self, page: int, seal: Seal) -> None:
        """Loader: this is what was written to `page`."""
        self._seals[page, 0] = seal.nonce
        self._seals[page, 1:3] = np.frombuffer(seal.tag, np.uint64)

    def drive_asked(self, since_s: float) -> None:
        """Loader: since `since_s` (`time.perf_counter`) the drive has been asked and has given nothing; 0: it is asked
        nothing.
        """
        self._words64[_ASKED] = int(since_s * 1e6)

    def note_buffered(self) -> None:
        """Loader: pages go through the page cache."""
        self._words64[_BUFFERED] = 1

    # -- the driver's
    # ---------------------------------------------------------------------------------------------------

    @property
    def drive_silent_s(self) -> float:
        """Seconds for which the drive has been asked and has given nothing."""
        since = int(self._words64[_ASKED])
        return max(0.0, time.perf_counter() - since / 1e6) if since else 0.0

    @property
    def drive_buffered(self) -> bool:
        """Whether pages go through the page cache."""
        return bool(self._words64[_BUFFERED])

    # -- inside
    # ---------------------------------------------------------------------------------------------------------

    def _row(self, frame: int) -> int:
        """Index of a frame's row in uint64 words."""
        return (2 + frame) * _WORDS

    def _post(self, frames: Sequence[int]) -> None:
        """One wake for all of them: so whoever looks finds neighbours, too."""
        if not frames:
            return
        posted = self.posted
        for number, frame in enumerate(frames, posted):
            self._ring[number % self.num_frames] = frame
        self._words64[_POSTED] = posted + len(frames)
        futex.wake(self._address + 8 * _POSTED)

    def _request(self, frame: int) -> PageRequest | None:
        row, state = self._row(frame), self.state(frame)
        if state not in MOVING:
            return None
        number, page, joins = (int(self._words64[row + word]) for word in (_NUMBER, _PAGE, _JOINS))
        return PageRequest(number, state, frame, page, bool(joins))
