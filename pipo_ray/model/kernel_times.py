"""When a GPU computes: its kernels' own times, by CUPTI through torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from torch.profiler import ProfilerActivity, profile

_COPIES = ("Memcpy", "Memset")


class KernelTimes:
    """While it is entered, the kernels of this process's GPU are watched; whoever leaves it has waited for the last.

    Behind it, `busy_s` are the seconds in which at least one kernel ran, copies not counted, and `total_s` those in
    between. The first one takes three seconds for CUPTI alone, and each costs the host some microseconds a kernel: so
    `busy_s` is to be compared with how long the same work takes without.
    """

    def __init__(self) -> None:
        self.busy_s = self.total_s = 0.0
        self._profile = profile(activities=[ProfilerActivity.CUDA])

    def __enter__(self) -> KernelTimes:
        self._profile.__enter__()
        self._begin = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.total_s = time.perf_counter() - self._begin
        self._profile.__exit__(kind, error, trace)
        kernels = (
            (event.time_range.start, event.time_range.end)
            for event in self._profile.events() or ()
            if event.device_type.name == "CUDA" and not event.name.startswith(_COPIES)
        )
        self.busy_s = covered(kernels) / 1e6


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How much of the line these intervals cover, each from its begin to its end, in any order; what lies in several
    counts once.
    """
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
