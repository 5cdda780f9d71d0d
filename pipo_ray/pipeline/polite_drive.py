"""A drive that gives way: reads stop almost entirely while somebody else uses the disk.

I/O priorities do nothing with the scheduler `none`, which NVMe drives have. So the reader looks at what the disk has
transferred (/proc/diskstats) and takes away its own part. What is left is other people's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pipo_ray.pipeline.disks import disk_bytes, disks_under, file_system
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter

_PART_BYTES = 1 << 20
_WINDOW_S = 0.1
_NOTICED_BYTES_PER_S = 4 << 20
_PAUSE_FACTOR = 20.0
"""While somebody else reads or writes, pauses are so many times as long as the reads between them."""


class Traffic:
    """Tells from counters whether others use a disk. Pure: told the time and the counters.

    The disk counts requests as they end, and we count our reads when they begin (`issued`) and when they end
    (`completed`). So others' bytes lie between two bounds, and only what is certain counts.
    """

    def __init__(self) -> None:
        self._since_s = 0.0
        self._most_before: int | None = None
        self.busy = False

    def look(self, now_s: float, transferred: int, issued: int, completed: int) -> bool:
        """Whether others move more than a few MB/s, as of the last whole window. All figures are totals, in bytes."""
        if self._most_before is None:
            self._since_s, self._most_before = now_s, transferred - completed
        elapsed = now_s - self._since_s
        if elapsed >= _WINDOW_S:
            others = transferred - issued - self._most_before
            self.busy = others > _NOTICED_BYTES_PER_S * elapsed
            self._since_s, self._most_before = now_s, transferred - completed
        return self.busy


class PoliteDrive(Drive):
    """Reads in parts of 1 MiB; while others use the disk, one at a time and with long pauses. `trace` hears of them."""

    def __init__(self, folder: str | Path, *, direct: bool = True, trace: TraceWriter = NO_TRACE) -> None:
        super().__init__(folder, direct=direct)
        self._trace = trace
        self._traffic = Traffic()
        self._counting = threading.Lock()
        self._turn = threading.Lock()
        self._issued = self._completed = 0
        self._disks = disks_under(folder)
        self._paused_s = 0.0
        self._paused_since: float | None = None

    @property
    def paused_s(self) -> float:
        """See `Drive.paused_s`."""
        with self._counting:
            since = self._paused_since
            return self._paused_s + (0.0 if since is None else time.perf_counter() - since)

    def read_into(self, memory: memoryview, file: str, offset: int) -> None:
        """See `Drive.read_into`."""
        for start in range(0, len(memory), _PART_BYTES):
            part = memory[start : start + _PART_BYTES]
            if not self._others_use_it():
                self._read(part, file, offset + start)
                continue
            with self._turn:
                took = self._read(part, file, offset + start)
                self._pause(max(_WINDOW_S / 2, _PAUSE_FACTOR * took))

    def _pause(self, seconds: float) -> None:
        begin = time.perf_counter()
        with self._counting:
            self._paused_since = begin
        self.on_pause(True)
        time.sleep(seconds)
        self.on_pause(False)
        end = time.perf_counter()
        with self._counting:
            self._paused_since = None
            self._paused_s += end - begin
        self._trace.add("give way", begin, end, {})

    def _read(self, part: memoryview, file: str, offset: int) -> float:
        with self._counting:
            self._issued += len(part)
        begin = time.perf_counter()
        try:
            super().read_into(part, file, offset)
        finally:
            with self._counting:
                self._completed += len(part)
        return time.perf_counter() - begin

    def _others_use_it(self) -> bool:
        with self._counting:
            transferred = disk_bytes(self._disks)
            if transferred is None:
                return False
            return self._traffic.look(time.perf_counter(), transferred, self._issued, self._completed)


def cannot_give_way(folders: Sequence[str | Path]) -> list[str]:
    """A line for the user about those of the folders whose disk cannot be watched; empty if all can."""
    blind = [folder for folder in folders if disk_bytes(disks_under(folder)) is None]
    if not blind:
        return []
    named = ", ".join(f"{folder} ({file_system(folder)})" for folder in blind)
    return [
        f"background: the kernel does not tell which disk is under {named}, so reading does not pause while other "
        "programs use it; processes have the lowest priority all the same"
    ]
