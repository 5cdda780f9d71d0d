"""A drive that gives way: reads stop almost entirely while somebody else uses the disk.

I/O priorities do nothing with the scheduler `none`, which NVMe drives have. So the reader looks at what the disk has
transferred (/proc/diskstats) and takes away its own part. What is left is other people's.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from pipo_ray.pipeline.drive import Drive

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
    """Reads in parts of 1 MiB; while others use the disk, one at a time and with long pauses."""

    def __init__(self, folder: str | Path, *, direct: bool = True) -> None:
        super().__init__(folder, direct=direct)
        self._traffic = Traffic()
        self._counting = threading.Lock()
        self._turn = threading.Lock()
        self._issued = self._completed = 0
        status = os.stat(folder)
        self._device = (os.major(status.st_dev), os.minor(status.st_dev))
        self.paused_s = 0.0

    def read_into(self, memory: memoryview, file: str, offset: int) -> None:
        """See `Drive.read_into`."""
        for start in range(0, len(memory), _PART_BYTES):
            part = memory[start : start + _PART_BYTES]
            if not self._others_use_it():
                self._read(part, file, offset + start)
                continue
            with self._turn:
                took = self._read(part, file, offset + start)
                pause = max(_WINDOW_S / 2, _PAUSE_FACTOR * took)
                self.paused_s += pause
                time.sleep(pause)

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
            transferred = disk_bytes(self._device)
            if transferred is None:
                return False
            return self._traffic.look(time.perf_counter(), transferred, self._issued, self._completed)


def disk_bytes(device: tuple[int, int], statistics: str = "/proc/diskstats") -> int | None:
    """Bytes that the disk or partition (major, minor) has read and written; None where the kernel does not say.

    Format: Documentation/admin-guide/iostats.rst; sectors are 512 bytes.
    """
    try:
        lines = Path(statistics).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if (int(fields[0]), int(fields[1])) == device:
            return 512 * (int(fields[5]) + int(fields[9]))
    return None
