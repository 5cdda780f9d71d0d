"""Writes a file from front to back at the speed of the disk: O_DIRECT, large, with the next buffer filled meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from pipo_ray.session.huge_pages import private_memory

ALIGNMENT = 4096
_STEP_BYTES = 256 << 10


class Digest(Protocol):
    """Whatever takes bytes: a checksum."""

    def update(self, data: memoryview, /) -> None: ...


class WriteBuffers:
    """Two page-aligned buffers and the thread that writes one of them while the other is filled."""

    def __init__(self, total_bytes: int) -> None:
        self.size = max(ALIGNMENT, total_bytes // 2 // ALIGNMENT * ALIGNMENT)
        self.pair = (private_memory(self.size).data, private_memory(self.size).data)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pack-write")

    def close(self) -> None:
        """End the thread; whatever it was writing is written first."""
        self.thread.shutdown(wait=True)


class SequentialFile:
    """A new file, written in order. Its length must be a multiple of 4096 bytes.

    Where a file system refuses O_DIRECT the page cache is used, and emptied behind every buffer. `write` and
    `finish` raise the OSError of an earlier write, too; `abandon` never raises.
    """

    def __init__(self, path: Path, buffers: WriteBuffers, advance: Callable[[int], None] | None = None) -> None:
        self._buffers, self._advance = buffers, advance
        self._current, self._filled, self._offset = 0, 0, 0
        self._pending: Future[None] | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._direct = True
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = False
            self._descriptor = os.open(path, flags, 0o666)

    def write(self, data: memoryview, digest: Digest) -> None:
        """Append bytes, which go through `digest` as well."""
        while len(data):
            # What is small enough to be in the cache when it is copied was read from memory once.
            count = min(len(data), self._buffers.size - self._filled, _STEP_BYTES)
            part = data[:count]
            digest.update(part)
            place = self._buffers.pair[self._current][self._filled : self._filled + count]
            np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(part, np.uint8))  # without the GIL
            self._filled += count
            data = data[count:]
            if self._filled == self._buffers.size:
                self._hand_over()

    def finish(self) -> None:
        """Write what is left, and return when the whole file is on the disk."""
        if self._filled % ALIGNMENT:
            raise ValueError(f"a file of {self._offset + self._filled} bytes, not a multiple of {ALIGNMENT}")
        self._hand_over()
        self._wait()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def abandon(self) -> None:
        """Stop: nothing is written any more when this returns."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _hand_over(self) -> None:
        self._wait()
        part = self._buffers.pair[self._current][: self._filled]
        self._pending = self._buffers.thread.submit(self._write_out, part, self._offset)
        self._offset += self._filled
        self._current, self._filled = 1 - self._current, 0

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write_out(self, data: memoryview, offset: int) -> None:
        while len(data):
            try:
                count = os.pwrite(self._descriptor, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._leave_direct()
                continue
            if count % ALIGNMENT:
                # A short write (the disk is nearly full) leaves O_DIRECT's alignment; the error comes with the next
                # one.
                self._leave_direct()
            if not self._direct:
                os.fdatasync(self._descriptor)
                os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)
            data, offset = data[count:], offset + count
            if self._advance is not None:
                self._advance(count)

    def _leave_direct(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False
