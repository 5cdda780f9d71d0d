"""Pieces on the GPU: copied from slots and resident memory on a stream of their own, ahead of the computation.

A copier thread walks the sweeps' pieces in order, as far ahead as GPU slots are free: it waits for a piece in RAM, lets
the copy stream wait for the last use of the GPU slot, and issues the copy. A retire thread frees the slot in RAM when
its copy is complete. The computing thread waits for nothing but the issue of a copy; the compute stream waits for the
copy itself.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from pipo_ray.pipeline.device_ops import DeviceOps, Event
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import SlotTable, StoppedError
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
        self._copier_copies = copies()
        self._slots, self._residents, self._gpu_residents = slots, residents, gpu_residents
        self._gpu_slots = [ops.allocate(slot_bytes) for _ in range(num_gpu_slots)]
        self._changed = threading.Condition()
        self._generation = 0
        self._stopping = False
        self._reset_books()
        if preloads is not None and preloads.loads_per_sweep:
            self._preload(preloads)
        self._base = table.restart_sweep(self._loads.loads_per_sweep)
        table.wait_epoch_seen(table.epoch, lambda: False)
        self._copier = threading.Thread(target=self._copy_loop, name="copier", daemon=True)
        self._retirer = threading.Thread(target=self._retire_loop, name="retire", daemon=True)
        self._copier.start()
        self._retirer.start()

    def _reset_books(self) -> None:
        self._sweep = 0
        self._issued: dict[int, Event] = {}
        self._released: dict[int, Event] = {}
        self._free = [True] * len(self._gpu_slots)
        self._retiring: deque[tuple[Event, int, int, int]] = deque()  # event, slot, load, generation
        self._error: BaseException | None = None
        self._idle = False

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
        begin = time.perf_counter()
        with self._changed:
            while number not in self._issued:
                if self._error is not None:
                    raise self._error
                if self._table.stopped:
                    raise StoppedError
                self._changed.wait(0.5)
            event = self._issued.pop(number)
        self.times.waited_s += time.perf_counter() - begin
        self.times.streamed_bytes += piece.read_bytes
        self._ops.compute_waits_for(event)
        return self._gpu_slots[self._copies.slot(number)]

    def release(self, position: int) -> None:
        """The piece at `position` is used up once the compute stream gets here."""
        number = self._copies.load_number(self._sweep * self._copies.loads_per_sweep, position)
        if number is None:
            return
        slot = self._copies.slot(number)
        event = self._ops.record_on_compute()
        with self._changed:
            self._released[slot] = event
            self._free[slot] = True
            self._changed.notify_all()

    def end_sweep(self) -> None:
        """The next sweep's copies follow this one's."""
        with self._changed:
            self._sweep += 1

    def abandon(self) -> None:
        """Start the next sweep at its first piece; what was copied ahead is dropped."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()
        base = self._table.restart_sweep(self._loads.loads_per_sweep)
        with self._changed:
            while not self._idle:  # the copier has seen the new generation
                self._changed.wait(0.5)
            self._ops.synchronize()
            self._reset_books()
            self._base = base
        self._table.wait_epoch_seen(self._table.epoch, lambda: False)
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; the table must have been stopped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._copier.join()
        self._retirer.join()

    # -- the copier
    # -------------------------------------------------------------------------------------------------------

    def _copy_loop(self) -> None:
        generation = 0
        while not self._stopping and not self._table.stopped:
            try:
                self._copy_sweeps(generation)
            except StoppedError:
                pass
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                while not self._stopping and not self._table.stopped and (self._idle or self._generation == generation):
                    self._changed.wait(0.5)
                generation = self._generation

    def _copy_sweeps(self, generation: int) -> None:
        sweep = 0
        loads, copies = self._loads, self._copier_copies
        changed = lambda: self._generation != generation or self._stopping  # noqa: E731
        while copies.loads_per_sweep:
            for position, index in enumerate(copies.order):
                number = copies.load_number(sweep * copies.loads_per_sweep, position)
                if number is None:
                    continue
                nbytes = self._plan.pieces[index].read_bytes
                load = loads.load_number(self._base + sweep * loads.loads_per_sweep, position)
                if load is None:
                    row = loads.resident_row(position)
                    self._table.wait_resident(row, changed)
                    source = self._residents[row]
                else:
                    self._table.wait_ready(loads.slot(load), load, changed)
                    source = self._slots[loads.slot(load)]
                gpu_slot = copies.slot(number)
                last_use = self._wait_free(gpu_slot, changed)
                event = self._ops.copy(source[:nbytes], self._gpu_slots[gpu_slot][:nbytes], last_use)
                self._trace.mark("weight copy", {"piece": self._plan.pieces[index].block, "gpu_slot": gpu_slot})
                with self._changed:
                    if load is not None:
                        self._retiring.append((event, loads.slot(load), load, generation))
                    self._issued[number] = event
                    self._changed.notify_all()
            sweep += 1
        while not changed() and not self._table.stopped:  # everything is on the GPU
            with self._changed:
                self._changed.wait(0.5)

    def _wait_free(self, gpu_slot: int, changed: Callable[[], bool]) -> Event | None:
        with self._changed:
            while not self._free[gpu_slot]:
                if changed() or self._table.stopped:
                    raise StoppedError
                self._changed.wait(0.5)
            self._free[gpu_slot] = False
            return self._released.pop(gpu_slot, None)

    def _retire_loop(self) -> None:
        while True:
            with self._changed:
                while not self._retiring:
                    if self._stopping or self._table.stopped:
                        return
                    self._changed.wait(0.5)
                entry = self._retiring[0]
            event, slot, load, generation = entry
            event.synchronize()
            with self._changed:
                if self._retiring and self._retiring[0] is entry:
                    self._retiring.popleft()
                    # A copy of a sweep that was given up: its slot may be another load's by now.
                    if self._generation == generation:
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
