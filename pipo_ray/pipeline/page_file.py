"""The file that KV pages are in on the drive: written and read directly (O_DIRECT), encrypted, and sealed.

With a key each write is AES-256 in Galois/Counter Mode under a number that was never used before (NIST SP 800-38D: the
same number twice would give the difference of two pages away), and the tag stays in memory; without one the seal is an
xxh3 checksum. So a page that comes back as anything but what was last written to its place is an error, and never a
wrong token.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence

import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from pipo_ray.pipeline.drive import PAGE, PASSING, REOPENED, RETRY_AFTER_S
from pipo_ray.pipeline.page_table import Seal

KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16


class PageFile:
    """The file at `path`, pages of `page_bytes` (a multiple of 4096); several threads may use it. `nonce` gives numbers
    that no page was encrypted with before. A page in memory begins on a multiple of 4096.
    """

    def __init__(self, path: str, page_bytes: int, key: bytes | None, nonce: Callable[[], int]) -> None:
        self._path, self.page_bytes, self._key, self._next_nonce = path, page_bytes, key, nonce
        self._lock = threading.Lock()
        self._bounce = threading.local()
        self._retired: list[int] = []
        self.direct = True
        self.retries = 0
        self._descriptor = self._open()

    def save(self, pages: Sequence[memoryview], first: int) -> list[Seal]:
        """Write these pages to `first` and the places behind it. Raises OSError once trying again has not helped."""
        if self._key is None:
            self._move(os.pwritev, pages, first)
            return [Seal(0, xxhash.xxh3_128_digest(page)) for page in pages]
        bounce = self._bounce_memory(len(pages))
        seals: list[Seal] = []
        for page, encrypted in zip(pages, bounce, strict=True):
            with self._lock:
                number = self._next_nonce()
            cipher = Cipher(algorithms.AES(self._key), modes.GCM(_nonce(number))).encryptor()
            cipher.update_into(page, encrypted)
            cipher.finalize()
            seals.append(Seal(number, cipher.tag))
        self._move(os.pwritev, bounce, first)
        return seals

    def load(self, pages: Sequence[memoryview], first: int, seals: Sequence[Seal]) -> list[bool]:
        """Read pages that were sealed like this; whether each of them is what was written. Raises OSError once trying
        again has not helped.
        """
        for _ in range(2):  # a second time: the transfer may have gone wrong, and not what is on the drive
            self._move(os.preadv, pages, first)
            good = [self._opened(page, seal) for page, seal in zip(pages, seals, strict=True)]
            if all(good):
                break
            self.retries += 1
        return good

    def close(self) -> None:
        """Close it."""
        for descriptor in [self._descriptor, *self._retired]:
            os.close(descriptor)

    def _opened(self, memory: memoryview, seal: Seal) -> bool:
        """Decrypt it in place. Whether it has the seal."""
        if self._key is None:
            return bool(xxhash.xxh3_128_digest(memory) == seal.tag)
        cipher = Cipher(algorithms.AES(self._key), modes.GCM(_nonce(seal.nonce), seal.tag)).decryptor()
        cipher.update_into(memory, memory)
        try:
            cipher.finalize()
        except InvalidTag:
            return False
        return True

    def _move(self, move: Callable[[int, list[memoryview], int], int], pages: Sequence[memoryview], first: int) -> None:
        left, offset, attempts = list(pages), first * self.page_bytes, 0
        while left:
            descriptor, direct = self._descriptor, self.direct
            try:
                count = move(descriptor, left, offset)
                if direct:
                    count -= count % PAGE
                if not count:
                    raise OSError(errno.EIO, "the file ends here")
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._go_buffered()
                    continue
                attempts += 1
                if error.errno not in (*PASSING, *REOPENED) or attempts > len(RETRY_AFTER_S):
                    raise
                self.retries += 1
                time.sleep(RETRY_AFTER_S[attempts - 1])
                continue
            if not direct:
                os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]

    def _open(self) -> int:
        if self.direct:
            try:
                return os.open(self._path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def _go_buffered(self) -> None:
        with self._lock:
            if self.direct:
                self.direct = False
                self._retired.append(self._descriptor)  # others may be using it
                self._descriptor = self._open()

    def _bounce_memory(self, count: int) -> list[memoryview]:
        """Pages of this thread's own: what is encrypted must not replace the pages in RAM, which are still in use."""
        mine: list[memoryview] = self._bounce.__dict__.setdefault("pages", [])
        while len(mine) < count:
            mine.append(memoryview(mmap.mmap(-1, self.page_bytes)))
        return mine[:count]


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE_BYTES, "little")
