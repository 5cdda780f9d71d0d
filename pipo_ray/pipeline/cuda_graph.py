"""CUDA graphs: kernels that the host launches as one, without saying anew what each of them is.

Captured through torch (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) on a stream of its own; all
graphs of a device share one pool of memory, since they never run at the same time: what one holds only while it runs,
the next one may use.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Work on a device that is repeated as it was captured: same kernels, same memory."""

    def begin(self) -> None:
        """What the calling thread asks of the device from here on is noted, and not done."""

    def end(self) -> None:
        """The graph is complete. Raises RuntimeError if something in it cannot be captured."""

    def abandon(self) -> None:
        """Leave a capture that failed, whether it is still open or not."""

    def replay(self) -> None:
        """Do it, in the order of the stream that is current."""


class Graphs(Protocol):
    """What makes graphs for one device."""

    @property
    def room_bytes(self) -> int:
        """Bytes that further graphs may take."""

    def new(self) -> Graph:
        """An empty graph."""

    def count(self) -> contextlib.AbstractContextManager[None]:
        """Within this context graphs are captured: what is taken of the device's memory is theirs."""

    def forbid_waiting(self) -> contextlib.AbstractContextManager[None]:
        """Within this context whatever lets the host wait for the device raises RuntimeError, as it would in a capture:
        but here nothing is lost by it.
        """

    def allow_waiting(self) -> contextlib.AbstractContextManager[None]:
        """Within this context, inside the other one, it does not."""

    def wait(self) -> None:
        """Until no graph runs any more."""

    def give_back(self) -> None:
        """All graphs are gone: their memory may go, too."""


class CudaGraphs:
    """Graphs on a CUDA device that take no more memory than `most_bytes` together, the driver's included."""

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        self._device, self._most_bytes = device, most_bytes
        self._taken_bytes = 0
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def room_bytes(self) -> int:
        """See `Graphs.room_bytes`."""
        return self._most_bytes - self._taken_bytes

    def new(self) -> Graph:
        """See `Graphs.new`."""
        return _CudaGraph(self._stream, self._pool)

    @contextlib.contextmanager
    def count(self) -> Iterator[None]:
        """See `Graphs.count`."""
        free, _ = torch.cuda.mem_get_info(self._device)
        try:
            yield
        finally:
            self._taken_bytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])

    @contextlib.contextmanager
    def forbid_waiting(self) -> Iterator[None]:
        """See `Graphs.forbid_waiting`."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def allow_waiting(self) -> Iterator[None]:
        """See `Graphs.allow_waiting`."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def wait(self) -> None:
        """See `Graphs.wait`."""
        torch.cuda.synchronize(self._device)

    def give_back(self) -> None:
        """See `Graphs.give_back`. The allocator would keep the pool's memory, and have none of it for another pool."""
        torch.cuda.empty_cache()
        self._taken_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()


class _CudaGraph:
    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream, self._pool = stream, pool
        self._before: torch.cuda.Stream | None = None

    def begin(self) -> None:
        self._before = torch.cuda.current_stream(self._stream.device)
        torch.cuda.set_stream(self._stream)
        # Other threads go on asking the driver for things, pinned memory for example.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self._graph.capture_end()
        self._leave()

    def abandon(self) -> None:
        if self._before is None:
            return
        try:
            self._graph.capture_end()
        except RuntimeError:
            # The allocator has not heard of the end then.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)
        finally:
            self._leave()

    def replay(self) -> None:
        self._graph.replay()

    def _leave(self) -> None:
        assert self._before is not None
        torch.cuda.set_stream(self._before)
        self._before = None
