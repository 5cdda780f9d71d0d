"""Where the compute worker gets its pieces from: the slots, in place (CPU), or copies of them on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import RESIDENT, SlotTable
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.plan.pieces import SweepPlan


@dataclass
class StreamTimes:
    """What a stream did since it was last asked: seconds waiting for the loader, acquisitions, and bytes that had been
    streamed.
    """

    waited_s: float = 0.0
    acquired: int = 0
    streamed_bytes: int = 0


class WeightStream(Protocol):
    """Gives the pieces of a sweep in order. Positions count the acquisitions of a sweep from 0."""

    device: torch.device
    times: StreamTimes
    all_stay: bool
    """Every piece is in the same memory in every sweep, and nobody wants to know when it is used."""

    def begin_sweep(self) -> None:
        """A sweep begins at position 0."""

    def acquire(self, position: int) -> torch.Tensor:
        """The bytes (uint8) of the piece at `position`, on `device`; waits for them. Positions must come in order."""

    def release(self, position: int) -> None:
        """The piece at `position` is used up."""

    def end_sweep(self) -> None:
        """All positions have been acquired and released."""

    def abandon(self) -> None:
        """The sweep is given up in the middle: the next one begins at position 0 again."""


class PiecePlaces(NamedTuple):
    """Where pieces are, or will be: the slot table's rows that tell when, as addresses, the load numbers by which they
    are known there, or RESIDENT, and the addresses of their bytes. Each int64 [pieces].
    """

    row: npt.NDArray[np.int64]
    load: npt.NDArray[np.int64]
    address: npt.NDArray[np.int64]


class HostStream:
    """Pieces used in place: the slot's own memory, seen as a CPU tensor.

    Machine code can take and release them by itself (`places`, `memory`, `wait`, `passed`) unless it `is_traced`.
    """

    def __init__(
        self,
        plan: SweepPlan,
        loads: LoadOrder,
        table: SlotTable,
        slots: Sequence[torch.Tensor],
        residents: Sequence[torch.Tensor],
        stopped: Callable[[], bool] = lambda: False,
        trace: TraceWriter = NO_TRACE,
    ) -> None:
        self.device = torch.device("cpu")
        self.times = StreamTimes()
        self._plan, self._loads, self._table = plan, loads, table
        self._slots, self._residents, self._stopped = slots, residents, stopped
        self._trace = trace
        self.streams, self.is_traced = loads.loads_per_sweep > 0, trace.enabled
        self.all_stay = not self.streams and not self.is_traced
        self.header_address = table.header_address
        # Slots from the front, residents from the end: -1 is the first one's, as in `LoadOrder.places`.
        backwards = range(len(residents))[::-1]
        rows = [*map(table.slot_address, range(len(slots))), *map(table.resident_address, backwards)]
        self._rows = np.array(rows, np.int64)
        self._addresses = np.array([memory.data_ptr() for memory in (*slots, *reversed(residents))], np.int64)
        read_bytes = [self._read_bytes(position) for position in range(len(loads.order))]
        self._streamed_until = np.cumsum([0, *read_bytes])
        self._acquired_at: dict[int, float] = {}
        self._base = table.restart_sweep(loads.loads_per_sweep)
        table.wait_epoch_seen(table.epoch, stopped)

    def begin_sweep(self) -> None:
        """A sweep begins at position 0."""

    def acquire(self, position: int) -> torch.Tensor:
        """The bytes of the piece at `position`; waits until the loader has them."""
        self.times.acquired += 1
        if self._trace.enabled:
            begin = time.perf_counter()
            memory = self._wait(position)
            self._acquired_at[position] = end = time.perf_counter()
            if end - begin > 1e-4:
                self._trace.add("wait for weights", begin, end, {"piece": self._name(position)})
            return memory
        return self._wait(position)

    def _name(self, position: int) -> str:
        return self._plan.pieces[self._loads.order[position]].block

    def _wait(self, position: int) -> torch.Tensor:
        memory = self.wait(position)
        self.times.streamed_bytes += self._read_bytes(position)
        return memory

    def _read_bytes(self, position: int) -> int:
        is_resident = self._loads.is_resident(position)
        return 0 if is_resident else self._plan.pieces[self._loads.order[position]].read_bytes

    def release(self, position: int) -> None:
        """The piece at `position` is used up: its slot is free."""
        if self._trace.enabled:
            self._trace.add(
                "compute", self._acquired_at.pop(position), time.perf_counter(), {"piece": self._name(position)}
            )
        load = self._loads.load_number(self._base, position)
        if load is not None:
            self._table.release(self._loads.slot(load), load)

    def end_sweep(self) -> None:
        """The next sweep's loads follow this one's."""
        self._base += self._loads.loads_per_sweep

    def abandon(self) -> None:
        """Start the next sweep at its first piece; what was read ahead is dropped."""
        self._base = self._table.restart_sweep(self._loads.loads_per_sweep)
        begin = time.perf_counter()
        self._table.wait_epoch_seen(self._table.epoch, self._stopped)
        self.times.waited_s += time.perf_counter() - begin

    # -- for machine code
    # -----------------------------------------------------------------------------------------------

    def places(self, start: int, stop: int) -> PiecePlaces:
        """Where the pieces at positions `start:stop` will be."""
        loads, slots = self._loads.places(self._base, start, stop)
        return PiecePlaces(self._rows[slots], np.where(slots < 0, RESIDENT, loads), self._addresses[slots])

    def memory(self, position: int) -> torch.Tensor:
        """Where the bytes of the piece at `position` will be."""
        load = self._loads.load_number(self._base, position)
        if load is None:
            return self._residents[self._loads.resident_row(position)]
        return self._slots[self._loads.slot(load)]

    def wait(self, position: int) -> torch.Tensor:
        """Wait until the piece at `position` is there; its bytes."""
        load = self._loads.load_number(self._base, position)
        if load is None:
            self.times.waited_s += self._table.wait_resident(self._loads.resident_row(position), self._stopped)
        else:
            self.times.waited_s += self._table.wait_ready(self._loads.slot(load), load, self._stopped)
        return self.memory(position)

    def passed(self, start: int, stop: int, waited_s: float) -> None:
        """The pieces at positions `start:stop` were acquired and released by machine code, which waited so long."""
        self.times.waited_s += waited_s
        self.times.acquired += stop - start
        self.times.streamed_bytes += int(self._streamed_until[stop] - self._streamed_until[start])
