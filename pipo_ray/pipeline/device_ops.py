"""What the device stream asks of CUDA: copies on a stream of their own, events, memory, pinning."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait for it, asleep."""


class DeviceOps(Protocol):
    """The operations of one device; `CudaOps` is the real one."""

    device: torch.device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 memory on the device."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Event | None) -> Event:
        """Copy on the copy stream, once `after` has happened; returns the copy's event."""

    def compute_waits_for(self, event: Event) -> None:
        """What is computed from here on waits for `event`."""

    def record_on_compute(self) -> Event:
        """The computation issued so far."""

    def synchronize(self) -> None:
        """Wait for everything."""


class CudaOps:
    """CUDA through torch: a copy stream beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy_stream = torch.cuda.Stream(device)
        self._registered: list[int] = []
        self.pinned_bytes = 0
        self.refused_bytes = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 memory on the GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Any:
        """See `DeviceOps.copy`. From pinned memory it does not occupy the calling thread."""
        with torch.cuda.stream(self._copy_stream):
            if after is not None:
                self._copy_stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record(self._copy_stream)
        return event

    def compute_waits_for(self, event: Any) -> None:
        """See `DeviceOps.compute_waits_for`."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def record_on_compute(self) -> Any:
        """See `DeviceOps.record_on_compute`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
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
