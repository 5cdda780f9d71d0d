"""Staging memory in Ray's object store: long-lived objects that are written in place.

Ray calls objects immutable; we step outside that promise on purpose, because the object store is the one mapping that
every actor shares without a copy. What makes it safe: the driver creates every object, touches every page and keeps
both the reference and a view for as long as the slots live. The reference keeps Ray from freeing the object, the view
keeps Ray from spilling it (a spilled object would come back without the writes made in place).
"""

import ctypes
import time
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipo_ray.errors import BudgetError, ResourceError
from pipo_ray.session.memory import format_size, shm_free

ALIGNMENT = 4096
"""Alignment in bytes of the usable area: what O_DIRECT needs of an address."""

_FREEING_S = 1.0

Bytes = npt.NDArray[np.uint8]


class SharedBuffer:
    """One object in the object store, held by the driver.

    Attributes:
        ref: the ray.ObjectRef. Hand it to actors inside a list, `[buffer.ref]`: a bare argument would be resolved.
        view: writable uint8 array [nbytes] over the usable area, 4096-aligned. While it lives Ray does not spill the
            object.
        nbytes: usable bytes.
    """

    def __init__(self, ref: Any, view: Bytes, nbytes: int) -> None:
        self.ref = ref
        self.view: Bytes = view
        self.nbytes = nbytes

    def release(self) -> None:
        """Give the memory back. It is really free once no actor holds a view either. Calling it twice is harmless."""
        self.ref = None
        self.view = np.empty(0, np.uint8)
        self.nbytes = 0


def object_store_bytes(sizes: list[int]) -> int:
    """Bytes of object store in which buffers of these usable sizes fit next to Ray's own bookkeeping."""
    # Per object: the alignment slack, the pickled header that Ray puts in front, and the allocator's own rounding. On
    # top, the store keeps room for small objects (results over 100 KiB, function exports) so that these never push it
    # over.
    per_object = ALIGNMENT + 4096 + 65536
    return sum(size + per_object for size in sizes) + (32 << 20)


def allocate(nbytes: int) -> SharedBuffer:
    """Create a buffer in the object store and touch every page of it.

    Args:
        nbytes: usable bytes, positive. 4096 more are taken for alignment.
    Raises:
        BudgetError: /dev/shm has less room than the pages need. (Touching them anyway would end the process with
            SIGBUS.)
        ResourceError: Ray put the object into a file instead of /dev/shm, or the object store is full.
    """
    import ray

    free = shm_free()
    if nbytes + ALIGNMENT > free:
        raise BudgetError(
            f"a buffer of {format_size(nbytes)} does not fit into /dev/shm ({format_size(free)} free): "
            "lower --weight-memory or enlarge /dev/shm"
        )
    # The zeros are never written, so the source costs no memory of its own: the kernel maps them all to its zero page.
    zeros = np.zeros(nbytes + ALIGNMENT, np.uint8)
    deadline = time.monotonic() + _FREEING_S
    while True:
        try:
            ref = ray.put(zeros)
            break
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            # Ray frees a released object a moment later.
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise ResourceError(
                f"Ray's object store has no room for a buffer of {format_size(nbytes)}: "
                "lower --weight-memory, or give the Ray cluster more object store memory"
            ) from error
    view = attach(ref)[:nbytes]
    assert_in_shm(view)
    return SharedBuffer(ref, view, nbytes)


def attach(ref: Any) -> Bytes:
    """The usable area of a buffer in this process: the same bytes that the driver sees, writable, 4096-aligned.

    Mappings start at page boundaries in every process, so the aligned area is the same one everywhere.

    Args:
        ref: `SharedBuffer.ref`.
    Returns:
        uint8 array. It keeps the mapping alive; Ray does not spill the object as long as any process holds it.
    """
    import ray

    whole: Bytes = ray.get(ref)
    offset = -whole.ctypes.data % ALIGNMENT
    return writable_view(whole[offset : len(whole) - ALIGNMENT + offset])


def writable_view(array: Bytes) -> Bytes:
    """A writable array over the memory of a read-only one (numpy marks what ray.get returns as read-only).

    Args:
        array: contiguous uint8 array. It is kept alive by the result.
    Raises:
        ValueError: the array is not contiguous.
    """
    if not array.flags.c_contiguous:
        raise ValueError("writable_view needs a contiguous array")
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    memory._owner = array  # type: ignore[attr-defined]
    return np.frombuffer(cast(Any, memory), np.uint8)


def assert_in_shm(array: npt.NDArray[Any]) -> None:
    """Check that an array lies in /dev/shm and not in one of the files that Ray falls back to when its store is full.

    Raises:
        ResourceError: the array's memory is mapped from elsewhere; names the mapping.
    """
    first = array.ctypes.data
    last = first + max(array.nbytes, 1) - 1
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            span, _, rest = line.partition(b" ")
            start, end = (int(part, 16) for part in span.split(b"-"))
            if start <= first < end:
                fields = rest.split(None, 4)
                path = fields[4].decode(errors="replace").strip() if len(fields) > 4 else "private memory"
                if path.startswith("/dev/shm/") and last < end:
                    return
                raise ResourceError(
                    f"a buffer of {format_size(array.nbytes)} lies in {path} and not in /dev/shm: Ray's object store "
                    "is full; lower --weight-memory, or give the Ray cluster more object store memory"
                )
    raise ResourceError(f"address {first:#x} is not mapped in this process")
