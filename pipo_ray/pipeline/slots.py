"""The slot table: the state of every slot and resident piece, in shared memory, with one writer per transition.

A slot goes FREE -> FILLING (loader) -> READY (loader) -> FREE (compute). Each load has a number that is never used
twice, so that what is in a slot can be told after any process was killed. The word that is waited for is a futex.

Layout, little-endian 64-byte rows: row 0 is the header, then one row per slot, per resident piece, and per actor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from pipo_ray.pipeline import futex

ROW_BYTES = 64
_WAIT_SLICE_S = 0.5

U8 = npt.NDArray[np.uint8]


class SlotState(IntEnum):
    """What a slot or resident piece holds."""

    FREE = 0
    FILLING = 1
    READY = 2
    FAILED = 3


# Header words (uint64 index within row 0).
_EPOCH, _EPOCH_SEEN, _NEXT_LOAD, _CONSUMED, _STOP, _PRELOAD, _DRIVE_ASKED, _DRIVE_BUFFERED = range(8)
# Words of a slot's row: uint32 word 0 is the state (the futex); uint64 words from 1 on.
_LOAD, _ERROR = 1, 2


class StoppedError(Exception):
    """The pipeline was told to stop, or the epoch changed, while waiting."""


class PieceUnreadableError(OSError):
    """The loader could not read a piece; it knows why."""


@dataclass(frozen=True)
class SlotView:
    """A snapshot of one row, for the books."""

    state: SlotState
    load: int


class SlotTable:
    """The table over `memory` (uint8, at least `SlotTable.nbytes(...)` bytes, zeroed once by the driver)."""

    def __init__(self, memory: U8, num_slots: int, num_resident: int) -> None:
        if memory.nbytes < self.nbytes(num_slots, num_resident):
            raise ValueError(f"slot table needs {self.nbytes(num_slots, num_resident)} bytes, got {memory.nbytes}")
        self.num_slots = num_slots
        self.num_resident = num_resident
        self._memory = memory
        self._words32 = memory[: memory.nbytes // 4 * 4].view(np.uint32)
        self._words64 = memory[: memory.nbytes // 8 * 8].view(np.uint64)
        self._address = memory.ctypes.data

    @staticmethod
    def nbytes(num_slots: int, num_resident: int) -> int:
        """Bytes of a table."""
        return ROW_BYTES * (1 + num_slots + num_resident)

    # -- rows
    # -----------------------------------------------------------------------------------------------------------

    def _row(self, slot: int) -> int:
        return 1 + slot

    def _resident_row(self, index: int) -> int:
        return 1 + self.num_slots + index

    def _state_at(self, row: int) -> int:
        return int(self._words32[row * ROW_BYTES // 4])

    def _set_state(self, row: int, state: SlotState) -> None:
        self._words32[row * ROW_BYTES // 4] = state
        futex.wake(self._address + row * ROW_BYTES)

    def _load_at(self, row: int) -> int:
        return int(self._words64[row * ROW_BYTES // 8 + _LOAD])

    def _wait_row(self, row: int, done: Callable[[], bool], stopped: Callable[[], bool]) -> float:
        """Wait until done(); seconds waited. Raises StoppedError when stopped() says so."""
        if done():
            return 0.0
        begin = time.perf_counter()
        while True:
            state = self._state_at(row)
            if done():
                return time.perf_counter() - begin
            if stopped():
                raise StoppedError
            futex.wait(self._address + row * ROW_BYTES, state, _WAIT_SLICE_S)

    # -- loader's side
    # --------------------------------------------------------------------------------------------------

    def wait_free(self, slot: int, epoch: int) -> float:
        """Loader: wait until `slot` is FREE; seconds waited."""
        row = self._row(slot)
        return self._wait_row(
            row, lambda: self._state_at(row) == SlotState.FREE, lambda: self.stopped or self.epoch != epoch
        )

    def begin_fill(self, slot: int, load: int) -> None:
        """Loader: `slot` is being filled with load number `load`."""
        row = self._row(slot)
        self._words64[row * ROW_BYTES // 8 + _LOAD] = load
        self._set_state(row, SlotState.FILLING)

    def finish_fill(self, slot: int, load: int, *, failed: bool = False) -> None:
        """Loader: `slot` holds load number `load` (or the read failed)."""
        row = self._row(slot)
        self._words64[row * ROW_BYTES // 8 + _LOAD] = load
        self._set_state(row, SlotState.FAILED if failed else SlotState.READY)

    def finish_resident(self, index: int, *, failed: bool = False) -> None:
        """Loader: the resident piece in resident row `index` is in memory for good."""
        self._set_state(self._resident_row(index), SlotState.FAILED if failed else SlotState.READY)

    def resident_ready(self, index: int) -> bool:
        """Whether the resident piece is in memory."""
        return self._state_at(self._resident_row(index)) == SlotState.READY

    def is_loaded(self, slot: int, load: int) -> bool:
        """Whether `slot` already holds load number `load`: what a restarted loader need not read again."""
        row = self._row(slot)
        return self._state_at(row) == SlotState.READY and self._load_at(row) == load

    def reset_resident(self, index: int) -> None:
        """Loader: the resident piece in resident row `index` is to be loaded again."""
        self._set_state(self._resident_row(index), SlotState.FREE)

    def reset_slot(self, slot: int) -> None:
        """Loader, at its start: nobody fills `slot` any more."""
        self._set_state(self._row(slot), SlotState.FREE)

    def clear_slots(self) -> None:
        """Loader, on a new epoch: whatever the slots hold is dropped, and residents that failed get another try."""
        for slot in range(self.num_slots):
            self._set_state(self._row(slot), SlotState.FREE)
        self.clear_failed_residents()

    def clear_failed_residents(self) -> None:
        """Loader, on a new epoch and at its start: resident pieces that could not be read will be read again."""
        for index in range(self.num_resident):
            if self._state_at(self._resident_row(index)) == SlotState.FAILED:
                self.reset_resident(index)

    @property
    def drive_buffered(self) -> bool:
        """Whether the loader reads through the page cache."""
        return bool(self._words64[_DRIVE_BUFFERED])

    def note_buffered(self) -> None:
        """Loader: reads go through the page cache."""
        self._words64[_DRIVE_BUFFERED] = 1

    def drive_asked(self, since_s: float) -> None:
        """Loader: since `since_s` (`time.perf_counter`) the drive has been asked and has given nothing; 0: it is asked
        nothing.
        """
        self._words64[_DRIVE_ASKED] = int(since_s * 1e6)

    @property
    def drive_silent_s(self) -> float:
        """Seconds for which the drive has been asked and has given nothing."""
        since = int(self._words64[_DRIVE_ASKED])
        return max(0.0, time.perf_counter() - since / 1e6) if since else 0.0

    # -- compute's side
    # -------------------------------------------------------------------------------------------------

    def wait_ready(self, slot: int, load: int, stopped: Callable[[], bool]) -> float:
        """Compute: wait until `slot` holds load number `load`; seconds waited. PieceUnreadableError if it could
        not be read.
        """
        row = self._row(slot)

        def done() -> bool:
            state = self._state_at(row)
            return self._load_at(row) == load and state in (SlotState.READY, SlotState.FAILED)

        waited = self._wait_row(row, done, lambda: self.stopped or stopped())
        if self._state_at(row) == SlotState.FAILED:
            raise PieceUnreadableError("the loader could not read this piece")
        return waited

    def wait_resident(self, index: int, stopped: Callable[[], bool]) -> float:
        """Compute: wait until the resident piece in row `index` is in memory; seconds waited. PieceUnreadableError if
        it could not be read.
        """
        row = self._resident_row(index)
        ready = (SlotState.READY, SlotState.FAILED)
        waited = self._wait_row(row, lambda: self._state_at(row) in ready, lambda: self.stopped or stopped())
        if self._state_at(row) == SlotState.FAILED:
            raise PieceUnreadableError("the loader could not read this piece")
        return waited

    def release(self, slot: int, load: int) -> None:
        """Compute: load number `load` is used up; everything before it is, too."""
        self._words64[_CONSUMED] = max(int(self._words64[_CONSUMED]), load + 1)
        self._set_state(self._row(slot), SlotState.FREE)

    # -- epochs: starting a sweep anew
    # ------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of times that the sweep was started anew."""
        return int(self._words64[_EPOCH])

    @property
    def first_load(self) -> int:
        """The load number with which the current epoch begins: the first piece of a sweep."""
        return int(self._words64[_NEXT_LOAD])

    @property
    def preloading(self) -> bool:
        """Whether the current epoch's loads are those of the pieces that stay on the GPU."""
        return bool(self._words64[_PRELOAD])

    @property
    def consumed(self) -> int:
        """Every load number below this one has been used up, or dropped."""
        return max(int(self._words64[_CONSUMED]), self.first_load)

    def restart_sweep(self, loads_per_sweep: int, *, preload: bool = False) -> int:
        """Compute, after it lost its place: the next load it will use is the first of a sweep. Returns that load
        number.

        With `preload` the epoch's loads are those of the pieces that stay on the GPU.

        The loader drops what it has read ahead; `wait_epoch_seen` returns once it has. Load numbers of the old epoch
        are never used again.
        """
        if loads_per_sweep:
            ahead = self.consumed + self.num_slots
            self._words64[_NEXT_LOAD] = -(-ahead // loads_per_sweep) * loads_per_sweep
        self._words64[_PRELOAD] = preload
        self._words64[_EPOCH] = self.epoch + 1
        futex.wake(self._address)
        for slot in range(self.num_slots):  # whoever waits for a slot must look at the epoch
            futex.wake(self._address + self._row(slot) * ROW_BYTES)
        return self.first_load

    def wait_epoch_change(self, epoch: int) -> None:
        """Loader with nothing to read: sleep until the epoch is another one, or everybody stops."""
        while self.epoch == epoch and not self.stopped:
            futex.wait(self._address, epoch & 0xFFFFFFFF, _WAIT_SLICE_S)

    def acknowledge_epoch(self, epoch: int) -> None:
        """Loader: nothing of an older epoch is being read any more, and the slots are cleared."""
        self._words64[_EPOCH_SEEN] = epoch
        futex.wake(self._address)

    @property
    def epoch_seen(self) -> int:
        """The epoch that the loader works in."""
        return int(self._words64[_EPOCH_SEEN])

    def wait_epoch_seen(self, epoch: int, stopped: Callable[[], bool]) -> None:
        """Compute: wait until the loader works in `epoch`."""
        while self.epoch_seen != epoch:
            if self.stopped or stopped():
                raise StoppedError
            time.sleep(0.0005)

    # -- stopping and books
    # -----------------------------------------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        """Whether everybody is to stop."""
        return bool(self._words64[_STOP])

    def stop(self) -> None:
        """Driver: everybody stops waiting."""
        self._words64[_STOP] = 1
        for row in range(1 + self.num_slots + self.num_resident):
            futex.wake(self._address + row * ROW_BYTES)

    def view(self, slot: int) -> SlotView:
        """A snapshot of a slot's row."""
        row = self._row(slot)
        return SlotView(SlotState(self._state_at(row)), self._load_at(row))
