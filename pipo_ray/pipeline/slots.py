"""The slot table: the state of every slot and resident piece, in shared memory, with one writer per transition.

A slot goes FREE -> FILLING (loader) -> READY (loader) -> FREE (compute). Each load has a number that is never used
twice, so that what is in a slot can be told after any process was killed. The word that is waited for is a futex.

With several loaders (one per drive, numbered from 0) "the loader" of a load is that of the drive which the piece is on.
FREE does not tell for which of them a slot is free: that the load before has been released does.

Layout, little-endian 64-byte rows: row 0 is the header, then one row per slot, per resident piece, and per loader.
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


# Header words (uint64 index within row 0). An epoch's first load and whether it preloads stand in one of two words, in
# turns: a loader that has not seen the new epoch yet finds those of its own.
_EPOCH, _CONSUMED, _STOP, _FIRST_LOAD, _PRELOAD = 0, 1, 2, 3, 5
# Words of a slot's or resident piece's row: uint32 word 0 is the state (the futex); uint64 words from 1 on. The loader
# whose load it is writes _LOAD and _LOADER before the state; compute writes _RELEASED, the last released load plus 1.
_LOAD, _LOADER, _RELEASED = 1, 2, 3
# Words of a loader's row (uint64).
_EPOCH_SEEN, _DRIVE_ASKED, _DRIVE_BUFFERED = range(3)
EPOCH_BYTE, CONSUMED_BYTE, STOP_BYTE = 8 * _EPOCH, 8 * _CONSUMED, 8 * _STOP
LOAD_BYTE, LOADER_BYTE, RELEASED_BYTE = 8 * _LOAD, 8 * _LOADER, 8 * _RELEASED
"""Where machine code (`compiled/part_run.py`, `compiled/reading.py`) finds those words, in bytes: from the header on,
and from a row on.
"""

RESIDENT = -1
"""In place of a load number: the piece stays, and is not released."""


class StoppedError(Exception):
    """The pipeline was told to stop, or the epoch changed, while waiting."""


class PieceUnreadableError(OSError):
    """The loader of this number could not read a piece; it knows why."""

    def __init__(self, loader: int = 0) -> None:
        super().__init__("the loader could not read this piece")
        self.loader = loader

    def __reduce__(self) -> tuple[type[PieceUnreadableError], tuple[int]]:
        return type(self), (self.loader,)


@dataclass(frozen=True)
class SlotView:
    """A snapshot of one row, for the books."""

    state: SlotState
    load: int


class SlotTable:
    """The table over `memory` (uint8, at least `SlotTable.nbytes(...)` bytes, zeroed once by the driver)."""

    def __init__(self, memory: U8, num_slots: int, num_resident: int, num_loaders: int = 1) -> None:
        needed = self.nbytes(num_slots, num_resident, num_loaders)
        if memory.nbytes < needed:
            raise ValueError(f"slot table needs {needed} bytes, got {memory.nbytes}")
        self.num_slots = num_slots
        self.num_resident = num_resident
        self.num_loaders = num_loaders
        self._memory = memory
        self._words32 = memory[: memory.nbytes // 4 * 4].view(np.uint32)
        self._words64 = memory[: memory.nbytes // 8 * 8].view(np.uint64)
        self._address = memory.ctypes.data

    @staticmethod
    def nbytes(num_slots: int, num_resident: int, num_loaders: int = 1) -> int:
        """Bytes of a table."""
        return ROW_BYTES * (1 + num_slots + num_resident + num_loaders)

    # -- rows
    # -----------------------------------------------------------------------------------------------------------

    def _row(self, slot: int) -> int:
        return 1 + slot

    def _resident_row(self, index: int) -> int:
        return 1 + self.num_slots + index

    def _loader_word(self, loader: int, word: int) -> int:
        """Index of a uint64 word of a loader's row."""
        return (1 + self.num_slots + self.num_resident + loader) * ROW_BYTES // 8 + word

    def _word_at(self, row: int, word: int) -> int:
        return int(self._words64[row * ROW_BYTES // 8 + word])

    def _state_at(self, row: int) -> int:
        return int(self._words32[row * ROW_BYTES // 4])

    def _set_state(self, row: int, state: SlotState) -> None:
        self._words32[row * ROW_BYTES // 4] = state
        futex.wake(self._address + row * ROW_BYTES)

    def _load_at(self, row: int) -> int:
        return self._word_at(row, _LOAD)

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

    def wait_free(self, slot: int, epoch: int, after: int | None = None) -> float:
        """Loader: wait until `slot` is FREE and load `after`, which has it before, was released (None: the epoch's
        first load of this slot); seconds waited.
        """
        row = self._row(slot)
        least = 0 if after is None else after + 1

        def free() -> bool:
            # In this order: compute writes FREE behind what it has released, and would undo what is written in between.
            return self._word_at(row, _RELEASED) >= least and self._state_at(row) == SlotState.FREE

        return self._wait_row(row, free, lambda: self.stopped or self.epoch != epoch)

    def begin_fill(self, slot: int, load: int, loader: int = 0) -> None:
        """Loader: `slot` is being filled with load number `load`."""
        row = self._row(slot)
        self._words64[row * ROW_BYTES // 8 + _LOADER] = loader
        self._words64[row * ROW_BYTES // 8 + _LOAD] = load
        self._set_state(row, SlotState.FILLING)

    def finish_fill(self, slot: int, load: int, *, failed: bool = False) -> None:
        """Loader: `slot` holds load number `load` (or the read failed)."""
        row = self._row(slot)
        self._words64[row * ROW_BYTES // 8 + _LOAD] = load
        self._set_state(row, SlotState.FAILED if failed else SlotState.READY)

    def finish_resident(self, index: int, *, failed: bool = False, loader: int = 0) -> None:
        """Loader: the resident piece in resident row `index` is in memory for good."""
        row = self._resident_row(index)
        self._words64[row * ROW_BYTES // 8 + _LOADER] = loader
        self._set_state(row, SlotState.FAILED if failed else SlotState.READY)

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

    def clear_unfinished(self, loader: int = 0) -> None:
        """Loader, at its start: nobody fills any more what its predecessor, who was killed, was filling or failed to
        read.
        """
        self._clear(loader, (SlotState.FILLING, SlotState.FAILED))

    def clear_slots(self, loader: int = 0) -> None:
        """Loader, on a new epoch: whatever it has put into slots is dropped, and residents that it failed to read get
        another try.
        """
        self._clear(loader, (SlotState.FILLING, SlotState.READY, SlotState.FAILED))

    def _clear(self, loader: int, states: tuple[SlotState, ...]) -> None:
        # The state is read first: who writes FILLING has put its number there before.
        for row in range(self._row(0), self._row(self.num_slots)):
            if self._state_at(row) in states and self._word_at(row, _LOADER) == loader:
                self._set_state(row, SlotState.FREE)
        for index in range(self.num_resident):
            row = self._resident_row(index)
            if self._state_at(row) == SlotState.FAILED and self._word_at(row, _LOADER) == loader:
                self.reset_resident(index)

    def drive_buffered(self, loader: int = 0) -> bool:
        """Whether the loader reads through the page cache."""
        return bool(self._words64[self._loader_word(loader, _DRIVE_BUFFERED)])

    def note_buffered(self, loader: int = 0) -> None:
        """Loader: reads go through the page cache."""
        self._words64[self._loader_word(loader, _DRIVE_BUFFERED)] = 1

    def drive_asked(self, since_s: float, loader: int = 0) -> None:
        """Loader: since `since_s` (`time.perf_counter`) its drive has been asked and has given nothing; 0: it is asked
        nothing.
        """
        self._words64[self._loader_word(loader, _DRIVE_ASKED)] = int(since_s * 1e6)

    def drive_silent_s(self, loader: int = 0) -> float:
        """Seconds for which the loader's drive has been asked and has given nothing."""
        since = int(self._words64[self._loader_word(loader, _DRIVE_ASKED)])
        return max(0.0, time.perf_counter() - since / 1e6) if since else 0.0

    # -- compute's side
    # -------------------------------------------------------------------------------------------------

    def wait_ready(self, slot: int, load: int, stopped: Callable[[], bool]) -> float:
        """Compute: wait until `slot` holds load number `load`; seconds waited. PieceUnreadableError if it could
        not be read.
        """
        row = self._row(slot)

        def done() -> bool:
            # In this order: a state that is read first may be that of the load before, whose end comes in between.
            return self._load_at(row) == load and self._state_at(row) in (SlotState.READY, SlotState.FAILED)

        waited = self._wait_row(row, done, lambda: self.stopped or stopped())
        if self._state_at(row) == SlotState.FAILED:
            raise PieceUnreadableError(self._word_at(row, _LOADER))
        return waited

    def wait_resident(self, index: int, stopped: Callable[[], bool]) -> float:
        """Compute: wait until the resident piece in row `index` is in memory; seconds waited. PieceUnreadableError if
        it could not be read.
        """
        row = self._resident_row(index)
        if self._state_at(row) == SlotState.READY:
            return 0.0
        ready = (SlotState.READY, SlotState.FAILED)
        waited = self._wait_row(row, lambda: self._state_at(row) in ready, lambda: self.stopped or stopped())
        if self._state_at(row) == SlotState.FAILED:
            raise PieceUnreadableError(self._word_at(row, _LOADER))
        return waited

    def release(self, slot: int, load: int) -> None:
        """Compute: load number `load` is used up; everything before it is, too."""
        row = self._row(slot)
        self._words64[_CONSUMED] = max(int(self._words64[_CONSUMED]), load + 1)
        self._words64[row * ROW_BYTES // 8 + _RELEASED] = max(self._word_at(row, _RELEASED), load + 1)
        self._set_state(row, SlotState.FREE)

    @property
    def header_address(self) -> int:
        """Where the table begins, for machine code that waits and releases as the methods above do."""
        return self._address

    def slot_address(self, slot: int) -> int:
        """Where the row of `slot` begins."""
        return self._address + self._row(slot) * ROW_BYTES

    def asked_address(self, loader: int = 0) -> int:
        """Where the word of `drive_asked` is."""
        return self._address + 8 * self._loader_word(loader, _DRIVE_ASKED)

    def resident_address(self, index: int) -> int:
        """Where the row of the resident piece in resident row `index` begins."""
        return self._address + self._resident_row(index) * ROW_BYTES

    # -- epochs: starting a sweep anew
    # ------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of times that the sweep was started anew."""
        return int(self._words64[_EPOCH])

    @property
    def first_load(self) -> int:
        """The load number with which the current epoch begins: the first piece of a sweep."""
        return self.first_load_of(self.epoch)

    def first_load_of(self, epoch: int) -> int:
        """The same of `epoch`, which is the current one or the one before."""
        return int(self._words64[_FIRST_LOAD + epoch % 2])

    def preloading(self, epoch: int) -> bool:
        """Whether the loads of `epoch` are those of the pieces that stay on the GPU."""
        return bool(self._words64[_PRELOAD + epoch % 2])

    @property
    def consumed(self) -> int:
        """Every load number below this one has been used up, or dropped."""
        return self.consumed_in(self.epoch)

    def consumed_in(self, epoch: int) -> int:
        """The same in `epoch`, which is the current one or the one before."""
        return max(int(self._words64[_CONSUMED]), self.first_load_of(epoch))

    def restart_sweep(self, loads_per_sweep: int, *, preload: bool = False) -> int:
        """Compute, after it lost its place: the next load it will use is the first of a sweep. Returns that load
        number.

        With `preload` the epoch's loads are those of the pieces that stay on the GPU.

        Each loader drops what it has read ahead; `wait_epoch_seen` returns once all have. Load numbers of the old
        epoch are never used again.
        """
        first = self.first_load
        if loads_per_sweep:
            ahead = self.consumed + self.num_slots
            first = -(-ahead // loads_per_sweep) * loads_per_sweep
        epoch = self.epoch + 1
        self._words64[_FIRST_LOAD + epoch % 2] = first
        self._words64[_PRELOAD + epoch % 2] = preload
        self._words64[_EPOCH] = epoch
        futex.wake(self._address)
        for slot in range(self.num_slots):  # whoever waits for a slot must look at the epoch
            futex.wake(self._address + self._row(slot) * ROW_BYTES)
        return self.first_load

    def wait_epoch_change(self, epoch: int) -> None:
        """Loader with nothing to read: sleep until the epoch is another one, or everybody stops."""
        while self.epoch == epoch and not self.stopped:
            futex.wait(self._address, epoch & 0xFFFFFFFF, _WAIT_SLICE_S)

    def acknowledge_epoch(self, epoch: int, loader: int = 0) -> None:
        """Loader: it reads nothing of an older epoch any more, and what it had put into slots is cleared."""
        self._words64[self._loader_word(loader, _EPOCH_SEEN)] = epoch

    def epoch_seen(self, loader: int = 0) -> int:
        """The epoch that the loader works in."""
        return int(self._words64[self._loader_word(loader, _EPOCH_SEEN)])

    def wait_epoch_seen(self, epoch: int, stopped: Callable[[], bool]) -> None:
        """Compute, and every loader before its first load of an epoch: wait until all loaders work in `epoch`. Before
        that a slot may still be one's that reads into it.
        """
        while any(self.epoch_seen(loader) != epoch for loader in range(self.num_loaders)):
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
        for row in range(1 + self.num_slots + self.num_resident):  # nobody waits for a loader's row
            futex.wake(self._address + row * ROW_BYTES)

    def view(self, slot: int) -> SlotView:
        """A snapshot of a slot's row."""
        row = self._row(slot)
        return SlotView(SlotState(self._state_at(row)), self._load_at(row))
