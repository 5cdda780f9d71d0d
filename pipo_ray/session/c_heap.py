"""The C library's heap of this process."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Give the system the heap's free pages. Where the C library cannot, as other ones than glibc, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
