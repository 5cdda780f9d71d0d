"""The highest memory use of a set of processes over a stretch of time."""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from pipo_ray.session.memory import SYSTEM_ROOT, Cgroup, own_cgroups, page_tables, proportional_size, resident_sizes

_PSS_DUTY = 0.005


class PeakSampler:
    """A thread that samples what a set of processes takes: sum of PSS plus page tables. A context manager.

    Reading PSS makes the kernel walk the page tables: 18 ms per GiB and process. That would cost a core, so the exact
    figure is read as often as half a percent of one core allows, and in between it is carried on with the change of
    the counters that cost nothing (private memory and page tables of each process, shared memory of the one that maps
    most of it: the driver maps all).

    If the processes are alone in a control group with a memory limit, the kernel knows the peak exactly, and
    `peak_bytes` is that figure. It includes the page cache, which such a group is charged for.

    Attributes:
        source: where `peak_bytes` comes from, "cgroup" or "pss"; known once stopped.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], interval_s: float = 0.2, root: Path = SYSTEM_ROOT) -> None:
        """
        Args:
            pids: the processes; called about every second from the sampling thread, so that restarted actors are seen.
            interval_s: seconds between samples.
            root: stands for `/` in tests.
        """
        self.source = "pss"
        self._pids = pids
        self._interval_s = interval_s
        self._root = root
        self._peak = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._kernel_peak_before: int | None = None

    def start(self) -> None:
        """Begin to sample."""
        group = self._own_group(set(self._pids()))
        self._kernel_peak_before = group.peak if group else None
        self._thread = threading.Thread(target=self._sample, name="pipo-peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End sampling; returns `peak_bytes`. Calling it twice is harmless."""
        if self._thread is None:
            return self._peak
        self._stopping.set()
        self._thread.join()
        self._thread = None
        group = self._own_group(set(self._pids()))
        # A peak that did not rise while we sampled was reached by someone before us.
        if group and group.peak and self._kernel_peak_before is not None and group.peak > self._kernel_peak_before:
            self._peak, self.source = group.peak, "cgroup"
        return self._peak

    @property
    def peak_bytes(self) -> int:
        """Highest use seen so far, bytes."""
        return self._peak

    def __enter__(self) -> "PeakSampler":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _own_group(self, pids: set[int]) -> Cgroup | None:
        """The control group we are in, if it or one above it has a limit and it holds none but these processes."""
        groups = own_cgroups(self._root)
        if not groups or all(group.limit is None for group in groups):
            return None
        try:
            members = {int(pid) for pid in (groups[0].path / "cgroup.procs").read_text().split()}
            has_children = any(entry.is_dir() for entry in groups[0].path.iterdir())
        except (OSError, ValueError):
            return None
        return groups[0] if members <= pids and not has_children else None

    def _sample(self) -> None:
        pids: list[int] = []
        exact = counters_at_exact = 0
        next_pids = next_exact = 0.0
        while True:
            now = time.monotonic()
            if now >= next_pids:
                pids = list(self._pids())
                next_pids = now + 1
            counters = resident_sizes(pids, self._root)
            if now >= next_exact:
                exact = proportional_size(pids, self._root) + page_tables(pids, self._root)
                counters_at_exact = counters
                cost = time.monotonic() - now
                next_exact = now + max(self._interval_s, cost / _PSS_DUTY)
            self._peak = max(self._peak, exact + counters - counters_at_exact)
            if self._stopping.wait(self._interval_s):
                return
