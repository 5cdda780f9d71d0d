"""The loader's second task: KV pages, from RAM to the drive and back, as the compute worker asks for them.

Threads of its own, beside those that read weights: a page is needed within a layer or two, so it must not queue behind
weights, which are read as far ahead as there are slots. The drive shares itself between both.

A thread takes a *run*, which is one transfer: what was asked for together and lies one behind the other in the file.
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
PAGE_THREADS = 8


@dataclass
class PageCounters:
    """Bytes moved since it started; `busy_s` is the threads' time together. `direct`: not through the page cache."""

    loaded_bytes: int = 0
    saved_bytes: int = 0
    busy_s: float = 0.0
    direct: bool = True
    retries: int = 0


class PageServer:
    """Moves pages between `frames` (uint8 arrays of a page each, 4096-aligned) and `file`, as `table` says: `run_pages`
    at once at most.
    """

    def __init__(
        self,
        file: PageFile,
        table: PageTable,
        frames: Sequence[U8],
        *,
        run_pages: int = 1,
        threads: int = PAGE_THREADS,
        trace: TraceWriter = NO_TRACE,
    ) -> None:
        self._file, self._table, self._trace = file, table, trace
        self._frames = [frame.data for frame in frames]
        # What is encrypted has memory of each thread's own.
        self._most = {FrameState.LOAD: run_pages, FrameState.SAVE: max(1, run_pages // 2)}
        self._turn = threading.Lock()  # of the one that takes the next request; it sleeps with it
        self._state = threading.Condition()
        self._moving = 0
        self._epoch = table.epoch
        self._taken = table.posted
        # A predecessor who was killed has left these; what it had half done is done again.
        self._inherited = table.open_requests(table.first, self._taken)
        self._waiting: PageRequest | None = None  # taken from the table, and not part of a run yet
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
        while run := self._take():
            begin = time.perf_counter()
            errors = self._move(run)
            for request, error in zip(run, errors, strict=True):
                self._table.finish(request, error)
            end = time.perf_counter()
            saves, nbytes = run[0].kind == FrameState.SAVE, len(run) * self._file.page_bytes
            if self._trace.enabled:
                labels = {"piece": f"page {run[0].page}", "pages": len(run), "bytes": nbytes}
                self._trace.add("KV save" if saves else "KV load", begin, end, labels)
            with self._state:
                self._moving -= 1
                self._table.drive_asked(end if self._moving else 0)
                if not self._file.direct:
                    self._table.note_buffered()
                self._counters.busy_s += end - begin
                if saves:
                    self._counters.saved_bytes += nbytes
                else:
                    self._counters.loaded_bytes += nbytes
                self._state.notify_all()

    def _take(self) -> list[PageRequest]:
        """The next run; nothing when everybody is to stop."""
        with self._turn:
            while not self._table.stopped:
                if self._table.epoch != self._epoch:
                    self._begin_epoch()
                if run := self._next_run():
                    with self._state:
                        self._moving += 1
                        if self._moving == 1:
                            self._table.drive_asked(time.perf_counter())
                    return run
                if self._table.epoch == self._epoch:
                    self._table.wait_posted(self._taken)
            return []

    def _next_run(self) -> list[PageRequest]:
        run: list[PageRequest] = []
        while (request := self._waiting or self._next()) is not None:
            self._waiting = request
            if run and not (request.joins and request.page == run[-1].page + 1 and len(run) < self._most[request.kind]):
                break
            run.append(request)
            self._waiting = None
        return run

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
        self._waiting = None
        self._taken = max(self._taken, self._table.first)
        self._epoch = epoch
        self._table.acknowledge(epoch)

    def _move(self, run: list[PageRequest]) -> list[int]:
        """Returns for each page 0, or the number of its error."""
        try:
            pages = [self._frames[request.frame] for request in run]
            if run[0].kind == FrameState.SAVE:
                for request, seal in zip(run, self._file.save(pages, run[0].page), strict=True):
                    self._table.set_seal(request.page, seal)
                return [0] * len(run)
            good = self._file.load(pages, run[0].page, [self._table.seal(request.page) for request in run])
            return [0 if one else errno.EBADMSG for one in good]
        except OSError as error:
            return [error.errno or errno.EIO] * len(run)
        except Exception:  # a defect of ours: the compute worker must hear of it instead of waiting for ever
            _log.exception("pipo: KV page %d", run[0].page)
            return [errno.EIO] * len(run)
