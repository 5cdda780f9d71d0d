"""What the device stream asks of CUDA: copies on a stream of their own, events, memory, pinning."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, Literal, Protocol, get_args

import torch

from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter

logger = logging.getLogger(__name__)


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait for it, asleep."""

    def query(self) -> bool:
        """Whether it has happened."""


CopyStream = Literal["weight copy", "KV load", "KV save"]
"""Copies on different streams overlap; each of these kinds of task has one of its own."""


class DeviceOps(Protocol):
    """The operations of one device; `CudaOps` is the real one."""

    device: torch.device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 memory on the device."""

    def copy(
        self, source: torch.Tensor, target: torch.Tensor, after: Event | None, stream: CopyStream = "weight copy"
    ) -> Event:
        """Copy on the copy stream `stream`, behind what it was given before and once `after` has happened; returns the
        copy's event.
        """

    def compute_waits_for(self, event: Event) -> None:
        """What is computed from here on waits for `event`."""

    def look_at_clocks(self) -> None:
        """Read the device's clock for all that is over by now: `stalled_s` tells of no more. It takes some time of the
        host's, which is best given while the device is busy.
        """

    def stalled_s(self) -> float:
        """Seconds that the computation has spent in `compute_waits_for`, since this was last asked, as far as
        `look_at_clocks` has seen it.
        """

    def record_on_compute(self) -> Event:
        """The computation issued so far."""

    def synchronize(self) -> None:
        """Wait for everything."""

    def pin(self, memory: torch.Tensor) -> bool:
        """Register host memory for copies at the link's full speed; False where that is refused."""


class CudaOps:
    """CUDA through torch: copy streams beside the stream that computes, which is the one that is current where this is
    made, and in every thread that uses it. With `trace`, what was measured by CUDA's clock
    is written there when it is asked for: the copies of weights, and where the computation waited for one.
    """

    def __init__(self, device: torch.device, trace: TraceWriter = NO_TRACE) -> None:
        self.device = device
        self._compute_stream = torch.cuda.current_stream(device)
        self._copy_streams = {name: torch.cuda.Stream(device) for name in get_args(CopyStream)}
        self._registered: list[int] = []
        self.pinned_bytes = 0
        self.refused_bytes = 0
        self._stalls = _Spans("GPU waits for a piece", trace)
        self._weight_copies = _Spans("weights on the link", trace)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 memory on the GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Any, stream: CopyStream = "weight copy") -> Any:
        """See `DeviceOps.copy`. With pinned memory it does not occupy the calling thread."""
        copy_stream = self._copy_streams[stream]
        timed = stream == "weight copy"
        if after is not None:
            copy_stream.wait_event(after)
        begin = torch.cuda.Event(enable_timing=True) if timed else None
        if begin is not None:
            begin.record(copy_stream)
        torch.cuda.set_stream(copy_stream)  # its context manager asks the driver four questions more
        try:
            target.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(self._compute_stream)
        event = torch.cuda.Event(enable_timing=timed, blocking=True)
        event.record(copy_stream)
        if begin is not None:
            self._weight_copies.append(begin, event)
        return event

    def compute_waits_for(self, event: Any) -> None:
        """See `DeviceOps.compute_waits_for`."""
        if event.query():  # a question instead of five orders: where the host is behind, it has no time to lose
            return
        stream = self._compute_stream
        before, behind = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(event)
        behind.record(stream)
        self._stalls.append(before, behind)

    def look_at_clocks(self) -> None:
        """See `DeviceOps.look_at_clocks`: without waiting for the device."""
        self._stalls.look()
        self._weight_copies.look()

    def stalled_s(self) -> float:
        """See `DeviceOps.stalled_s`."""
        return self._stalls.take_s()

    def weight_copies_s(self) -> float:
        """Seconds of copying weights, in the same way."""
        return self._weight_copies.take_s()

    def record_on_compute(self) -> Any:
        """See `DeviceOps.record_on_compute`."""
        event = torch.cuda.Event()
        event.record(self._compute_stream)
        return event

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def pin(self, memory: torch.Tensor) -> bool:
        """Register host `memory` (page-aligned start) as pinned; False where CUDA refuses. Takes about 0.4 s per GB.

        `pinned_bytes` and `refused_bytes` add up what was asked for.
        """
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes // 4096 * 4096, 0)
        if int(code) != 0:
            self.refused_bytes += memory.nbytes
            logger.warning(
                "cudaHostRegister refused %d bytes (error %d): copies will be slower", memory.nbytes, int(code)
            )
            return False
        self._registered.append(memory.data_ptr())
        self.pinned_bytes += memory.nbytes // 4096 * 4096
        return True

    def unpin_all(self) -> None:
        """Take back every registration."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()


class _Spans:
    """Work on streams, from an event to another; in the order in which it ends. `kind` is its name in the trace."""

    def __init__(self, kind: str, trace: TraceWriter) -> None:
        self._spans: deque[tuple[Any, Any]] = deque()
        self._kind, self._trace = kind, trace
        self._origin: tuple[Any, float] | None = None
        self._seconds = 0.0

    def append(self, begin: Any, end: Any) -> None:
        """Work between two recorded events."""
        self._spans.append((begin, end))

    def look(self) -> None:
        """Count what is over."""
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            took = begin.elapsed_time(end) / 1000
            self._seconds += took
            if self._trace.enabled:
                begin_s = self._seconds_at(begin)
                self._trace.add(self._kind, begin_s, begin_s + took, {})

    def take_s(self) -> float:
        """Seconds of what was counted, which are forgotten with this."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _seconds_at(self, event: Any) -> float:
        """When `event`, which is over, happened by the host's clock."""
        if self._origin is None:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            now.synchronize()
            self._origin = now, time.perf_counter()
        origin, origin_s = self._origin
        return origin_s - float(event.elapsed_time(origin)) / 1000
