"""Waiting for a word of shared memory without polling: the futex system call (man 2 futex).

A futex on a shared mapping works between processes, costs no Ray call and no core while it waits, and, being a system
call, orders the memory accesses around it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_SYSCALL_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
WAIT, WAKE, WAKE_ALL = 0, 1, 0x7FFFFFFF
"""The operations, between processes, and for how many: what machine code that sleeps and wakes passes."""

_libc = ctypes.CDLL(None, use_errno=True)
NUMBER = _SYSCALL_NUMBERS.get(platform.machine())
"""Of the system call; None where it is not known."""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def wait(address: int, expected: int, timeout_s: float) -> None:
    """Sleep until the 32-bit word at `address` is woken, unless it is no longer `expected`; at most `timeout_s`
    seconds.
    """
    if NUMBER is None:
        raise OSError(errno.ENOSYS, f"no futex system call number known for {platform.machine()}")
    seconds = int(timeout_s)
    timespec = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
    result = _libc.syscall(
        ctypes.c_long(NUMBER), ctypes.c_void_p(address), ctypes.c_int(WAIT), ctypes.c_uint32(expected),
        ctypes.byref(timespec), ctypes.c_void_p(0), ctypes.c_int(0),
    )  # fmt: skip
    if result != 0:
        error = ctypes.get_errno()
        if error not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise OSError(error, os.strerror(error))


def wake(address: int) -> None:
    """Wake everybody who waits for the 32-bit word at `address`."""
    if NUMBER is None:
        raise OSError(errno.ENOSYS, f"no futex system call number known for {platform.machine()}")
    _libc.syscall(
        ctypes.c_long(NUMBER), ctypes.c_void_p(address), ctypes.c_int(WAKE), ctypes.c_int(WAKE_ALL),
        ctypes.c_void_p(0), ctypes.c_void_p(0), ctypes.c_int(0),
    )  # fmt: skip
