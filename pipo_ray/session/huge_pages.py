"""Huge pages under memory that a drive reads into.

A read of 4 MiB into ordinary pages reaches the drive as a list of a thousand places of 4 KiB, in requests of as many
places as the driver takes (254 for virtio: 1 MiB); into huge pages it is two places and one request. On the virtual
machine where this was measured O_DIRECT reads went from 1.1 to 2.4 GB/s (`benchmarks/huge_pages.py`).

Ray's object store lies in /dev/shm, which is usually mounted without huge pages. MADV_COLLAPSE (Linux 6.1, madvise(2))
replaces pages that are there by huge ones whatever the mount says. It asks for a mapping that begins at a multiple of
the huge page's size, as ours seldom does; mremap(2) with an old size of 0 makes a second one of the same pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MADV_COLLAPSE = 25
_MREMAP_MAYMOVE_FIXED = 1 | 2
_PROT_NONE = 0
_MAP_FAILED = ctypes.c_void_p(-1).value
_PIECE = 16  # huge pages at a time: what fails leaves the others alone

_Bytes = npt.NDArray[np.uint8]


def use_huge_pages(views: Sequence[_Bytes]) -> int:
    """Put huge pages under these views (shared memory, every page touched), as far as the system can; what is in them
    stays. To be called before a drive reads into them: pages in use cannot be moved.

    Returns the bytes of the views, and of what lies between them, that are in huge pages now: 0 on a kernel without
    MADV_COLLAPSE.

    Where a view that is larger than a huge page begins or ends within one, all of that page is moved, with what its
    neighbours in the object store have of it: what stayed in ordinary pages would be read at half the speed or less,
    and of six slots of 4 MiB that was a twelfth. A neighbour that is not there yet finds its pages made, at most one
    huge page in front of all views and one behind.
    """
    size = huge_page_bytes()
    if not size:
        return 0
    done = 0
    for start, stop, low, high, offset in _spans(views):
        # Addresses of the first and the last multiple of `size` in the file that touch [start, stop).
        first = start - (offset + start - low) % size
        last = stop + -(offset + stop - low) % size
        if stop - start < size:
            continue
        first, last = (first if first >= low else first + size), (last if last <= high else last - size)
        while first < last:
            length = min(_PIECE * size, last - first)
            if _collapse(first, length, size):
                done += min(first + length, stop) - max(first, start)
            first += length
    return done


def huge_page_bytes() -> int:
    """The size of a huge page; 0 where there are none."""
    try:
        return int(_SIZE_FILE.read_text())
    except (OSError, ValueError):
        return 0


def _spans(views: Sequence[_Bytes]) -> Iterator[tuple[int, int, int, int, int]]:
    """Addresses of each span of views (start, stop) and of the mapping that it is in (low, high), and the mapping's
    offset in its file. Neighbours with less than a page or two of somebody else's between them are one span.
    """
    wanted = sorted((view.ctypes.data, view.ctypes.data + view.nbytes) for view in views if view.nbytes)
    joined: list[list[int]] = []
    for start, stop in wanted:
        if joined and start - joined[-1][1] <= 4 * mmap.PAGESIZE:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, flags, offset = line.split(None, 3)[:3]
        low, high = (int(part, 16) for part in addresses.split("-"))
        for start, stop in joined:
            if low <= start and stop <= high and flags[3] == "s":
                yield start, stop, low, high, int(offset, 16)


def _collapse(start: int, length: int, size: int) -> bool:
    """Whether all of [start, start + length) is in huge pages now."""
    libc = _libc()
    room = libc.mmap(None, length + size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if room == _MAP_FAILED:
        return False
    try:
        aligned = room + -room % size
        if libc.mremap(start, 0, length, _MREMAP_MAYMOVE_FIXED, aligned) == _MAP_FAILED:
            return False
        return bool(libc.madvise(aligned, length, _MADV_COLLAPSE) == 0)
    finally:
        libc.munmap(room, length + size)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = libc.mremap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.mremap.argtypes = [pointer, size, size, number, pointer]
    libc.madvise.argtypes = [pointer, size, number]
    libc.munmap.argtypes = [pointer, size]
    return libc


def scratch_memory(nbytes: int) -> _Bytes:
    """Memory like the slots', in huge pages where these would be. It goes with the array."""
    size = huge_page_bytes() or mmap.PAGESIZE
    view: _Bytes = np.frombuffer(mmap.mmap(-1, -(-nbytes // size) * size), np.uint8)[:nbytes]
    view[:: mmap.PAGESIZE] = 1
    use_huge_pages([view])
    return view


def private_memory(nbytes: int) -> _Bytes:
    """Memory that no other process sees, on a page's boundary and in huge pages as far as the system can; its contents
    are undefined. It goes with the array. Making it takes 0.04 ms a MiB, a 30th of what `scratch_memory` takes.
    """
    size = huge_page_bytes() or mmap.PAGESIZE
    if nbytes < size:
        view = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        view[:: mmap.PAGESIZE] = 0
        return view
    mapped = mmap.mmap(-1, nbytes + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(mapped, np.uint8)
    view = view[-view.ctypes.data % size :][:nbytes]
    view[:: mmap.PAGESIZE] = 0
    if _are_off():
        with contextlib.suppress(OSError):
            mapped.madvise(_MADV_COLLAPSE)
    return view


def _are_off() -> bool:
    """Whether advice alone gives no huge pages."""
    try:
        return "[never]" in (_SIZE_FILE.parent / "enabled").read_text()
    except OSError:
        return False
