"""The loader's second task: KV pages, from RAM to the drive and back, as the compute worker asks for them.

Threads of its own, beside those that read weights: a page is needed within a layer or two, so it must not queue behind
weights, which are read as far ahead as there are slots. The drive shares itself between both.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.pipeline.page_table import FrameState, PageRequest, PageTable
from pipo_ray.pipeline.slots import U8
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter

_log = logging.getLogger("pipo_ray")
PAGE_THREADS = 4


@dataclass
class PageCounters:
    """Bytes moved since it started; `busy_s` is the threads' time together. `direct`: not through the page cache."""

    loaded_bytes: int = 0
    saved_bytes: int = 0
    busy_s: float = 0.0
    direct: bool = True
    retries: int = 0


class PageServer:
    """Moves pages between `frames` (uint8 arrays of a page each, 4096-aligned) and `file`, as `table` says."""

    def __init__(
        self,
        file: PageFile,
        table: PageTable,
        frames: Sequence[U8],
        *,
        threads: int = PAGE_THREADS,
        trace: TraceWriter = NO_TRACE,
    ) -> None:
        self._file, self._table, self._trace = file, table, trace
        self._frames = [frame.data for frame in frames]
        self._turn = threading.Lock()  # of the one that takes the next request; it sleeps with it
        self._state = threading.Condition()
        self._moving = 0
        self._epoch = table.epoch
        self._taken = table.posted
        # A predecessor who was killed has left these; what it had half done is done again.
        self._inherited = table.open_requests(table.first, self._taken)
        table.drive_asked(0)
        table.acknowledge(self._epoch)
        self._counters = PageCounters()
        self._threads = [threading.Thread(target=self._serve, name=f"kv-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all threads; the table must have been stopped."""
        for thread in self._threads:
            thread.join()
        self._file.close()

    def snapshot(self) -> PageCounters:
        """The counters now."""
        with self._state:
            return replace(self._counters, direct=self._file.direct, retries=self._file.retries)

    def _serve(self) -> None:
        while (request := self._take()) is not None:
            begin = time.perf_counter()
            error = self._move(request)
            self._table.finish(request, error)
            end = time.perf_counter()
            name = "KV save" if request.kind == FrameState.SAVE else "KV load"
            self._trace.add(name, begin, end, {"piece": f"page {request.page}", "bytes": self._file.page_bytes})
            with self._state:
                self._moving -= 1
                self._table.drive_asked(end if self._moving else 0)
                if not self._file.direct:
                    self._table.note_buffered()
                self._counters.busy_s += end - begin
                if request.kind == FrameState.SAVE:
                    self._counters.saved_bytes += self._file.page_bytes
                else:
                    self._counters.loaded_bytes += self._file.page_bytes
                self._state.notify_all()

    def _take(self) -> PageRequest | None:
        """The next request; None when everybody is to stop."""
        with self._turn:
            while not self._table.stopped:
                if self._table.epoch != self._epoch:
                    self._begin_epoch()
                request = self._next()
                if request is not None:
                    with self._state:
                        self._moving += 1
                        if self._moving == 1:
                            self._table.drive_asked(time.perf_counter())
                    return request
                if self._table.epoch == self._epoch:
                    self._table.wait_posted(self._taken)
            return None

    def _next(self) -> PageRequest | None:
        if self._inherited:
            return self._inherited.pop(0)
        while self._taken < self._table.posted:
            request = self._table.request(self._taken)
            self._taken += 1
            if request is not None:
                return request
        return None

    def _begin_epoch(self) -> None:
        """The compute worker is new: nothing may be moved for the old one any more when it is told so."""
        with self._state:
            while self._moving:
                self._state.wait()
        epoch = self._table.epoch
        self._inherited.clear()
        self._taken = max(self._taken, self._table.first)
        self._epoch = epoch
        self._table.acknowledge(epoch)

    def _move(self, request: PageRequest) -> int:
        """Returns 0, or the number of the error."""
        try:
            memory = self._frames[request.frame]
            if request.kind == FrameState.SAVE:
                self._table.set_seal(request.page, self._file.save(memory, request.page))
            else:
                self._file.load(memory, request.page, self._table.seal(request.page))
        except OSError as error:
            return error.errno or errno.EIO
        except Exception:  # a defect of ours: the compute worker must hear of it instead of waiting for ever
            _log.exception("pipo: KV page %d", request.page)
            return errno.EIO
        return 0
