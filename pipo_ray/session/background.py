"""Low priority for processes that shall give way to everything else on the PC: of the CPU, and of the disk where its
scheduler looks at priorities.

SCHED_IDLE and not only nice 19: a task of the user that wakes up gets the core at once, and beside one that computes
ours get 0.3 % of a core instead of 1.5 % (weights 3 and 15 of 1024, sched(7)). What such a process starts has the same
priority; it cannot raise it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterable

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_CLASS_IDLE = 3 << 13


def give_way(pids: Iterable[int]) -> None:
    """Give all threads of these processes the lowest priority for CPU and disk. A process that is gone is left out."""
    for pid in pids:
        try:
            threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        except OSError:
            continue
        for thread in threads:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, 19)
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            _idle_disk(thread)


def _idle_disk(thread: int) -> None:
    """I/O class "idle" (ioprio_set(2)). The scheduler `none`, usual for NVMe, does not look at it."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, thread, _IOPRIO_CLASS_IDLE)
