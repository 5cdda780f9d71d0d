"""The loader's engine: runs through the sweeps' pieces for ever, as far ahead as slots are free, with several reads in
flight.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipo_ray.errors import DriveError, PipoError, StoreError
from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import U8, SlotTable, StoppedError
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.plan.pieces import Piece

Done = Callable[[Exception | None], None]

_SHORTEST_S = 50e-6
"""A shorter wait for a slot is none: looking at its state takes as long."""


@dataclass
class LoaderCounters:
    """Totals since the loader started. `reading_s`: at least one read was in flight and did not give way to others, as
    it did for `paused_s`; `waiting_for_slots_s`: none was, for want of a free slot. `bytes_read` are bytes read from
    the drive.
    """

    bytes_read: int = 0
    pieces_read: int = 0
    waiting_for_slots_s: float = 0.0
    reading_s: float = 0.0
    paused_s: float = 0.0
    running_s: float = 0.0
    retries: int = 0
    direct: bool = True


class _Fill:
    """A piece being read in several transfers; the last one to end finishes it."""

    def __init__(self, parts: int, done: Done) -> None:
        self._left = parts
        self._lock = threading.Lock()
        self._done = done
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a transfer has failed: the others need not be tried."""
        return self._error is not None

    def part_done(self, error: Exception | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            last = self._left == 0
        if last:
            self._done(self._error)


class Loader:
    """Fills `slots` and `residents` (uint8 views, 4096-aligned) with those pieces of `loads.order` that are on drive
    `number`, and keeps `table` up to date.

    Of several loaders each goes its own way through the sweeps: it waits for slots, which all share, and never for what
    another one reads, except when an epoch begins: until all know of it, one may still be reading into any slot.

    In a preloading epoch the order is that of `preloads`, the pieces that stay on the GPU. A slot is filled only when
    it is FREE, so the table is all the credit there is. Every block is checked against its checksum the first time it
    is read, unless `checksums` is None.
    """

    def __init__(
        self,
        drive: Drive,
        pieces: Sequence[Piece],
        loads: LoadOrder,
        table: SlotTable,
        slots: Sequence[U8],
        residents: Sequence[U8],
        *,
        checksums: BlockChecksums | None,
        threads: int = 4,
        transfer_bytes: int = 8 << 20,
        preloads: LoadOrder | None = None,
        trace: TraceWriter = NO_TRACE,
        number: int = 0,
    ) -> None:
        self._drive, self._pieces, self._loads, self._table = drive, pieces, loads, table
        self._number = number
        self._main_loads, self._preloads = loads, preloads
        self._slots = [slot.data for slot in slots]
        self._residents = [resident.data for resident in residents]
        self._checksums = checksums
        self._transfer_bytes = transfer_bytes // 4096 * 4096
        self._trace = trace
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._elsewhere = frozenset(index for at, index in enumerate(loads.order) if loads.is_elsewhere(at))
        self._filling_residents: set[int] = set()
        self._asked = 0  # transfers that the drive is asked for now
        self._pausing = False  # it is not asked: it gives way to others
        drive.on_pause = self._pause
        self._in_flight = 0
        self._in_flight_changed = threading.Condition()
        self._started = time.perf_counter()
        self._busy_since: float | None = None
        self._idle_since = self._started
        self._waiting_since: tuple[float, float] | None = None  # and what had been read by then, in seconds
        self.counters = LoaderCounters()
        self.error: PipoError | None = None
        self._readers = [
            threading.Thread(target=self._read_loop, name=f"read-{i}", daemon=True) for i in range(threads)
        ]
        self._dispatcher = threading.Thread(target=self._dispatch, name="dispatch", daemon=True)

    def start(self) -> None:
        """Begin to read ahead."""
        for thread in self._readers:
            thread.start()
        self._dispatcher.start()

    def stop(self) -> None:
        """End all threads; the table must have been stopped."""
        self._dispatcher.join()
        for _ in self._readers:
            self._tasks.put(None)
        for thread in self._readers:
            thread.join()
        self._drive.close()

    # -- dispatch
    # -------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self._table.drive_asked(0, self._number)
        self._table.clear_unfinished(self._number)
        epoch = self._table.epoch_seen(self._number)
        while not self._table.stopped:
            try:
                if epoch != self._table.epoch:
                    self._wait_idle()
                    epoch = self._table.epoch
                    self._table.clear_slots(self._number)
                    self._drop_misread_residents(epoch)
                    self._table.acknowledge_epoch(epoch, self._number)
                self._run_epoch(epoch)
            except StoppedError:
                continue

    def _drop_misread_residents(self, epoch: int) -> None:
        """What came out wrong is read again in the new epoch, except what is on the GPU and not loaded any more."""
        if self._checksums is None:
            return
        kept = () if self._table.preloading(epoch) else self._elsewhere
        wrong = self._checksums.begin_again(kept)
        for position, index in enumerate(self._main_loads.order):
            if index in wrong and self._main_loads.is_resident(position):
                self._table.reset_resident(self._main_loads.resident_row(position))

    def _run_epoch(self, epoch: int) -> None:
        preloading = self._table.preloading(epoch) and self._preloads is not None
        self._loads = self._preloads if preloading and self._preloads is not None else self._main_loads
        self._table.wait_epoch_seen(epoch, lambda: self._table.epoch != epoch)
        per_sweep = self._loads.loads_per_sweep
        next_load = self._table.consumed_in(epoch)
        first_load = sweep_base = self._table.first_load_of(epoch)
        if per_sweep:
            sweep_base = next_load // per_sweep * per_sweep
        own = [
            (position, self._pieces[index])
            for position, index in enumerate(self._loads.order)
            if self._pieces[index].drive == self._number and not self._loads.is_elsewhere(position)
        ]
        streams = any(self._loads.load_number(0, position) is not None for position, _ in own)
        while True:
            for position, piece in own:
                load = self._loads.load_number(sweep_base, position)
                if load is None:
                    self._fill_resident(position, piece)
                elif load >= next_load:
                    self._fill_slot(load, piece, epoch, first_load)
                if self._table.stopped or self._table.epoch != epoch:
                    raise StoppedError
            sweep_base += per_sweep
            if not streams:  # everything that is on this drive is resident: nothing to do until a new epoch
                self._table.wait_epoch_change(epoch)
                raise StoppedError

    def _fill_resident(self, position: int, piece: Piece) -> None:
        row = self._loads.resident_row(position)
        if row in self._filling_residents or self._table.resident_ready(row):
            return
        self._filling_residents.add(row)

        def done(error: Exception | None) -> None:
            self._note(error)
            self._table.finish_resident(row, failed=error is not None, loader=self._number)
            self._filling_residents.discard(row)

        self._read(piece, self._residents[row][: piece.read_bytes], done, {"piece": piece.block, "resident": row})

    def _fill_slot(self, load: int, piece: Piece, epoch: int, first_load: int) -> None:
        slot = self._loads.slot(load)
        if self._table.is_loaded(slot, load):
            return
        begin = time.perf_counter()
        self._waiting_since = (begin, self._reading_s())
        try:
            self._table.wait_free(slot, epoch, self._loads.load_before(load, first_load))
        finally:
            self.counters.waiting_for_slots_s = self._dispatcher_waiting_s()
            self._waiting_since = None
            self._trace_wait(begin, {"piece": piece.block, "slot": slot, "load": load})
        self._table.begin_fill(slot, load, self._number)

        self._read(
            piece, self._slots[slot][: piece.read_bytes], self._slot_filled(slot, load),
            {"piece": piece.block, "slot": slot, "load": load},
        )  # fmt: skip

    def _slot_filled(self, slot: int, load: int) -> Done:
        """What is to be done when `slot` holds load number `load`, or could not be filled."""

        def done(error: Exception | None) -> None:
            self._note(error)
            self._table.finish_fill(slot, load, failed=error is not None)

        return done

    def _trace_wait(self, begin: float, labels: Mapping[str, object]) -> None:
        """The part of a wait for a slot, until now, in which nothing was read: only the dispatcher begins a read."""
        if not self._trace.enabled:
            return
        with self._in_flight_changed:
            end = time.perf_counter()
            idle = end if self._in_flight else max(begin, self._idle_since)
        if end - idle >= _SHORTEST_S:
            self._trace.add("wait for a slot", idle, end, labels)

    # -- reading
    # --------------------------------------------------------------------------------------------------------

    def _read(self, piece: Piece, memory: memoryview, done: Done, labels: Mapping[str, object]) -> None:
        begin = time.perf_counter()
        if self._checksums is not None:
            self._checksums.expect(piece)
        with self._in_flight_changed:
            if self._in_flight == 0:
                self._busy_since = begin
            self._in_flight += 1

        def finish(error: Exception | None) -> None:
            error = self._checked(piece, memory, error)
            now = time.perf_counter()
            self._trace.add("weight load", begin, now, {**labels, "bytes": piece.read_bytes})
            done(error)
            with self._in_flight_changed:
                self._in_flight -= 1
                self._idle_since = max(self._idle_since, now)
                if self._in_flight == 0 and self._busy_since is not None:
                    self.counters.reading_s += now - self._busy_since
                    self._busy_since = None
                self._in_flight_changed.notify_all()

        step = self._transfer_bytes
        starts = range(0, len(memory), step)
        fill = _Fill(len(starts), finish)
        for start in starts:
            self._tasks.put(self._transfer(piece, memory, start, min(start + step, len(memory)), fill))

    def _transfer(self, piece: Piece, memory: memoryview, start: int, stop: int, fill: _Fill) -> Callable[[], None]:
        def transfer() -> None:
            if fill.failed:
                fill.part_done(None)
                return
            error: Exception | None = None
            self._ask_drive(1)
            try:
                self._drive.read_into(memory[start:stop], piece.file, piece.file_offset + start)
            except Exception as failure:  # whatever it is, the compute worker must hear of it instead of waiting
                error = as_pipo_error(failure, piece)
            self._ask_drive(-1)
            fill.part_done(error)

        return transfer

    def _checked(self, piece: Piece, memory: memoryview, error: Exception | None) -> Exception | None:
        """Count `piece`, which was read into `memory`; what is wrong with it: `error`, or its checksum."""
        if self._checksums is not None and error is not None:
            self._checksums.missed(piece)
        elif self._checksums is not None:
            try:
                self._checksums.check(piece, np.frombuffer(memory, np.uint8))
            except Exception as mismatch:
                error = as_pipo_error(mismatch, piece)
        with self._in_flight_changed:
            self.counters.bytes_read += piece.read_bytes
            self.counters.pieces_read += 1
        return error

    def _ask_drive(self, change: int) -> None:
        """A transfer begins (1), or has ended (-1): the drive has answered."""
        with self._in_flight_changed:
            self._asked += change
            if change < 0 or self._asked == 1:
                self._note_asked()
            if not self._drive.direct:
                self._table.note_buffered(self._number)

    def _pause(self, pausing: bool) -> None:
        with self._in_flight_changed:
            self._pausing = pausing
            self._note_asked()

    def _note_asked(self) -> None:
        asked = self._asked and not self._pausing
        self._table.drive_asked(time.perf_counter() if asked else 0, self._number)

    def _read_loop(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            task()

    def _wait_idle(self) -> None:
        with self._in_flight_changed:
            while self._in_flight:
                self._in_flight_changed.wait()

    def _note(self, error: Exception | None) -> None:
        if isinstance(error, PipoError):
            self.error = error

    def snapshot(self) -> LoaderCounters:
        """The counters now."""
        paused_s = self._drive.paused_s
        return replace(
            self.counters,
            reading_s=max(0.0, self._reading_s() - paused_s),
            paused_s=paused_s,
            waiting_for_slots_s=self._waiting_s(),
            running_s=time.perf_counter() - self._started,
            retries=self._drive.retries,
            direct=self._drive.direct,
        )

    def _reading_s(self) -> float:
        with self._in_flight_changed:
            since = self._busy_since
            return self.counters.reading_s + (0.0 if since is None else time.perf_counter() - since)

    def _waiting_s(self) -> float:
        """What was waited for slots while nothing was being read, up to now."""
        return self._dispatcher_waiting_s()

    def _dispatcher_waiting_s(self) -> float:
        since = self._waiting_since
        if since is None:
            return self.counters.waiting_for_slots_s
        begin, read_before = since
        idle = time.perf_counter() - begin - (self._reading_s() - read_before)
        return self.counters.waiting_for_slots_s + max(0.0, idle)


def as_pipo_error(error: Exception, piece: Piece) -> PipoError:
    if isinstance(error, DriveError) and not str(error).startswith("block "):
        return type(error)(f"block {piece.block} cannot be read: {error}")
    if isinstance(error, PipoError):
        return error
    return StoreError(f"{piece.file}: reading block {piece.block} failed: {type(error).__name__}: {error}")
