"""Pieces on the GPU: copied from slots and resident memory on a stream of their own, ahead of the computation.

The computing thread itself issues the copies, in the order of the sweeps and as far ahead as GPU slots are free: with
every piece it lets go of, the next copy goes behind the last use of that slot on the copy stream. It needs nobody
for that, so no thread has to be woken, or to wait for Python's interpreter lock, between a piece and the next. It waits
only for a piece that is not in RAM yet; the compute stream waits for the copies. A retire thread frees the slot in
RAM when its copy is complete.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from pipo_ray.pipeline.device_ops import DeviceOps, Event
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import SlotTable
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.pipeline.weight_stream import StreamTimes
from pipo_ray.plan.pieces import SweepPlan


class DeviceStream:
    """A `WeightStream` whose pieces are on `ops.device`.

    `loads()` makes a load order for the slots in RAM (`residents` rows excepted), `copies()` one for the
    `num_gpu_slots` slots on the GPU, in which the pieces of `gpu_residents` (piece -> GPU memory, filled by `preload`)
    are resident.
    """

    def __init__(
        self,
        plan: SweepPlan,
        loads: Callable[[], LoadOrder],
        copies: Callable[[], LoadOrder],
        preloads: LoadOrder | None,
        table: SlotTable,
        slots: Sequence[torch.Tensor],
        residents: Sequence[torch.Tensor],
        slot_bytes: int,
        num_gpu_slots: int,
        gpu_residents: dict[int, torch.Tensor],
        ops: DeviceOps,
        trace: TraceWriter = NO_TRACE,
    ) -> None:
        self.device = ops.device
        self.times = StreamTimes()
        self._plan, self._table, self._ops, self._trace = plan, table, ops, trace
        self._loads, self._copies = loads(), copies()
        self.all_stay = not self._copies.loads_per_sweep and not trace.enabled
        self._ahead = copies()  # the place of the next copy, sweeps ahead of `_copies` at times
        self._slots, self._residents, self._gpu_residents = slots, residents, gpu_residents
        self._gpu_slots = [ops.allocate(slot_bytes) for _ in range(num_gpu_slots)]
        self._copied = [
            position for position in range(len(self._copies.order))
            if self._copies.load_number(0, position) is not None
        ]  # fmt: skip
        self._changed = threading.Condition()
        self._retiring: deque[tuple[Event, int, int]] = deque()  # event, slot, load
        self._stopping = False
        if preloads is not None and preloads.loads_per_sweep:
            self._preload(preloads)
        self._begin_anew()
        self._retirer = threading.Thread(target=self._retire_loop, name="retire", daemon=True)
        self._retirer.start()

    def _begin_anew(self) -> None:
        self._base = self._table.restart_sweep(self._loads.loads_per_sweep)
        self._table.wait_epoch_seen(self._table.epoch, lambda: False)
        self._sweep = 0
        self._next_copy = 0  # the number of the next copy; those of a sweep are numbered behind those of the one before
        self._issued: dict[int, Event] = {}
        self._last_use: dict[int, Event] = {}
        self._free = [True] * len(self._gpu_slots)

    # -- WeightStream
    # -----------------------------------------------------------------------------------------------------

    def begin_sweep(self) -> None:
        """A sweep begins at position 0."""

    def acquire(self, position: int) -> torch.Tensor:
        """The bytes of the piece at `position` on the GPU; the compute stream will have waited for its copy."""
        self.times.acquired += 1
        piece = self._plan.pieces[self._copies.order[position]]
        number = self._copies.load_number(self._sweep * self._copies.loads_per_sweep, position)
        if number is None:
            return self._gpu_residents[piece.index]
        while self._next_copy <= number:
            self._copy_next()
        self.times.streamed_bytes += piece.read_bytes
        self._ops.compute_waits_for(self._issued.pop(number))
        return self._gpu_slots[self._copies.slot(number)]

    def release(self, position: int) -> None:
        """The piece at `position` is used up once the compute stream gets here."""
        number = self._copies.load_number(self._sweep * self._copies.loads_per_sweep, position)
        if number is None:
            return
        slot = self._copies.slot(number)
        self._last_use[slot] = self._ops.record_on_compute()
        self._free[slot] = True
        while self._next_is_possible():
            self._copy_next()

    def end_sweep(self) -> None:
        """The next sweep's copies follow this one's."""
        self._sweep += 1

    def abandon(self) -> None:
        """Start the next sweep at its first piece; what was copied ahead is dropped."""
        self._ops.synchronize()
        with self._changed:
            self._retiring.clear()
        self._begin_anew()

    def close(self) -> None:
        """End the thread; the table must have been stopped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._retirer.join()

    # -- copies
    # ----------------------------------------------------------------------------------------------------------

    def _next_place(self) -> tuple[int, int | None]:
        """The position of the next copy in its sweep, and the load number of its piece; None if that stays in RAM."""
        sweep, rank = divmod(self._next_copy, self._copies.loads_per_sweep)
        position = self._copied[rank]
        return position, self._loads.load_number(self._base + sweep * self._loads.loads_per_sweep, position)

    def _next_is_possible(self) -> bool:
        """Whether the next copy has a free slot on the GPU, and its piece is in RAM."""
        if not self._free[self._ahead.slot(self._next_copy)]:
            return False
        position, load = self._next_place()
        if load is None:
            return self._table.resident_ready(self._loads.resident_row(position))
        return self._table.is_loaded(self._loads.slot(load), load)

    def _copy_next(self) -> None:
        """Issue the next copy, waiting until its piece is in RAM. Raises PieceUnreadableError, StoppedError."""
        position, load = self._next_place()
        piece = self._plan.pieces[self._copies.order[position]]
        if load is None:
            row = self._loads.resident_row(position)
            self.times.waited_s += self._table.wait_resident(row, lambda: False)
            source = self._residents[row]
        else:
            self.times.waited_s += self._table.wait_ready(self._loads.slot(load), load, lambda: False)
            source = self._slots[self._loads.slot(load)]
        gpu_slot = self._ahead.slot(self._next_copy)
        assert self._free[gpu_slot]  # as the order of releases has it
        self._free[gpu_slot] = False
        nbytes = piece.read_bytes
        last_use = self._last_use.pop(gpu_slot, None)
        event = self._ops.copy(source[:nbytes], self._gpu_slots[gpu_slot][:nbytes], last_use)
        self._trace.mark("weight copy", {"piece": piece.block, "gpu_slot": gpu_slot})
        if load is not None:
            with self._changed:
                self._retiring.append((event, self._loads.slot(load), load))
                self._changed.notify_all()
        self._issued[self._next_copy] = event
        self._next_copy += 1

    def _retire_loop(self) -> None:
        while True:
            with self._changed:
                while not self._retiring:
                    if self._stopping or self._table.stopped:
                        return
                    self._changed.wait(0.5)
                entry = self._retiring[0]
            event, slot, load = entry
            event.synchronize()
            with self._changed:
                # Gone if its sweep was given up: the slot may be another load's by now.
                if self._retiring and self._retiring[0] is entry:
                    self._retiring.popleft()
                    self._table.release(slot, load)

    def _preload(self, preloads: LoadOrder) -> None:
        """Fill the memory of the pieces that stay on the GPU, through the slots."""
        base = self._table.restart_sweep(preloads.loads_per_sweep, preload=True)
        self._table.wait_epoch_seen(self._table.epoch, lambda: False)
        for position, index in enumerate(preloads.order):
            load = base + position
            slot = preloads.slot(load)
            self._table.wait_ready(slot, load, lambda: False)
            nbytes = self._plan.pieces[index].read_bytes
            self._ops.copy(self._slots[slot][:nbytes], self._gpu_residents[index][:nbytes], None).synchronize()
            self._table.release(slot, load)
