"""A loader whose threads wait for slots and read in machine code (`compiled/reading.py`)."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipo_ray.compiled.machine import context_of
from pipo_ray.compiled.reading import ENTRY_WORDS, RING, ReadingCode
from pipo_ray.compiled.reading_words import CALL, ENDED, FILL, FINISH, READ, SHARED
from pipo_ray.compiled.support import compiler_obstacle
from pipo_ray.errors import StoreError
from pipo_ray.pipeline import futex
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.loader import Done, Loader, LoaderCounters, as_pipo_error
from pipo_ray.pipeline.slots import StoppedError
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.plan.pieces import Piece

_FILLS = 2 * RING
_MOST_PARTS = RING // 4
_FEED_S = 0.05
_WORD = {name: at for at, name in enumerate(SHARED)}
_OF_FILL = {name: at for at, name in enumerate(FILL)}
_OF_CALL = {name: at for at, name in enumerate(CALL)}


def make_loader(drive: Drive, *what: Any, folder: Path | None, trace: TraceWriter = NO_TRACE, **options: Any) -> Loader:
    """The loader for this machine; see `Loader` for the rest, and `CompiledLoader` for `folder`.

    What gives way to others, and what is traced, is Python's: both are about what lies between two reads. And the order
    of plain stores is relied on as x86-64 has it.
    """
    known = platform.machine() == "x86_64" and futex.NUMBER is not None
    if known and type(drive) is Drive and not trace.enabled and compiler_obstacle() is None:
        return CompiledLoader(drive, *what, folder=folder, **options)
    return Loader(drive, *what, trace=trace, **options)


@dataclass
class _Fill:
    """What Python knows of a piece that is on its way."""

    piece: Piece
    done: Done
    memory: memoryview
    error: Exception | None = None


class CompiledLoader(Loader):
    """See `Loader`. Takes no trace; `folder` is where machine code is kept.

    Pieces are handed out a hundred transfers ahead of what has been read, before their slots are free. Not those that
    are checked when they have been read, and residents: they are Python's until their slot is free, and from their last
    byte on.
    """

    def __init__(self, *what: Any, folder: Path | None = None, **options: Any) -> None:
        super().__init__(*what, **options)
        self._code = ReadingCode(folder)
        self._shared = context_of([0] * len(SHARED))
        self._ring = context_of([0] * (RING * ENTRY_WORDS))
        self._words = context_of([0] * (_FILLS * len(FILL)))
        self._fills: list[_Fill | None] = [None] * _FILLS
        self._next_fill = 0
        known = {
            "asked_at": self._table.asked_address(self._number), "header": self._table.header_address,
            "ring": ctypes.addressof(self._ring), "number": self._number, **self._code.functions,
        }  # fmt: skip
        for name, value in known.items():
            self._shared[_WORD[name]] = value
        self._at_words, self._at_shared = ctypes.addressof(self._words), ctypes.addressof(self._shared)

    def stop(self) -> None:
        """End all threads; the table must have been stopped."""
        self._dispatcher.join()
        self._shared[_WORD["stop"]] = 1
        self._ring_bell()
        for thread in self._readers:
            thread.join()
        self._drive.close()

    # -- handing out
    # --------------------------------------------------------------------------------------------------------

    def _fill_slot(self, load: int, piece: Piece, epoch: int, first_load: int) -> None:
        slot = self._loads.slot(load)
        if self._checksums is not None and not self._checksums.is_checked(piece):
            # A piece is announced to the checksums when its read begins: after the wait for its slot.
            super()._fill_slot(load, piece, epoch, first_load)
            return
        if self._table.is_loaded(slot, load):
            return
        before = self._loads.load_before(load, first_load)
        place = (self._table.slot_address(slot), load, 0 if before is None else before + 1, epoch)
        self._hand_out(piece, self._slots[slot], self._slot_filled(slot, load), place, epoch)

    def _read(self, piece: Piece, memory: memoryview, done: Done, labels: Mapping[str, object]) -> None:
        self._hand_out(piece, memory, done, (0, 0, 0, 0), None)

    def _hand_out(
        self, piece: Piece, memory: memoryview, done: Done, place: tuple[int, int, int, int], epoch: int | None
    ) -> None:
        """Put the piece's transfers into the ring; `place` are `row`, `load`, `least` and `epoch` of its words. Raises
        StoppedError where there is no room before `epoch` is over; None: what has been begun waits for it.
        """
        step = max(self._transfer_bytes, -(-piece.read_bytes // _MOST_PARTS // 4096) * 4096)
        starts = range(0, piece.read_bytes, step)
        self._wait_for_room(len(starts), epoch)
        if place[0] == 0 and self._checksums is not None:
            self._checksums.expect(piece)
        descriptor = self._descriptor(piece)
        number = self._next_fill
        self._next_fill = (number + 1) % _FILLS
        self._fills[number] = _Fill(piece, done, memory[: piece.read_bytes])
        at = number * len(FILL)
        self._words[at : at + len(FILL)] = [1, 0, len(starts), 0, *place, piece.read_bytes]
        fill = self._at_words + 8 * at
        address = np.frombuffer(memory, np.uint8).ctypes.data
        head = self._shared[_WORD["head"]]
        for transfer, start in enumerate(starts, head):
            entry = transfer % RING * ENTRY_WORDS
            nbytes = min(step, piece.read_bytes - start)
            self._ring[entry : entry + 6] = [
                fill, descriptor, address + start, nbytes, piece.file_offset + start, int(start == 0)
            ]  # fmt: skip
        self._shared[_WORD["head"]] = head + len(starts)
        self._ring_bell()

    def _descriptor(self, piece: Piece) -> int:
        if not self._drive.direct:
            return -1
        try:
            return self._drive.descriptor(piece.file)
        except StoreError:
            return -1  # who reads says so

    def _wait_for_room(self, parts: int, epoch: int | None) -> None:
        """Wait until `parts` transfers have room, and the next piece's words are not in use."""
        busy = self._next_fill * len(FILL) + _OF_FILL["busy"]
        while True:
            fed = self._shared[_WORD["feed"]] & 0xFFFFFFFF
            waiting = self._shared[_WORD["head"]] - self._shared[_WORD["tail"]]
            if waiting + parts <= RING and not self._words[busy]:
                return
            if self._table.stopped or epoch not in (None, self._table.epoch):
                raise StoppedError
            futex.wait(self._at_shared + 8 * _WORD["feed"], fed, _FEED_S)

    def _ring_bell(self) -> None:
        self._shared[_WORD["bell"]] = (self._shared[_WORD["bell"]] + 1) & 0x7FFFFFFF
        futex.wake(self._at_shared + 8 * _WORD["bell"])

    def _wait_idle(self) -> None:
        while self._shared[_WORD["tail"]] < self._shared[_WORD["head"]] or any(self._words[:: len(FILL)]):
            time.sleep(0.0005)

    # -- reading
    # ------------------------------------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        call = context_of([0] * len(CALL))
        call[0], address = self._at_shared, ctypes.addressof(call)
        while True:
            self._code.read_transfers(address)
            kind = call[_OF_CALL["kind"]]
            if kind == ENDED:
                return
            at = (call[_OF_CALL["fill"]] - self._at_words) // 8
            fill = self._fills[at // len(FILL)]
            assert fill is not None
            if kind == READ:
                error = self._read_in_python(fill, call)
                if error is not None:
                    fill.error = fill.error or error
                    self._words[at + _OF_FILL["error"]] = 1
                self._code.part_done(address)
                kind = call[_OF_CALL["kind"]]
            if kind == FINISH:
                self._finish(fill, address)

    def _read_in_python(self, fill: _Fill, call: Any) -> Exception | None:
        """Read a transfer that machine code could not, or must not, read."""
        _, _, address, nbytes, offset, count, _ = call
        memory = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
        self._code.ask(ctypes.addressof(call))
        try:
            self._drive.read_into(memory, fill.piece.file, offset)
            if count < 0 and self._drive.direct:  # else it was O_DIRECT that was refused
                self._drive.retries += 1
            return None
        except Exception as failure:  # whatever it is, the compute worker must hear of it instead of waiting
            return as_pipo_error(failure, fill.piece)
        finally:
            self._code.answer(ctypes.addressof(call))
            if not self._drive.direct:
                self._table.note_buffered(self._number)

    def _finish(self, fill: _Fill, call: int) -> None:
        fill.done(self._checked(fill.piece, fill.memory, fill.error))
        self._code.piece_over(call)

    # -- counters
    # -------------------------------------------------------------------------------------------------------

    def snapshot(self) -> LoaderCounters:
        """The counters now."""
        found = super().snapshot()
        shared = self._shared
        return replace(
            found,
            bytes_read=found.bytes_read + shared[_WORD["bytes"]],
            pieces_read=found.pieces_read + shared[_WORD["pieces"]],
        )

    def _reading_ns(self, now: int) -> int:
        shared = self._shared
        reading, since, flying = (int(shared[_WORD[name]]) for name in ("reading", "busy_since", "in_flight"))
        return reading + (max(0, now - since) if flying else 0)

    def _reading_s(self) -> float:
        return self._reading_ns(time.perf_counter_ns()) / 1e9

    def _waiting_s(self) -> float:
        shared, now = self._shared, time.perf_counter_ns()
        waited, since, then = (int(shared[_WORD[name]]) for name in ("waiting", "waiting_since", "reading_then"))
        if since:
            waited += max(0, now - since - (self._reading_ns(now) - then))
        return self._dispatcher_waiting_s() + waited / 1e9
