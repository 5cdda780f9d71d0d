"""Reading a block store's files: O_DIRECT where the file system allows it, otherwise buffered with the page cache
dropped behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipo_ray.errors import DriveError, StoreError

PAGE = 4096
RETRY_AFTER_S = (0.0, 0.05, 0.5)
"""Pauses before another attempt. The kernel and the drive have tried for long themselves before they report an error;
what may help is a moment for a bus or a device that is being reset.
"""
PASSING = (errno.EAGAIN, errno.EINTR)
REOPENED = (errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE)
"""With these a descriptor may be dead for good although the device is back: the file is opened anew before another
attempt.
"""


class Drive:
    """Open descriptors of the files in `folder`, shared by read threads. `direct` tells whether O_DIRECT is in use for
    all of them.
    """

    def __init__(self, folder: str | Path, *, direct: bool = True) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._retired: list[int] = []
        self.direct = direct
        self.why_buffered = "" if direct else "asked for"
        self.retries = 0
        self.on_pause: Callable[[bool], None] = lambda _: None
        """Hears of it when reading begins to give way to others (True), and when it goes on (False)."""

    @property
    def folder(self) -> Path:
        """The folder that the files are in."""
        return self._folder

    @property
    def paused_s(self) -> float:
        """Seconds in which reading stood still to give way to others: a drive that does not give way has none."""
        return 0.0

    def read_into(self, memory: memoryview, file: str, offset: int) -> None:
        """Fill `memory` (4096-aligned address and length) from `file` at `offset` (4096-aligned).

        A file may end within the last page, whose rest is then undefined. Errors that may pass are tried again.
        DriveError names file, offset and cause; StoreError those of a file that is missing or ends too early.
        """
        done = 0
        attempts = 0
        while done < len(memory):
            direct = self.direct  # another thread may find out, while this one reads, that O_DIRECT is refused
            descriptor = self.descriptor(file)
            try:
                count = os.preadv(descriptor, [memory[done:]], offset + done)
                if direct and count % PAGE and offset + done + count < os.fstat(descriptor).st_size:
                    count -= count % PAGE  # interrupted between two sectors: O_DIRECT goes on from a page
                    if not count:
                        raise OSError(errno.EIO, "nothing but a part of a page was read")
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._go_buffered(str(error.strerror))
                    continue
                attempts += 1
                if error.errno in (*PASSING, *REOPENED) and attempts <= len(RETRY_AFTER_S):
                    self.retries += 1
                    time.sleep(RETRY_AFTER_S[attempts - 1])
                    if error.errno in REOPENED:
                        self._reopen(file, descriptor)
                    continue
                raise DriveError(
                    f"{self._folder / file}: reading {len(memory)} bytes at offset {offset} failed: {error.strerror} "
                    f"(after {attempts} attempt{'s' * (attempts > 1)}); check that the drive is connected and healthy, "
                    f"then run `pipo verify {self._folder}`"
                ) from error
            if count == 0:
                break
            if not self.direct:
                os.posix_fadvise(descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count
            if done % PAGE and self.direct:
                break  # a short read that ends within a page ends at the end of the file
        if len(memory) - done >= PAGE:
            raise StoreError(
                f"{self._folder / file}: ends at byte {offset + done}, but {len(memory)} bytes are wanted from "
                f"{offset}: it was truncated; pack the checkpoint again"
            )

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            for descriptor in [*self._descriptors.values(), *self._retired]:
                os.close(descriptor)
            self._descriptors.clear()
            self._retired.clear()

    def descriptor(self, file: str) -> int:
        """Of the open file; StoreError, naming it, if it cannot be opened."""
        with self._lock:
            if file not in self._descriptors:
                path = self._folder / file
                try:
                    self._descriptors[file] = self._open(path)
                except OSError as error:
                    raise StoreError(
                        f"{path}: cannot be opened: {error.strerror}; is the block store still there?"
                    ) from error
            return self._descriptors[file]

    def _open(self, path: Path) -> int:
        if self.direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
                self.why_buffered = f"the file system of {path.parent} refuses O_DIRECT"
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # No read-ahead of the kernel's: it caches in units of up to 2 MiB, of which one that only partly lies in what
        # we drop stays (of 256 MiB read in steps of 1 MiB, 234 did). We read large pieces, several at a time, anyway.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def _reopen(self, file: str, descriptor: int) -> None:
        """Put a newly opened file under the same descriptor: other threads may be reading from it. If it cannot be
        opened, the next read says what is wrong.
        """
        with self._lock, contextlib.suppress(OSError):
            if self._descriptors.get(file) == descriptor:
                new = self._open(self._folder / file)
                os.dup2(new, descriptor, inheritable=False)
                os.close(new)

    def _go_buffered(self, cause: str) -> None:
        with self._lock:
            if not self.direct:
                return
            self.direct = False
            self.why_buffered = f"O_DIRECT read refused ({cause})"
            # Kept open until close(): another thread may be reading from them.
            self._retired.extend(self._descriptors.values())
            self._descriptors.clear()
