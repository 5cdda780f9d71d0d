"""Reading pieces into slots as machine code: threads that wait for a slot, read, and say that it is full.

Between two reads a drive has nothing to do. In Python that takes 35 us, of the 0.9 ms of two reads of 1 MiB that end
together, and as long again for a thread that is woken when a slot becomes free. So all that Python does for a piece is
done before, for several dozen transfers at a time, in a ring from which threads take them in their order. A thread
waits for the piece's slot as `SlotTable.wait_free` does, and fills it as `begin_fill` and `finish_fill` do. What comes
seldom it gives back to Python: reads that fail, descriptors that machine code must not use, and pieces whose end Python
wants to see.

Threads take transfers with a compare-and-swap of `tail`; `bell` counts what may have changed for those that sleep,
`feed` is rung when half of the ring is empty.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from pipo_ray.compiled.kernel_calls import library_function
from pipo_ray.compiled.machine import MachineCode, function_at
from pipo_ray.compiled.reading_words import CALL, DROPPED, ENDED, ENTRY, FILL, FINISH, READ, SHARED, counting, word_at
from pipo_ray.pipeline import futex
from pipo_ray.pipeline.slots import EPOCH_BYTE, LOAD_BYTE, LOADER_BYTE, RELEASED_BYTE, STOP_BYTE, SlotState

READ_TRANSFERS, PART_DONE, PIECE_OVER, ASK, ANSWER = "read_transfers", "part_done", "piece_over", "ask", "answer"

RING = 128
ENTRY_WORDS = 8


def module() -> str:
    """The functions above. Each takes the address of a thread's words."""
    shared = lambda field: word_at("shared", SHARED, field)  # noqa: E731
    fill = lambda field: word_at("fill", FILL, field)  # noqa: E731
    call = lambda field: word_at("call", CALL, field)  # noqa: E731
    free, filling, ready = int(SlotState.FREE), int(SlotState.FILLING), int(SlotState.READY)
    return f"""
{counting()}

; Whether the slot is FREE for this piece now; else sleeps, or finds that the piece is not wanted any more.
define internal i1 @take_slot(ptr %shared, ptr %fill) {{
entry:
  %row_at = {fill("row")}
  %least_at = {fill("least")}
  %load_at = {fill("load")}
  %epoch_at = {fill("epoch")}
  %header_at = {shared("header")}
  %row = load ptr, ptr %row_at
  %least = load i64, ptr %least_at
  %load = load i64, ptr %load_at
  %epoch = load i64, ptr %epoch_at
  %header = load ptr, ptr %header_at
  %released_at = getelementptr i8, ptr %row, i64 {RELEASED_BYTE}
  %epoch_now_at = getelementptr i8, ptr %header, i64 {EPOCH_BYTE}
  %stop_at = getelementptr i8, ptr %header, i64 {STOP_BYTE}
  %since_at = {shared("waiting_since")}
  br label %look
look:
  %mine = phi i1 [false, %entry], [%mine_now, %slept]
  %state = load atomic i32, ptr %row seq_cst, align 4
  %released = load atomic i64, ptr %released_at seq_cst, align 8
  %state_now = load atomic i32, ptr %row seq_cst, align 4
  %is_over = icmp uge i64 %released, %least
  %is_free = icmp eq i32 %state_now, {free}
  %taken = and i1 %is_over, %is_free
  %epoch_now = load atomic i64, ptr %epoch_now_at seq_cst, align 8
  %stop = load atomic i64, ptr %stop_at seq_cst, align 8
  %other = icmp ne i64 %epoch_now, %epoch
  %stopped = icmp ne i64 %stop, 0
  %unwanted = or i1 %other, %stopped
  %ready = or i1 %taken, %unwanted
  br i1 %ready, label %out, label %wait
wait:
  br i1 %mine, label %rest, label %claim
claim:
  %begin = call i64 @now(ptr %shared)
  %claimed = cmpxchg ptr %since_at, i64 0, i64 %begin seq_cst seq_cst
  %won = extractvalue {{ i64, i1 }} %claimed, 1
  br i1 %won, label %remember, label %rest
remember:
  %then = call i64 @reading(ptr %shared, i64 %begin)
  %then_at = {shared("reading_then")}
  store atomic i64 %then, ptr %then_at seq_cst, align 8
  br label %rest
rest:
  %mine_now = phi i1 [true, %wait], [false, %claim], [true, %remember]
  call void @sleep(ptr %shared, ptr %row, i32 %state)
  br label %slept
slept:
  br label %look
out:
  br i1 %mine, label %account, label %settle
account:
  %end = call i64 @now(ptr %shared)
  %since = load atomic i64, ptr %since_at seq_cst, align 8
  %then_now_at = {shared("reading_then")}
  %then_now = load atomic i64, ptr %then_now_at seq_cst, align 8
  %reading = call i64 @reading(ptr %shared, i64 %end)
  %read = sub i64 %reading, %then_now
  %whole = sub i64 %end, %since
  %idle = sub i64 %whole, %read
  %some = icmp sgt i64 %idle, 0
  %waited = select i1 %some, i64 %idle, i64 0
  %waiting_at = {shared("waiting")}
  atomicrmw add ptr %waiting_at, i64 %waited seq_cst
  store atomic i64 0, ptr %since_at seq_cst, align 8
  br label %settle
settle:
  br i1 %unwanted, label %no, label %yes
yes:
  %number_at = {shared("number")}
  %number = load i64, ptr %number_at
  %loader_at = getelementptr i8, ptr %row, i64 {LOADER_BYTE}
  %loads_at = getelementptr i8, ptr %row, i64 {LOAD_BYTE}
  store atomic i64 %number, ptr %loader_at seq_cst, align 8
  store atomic i64 %load, ptr %loads_at seq_cst, align 8
  store atomic i32 {filling}, ptr %row seq_cst, align 4
  ret i1 true
no:
  ret i1 false
}}

; Counts a transfer of the piece as done. The last one ends the piece, or gives that to Python.
define internal i64 @end_part(ptr %shared, ptr %fill) {{
entry:
  %left_at = {fill("left")}
  %left = atomicrmw sub ptr %left_at, i64 1 seq_cst
  %last = icmp eq i64 %left, 1
  br i1 %last, label %whole, label %go_on
whole:
  %row_at = {fill("row")}
  %row = load ptr, ptr %row_at
  %error_at = {fill("error")}
  %error = load atomic i64, ptr %error_at seq_cst, align 8
  %dropped = icmp eq i64 %error, {DROPPED}
  %failed = icmp ne i64 %error, 0
  %asks = icmp eq ptr %row, null
  %python = or i1 %failed, %asks
  br i1 %dropped, label %over, label %kept
kept:
  br i1 %python, label %show, label %full
show:
  ret i64 {FINISH}
full:
  %nbytes_at = {fill("nbytes")}
  %nbytes = load i64, ptr %nbytes_at
  %bytes_at = {shared("bytes")}
  %pieces_at = {shared("pieces")}
  atomicrmw add ptr %bytes_at, i64 %nbytes seq_cst
  atomicrmw add ptr %pieces_at, i64 1 seq_cst
  store atomic i32 {ready}, ptr %row seq_cst, align 4
  call void @wake(ptr %shared, ptr %row, i64 {futex.WAKE_ALL})
  call void @end_piece(ptr %shared)
  br label %over
over:
  %busy_at = {fill("busy")}
  store atomic i64 0, ptr %busy_at seq_cst, align 8
  br label %go_on
go_on:
  ret i64 {ENDED}
}}

define void @{READ_TRANSFERS}(ptr %call) {{
entry:
  %vector = alloca [2 x i64]
  %shared = load ptr, ptr %call
  %head_at = {shared("head")}
  %tail_at = {shared("tail")}
  %bell_at = {shared("bell")}
  %stop_at = {shared("stop")}
  %ring_at = {shared("ring")}
  %ring = load ptr, ptr %ring_at
  %kind_at = {call("kind")}
  br label %next
next:
  %bell = load atomic i32, ptr %bell_at seq_cst, align 8
  %tail = load atomic i64, ptr %tail_at seq_cst, align 8
  %head = load atomic i64, ptr %head_at seq_cst, align 8
  %any = icmp ult i64 %tail, %head
  br i1 %any, label %take, label %nothing
nothing:
  %stop = load atomic i64, ptr %stop_at seq_cst, align 8
  %go_on = icmp eq i64 %stop, 0
  br i1 %go_on, label %doze, label %ended
doze:
  call void @sleep(ptr %shared, ptr %bell_at, i32 %bell)
  br label %next
ended:
  store i64 {ENDED}, ptr %kind_at
  ret void
take:
  ; Nobody writes these words anew before `tail` is behind them.
  %place = urem i64 %tail, {RING}
  %words = mul i64 %place, {ENTRY_WORDS}
  %entry_at = getelementptr i64, ptr %ring, i64 %words
  %fill = load atomic ptr, ptr %entry_at monotonic, align 8
  %descriptor_at = {word_at("entry_at", ENTRY, "descriptor")}
  %address_at = {word_at("entry_at", ENTRY, "address")}
  %nbytes_at = {word_at("entry_at", ENTRY, "nbytes")}
  %offset_at = {word_at("entry_at", ENTRY, "offset")}
  %first_at = {word_at("entry_at", ENTRY, "first")}
  %descriptor = load atomic i64, ptr %descriptor_at monotonic, align 8
  %address = load atomic i64, ptr %address_at monotonic, align 8
  %nbytes = load atomic i64, ptr %nbytes_at monotonic, align 8
  %offset = load atomic i64, ptr %offset_at monotonic, align 8
  %first = load atomic i64, ptr %first_at monotonic, align 8
  %behind = add i64 %tail, 1
  %swapped = cmpxchg ptr %tail_at, i64 %tail, i64 %behind seq_cst seq_cst
  %mine = extractvalue {{ i64, i1 }} %swapped, 1
  br i1 %mine, label %taken, label %next
taken:
  %left = sub i64 %head, %behind
  %hungry = icmp eq i64 %left, {RING // 2}
  br i1 %hungry, label %ring_feed, label %whose
ring_feed:
  %feed_at = {shared("feed")}
  atomicrmw add ptr %feed_at, i32 1 seq_cst
  call void @wake(ptr %shared, ptr %feed_at, i64 1)
  br label %whose
whose:
  %begun_at = {fill("begun")}
  %error_at = {fill("error")}
  %is_first = icmp ne i64 %first, 0
  br i1 %is_first, label %begin, label %follow
begin:
  %row_at = {fill("row")}
  %row = load ptr, ptr %row_at
  %has_place = icmp eq ptr %row, null
  br i1 %has_place, label %begin_it, label %slot
slot:
  %got = call i1 @take_slot(ptr %shared, ptr %fill)
  br i1 %got, label %begin_it, label %drop
begin_it:
  call void @begin_piece(ptr %shared)
  br label %tell
drop:
  store atomic i64 {DROPPED}, ptr %error_at seq_cst, align 8
  br label %tell
tell:
  store atomic i64 1, ptr %begun_at seq_cst, align 8
  %left_at = {fill("left")}
  %parts = load atomic i64, ptr %left_at seq_cst, align 8
  %several = icmp ugt i64 %parts, 1
  br i1 %several, label %tell_others, label %decide
tell_others:
  call void @wake(ptr %shared, ptr %begun_at, i64 {futex.WAKE_ALL})
  br label %decide
follow:
  %begun = load atomic i32, ptr %begun_at seq_cst, align 8
  %not_yet = icmp eq i32 %begun, 0
  br i1 %not_yet, label %follow_later, label %decide
follow_later:
  call void @sleep(ptr %shared, ptr %begun_at, i32 0)
  br label %follow

decide:
  %error = load atomic i64, ptr %error_at seq_cst, align 8
  %wrong = icmp ne i64 %error, 0
  br i1 %wrong, label %part, label %who_reads
who_reads:
  %python_reads = icmp slt i64 %descriptor, 0
  br i1 %python_reads, label %give, label %read
read:
  %length_at = getelementptr i64, ptr %vector, i64 1
  store i64 %address, ptr %vector
  store i64 %nbytes, ptr %length_at
  %preadv2_at = {shared("preadv2")}
  %preadv2 = load ptr, ptr %preadv2_at
  %file = trunc i64 %descriptor to i32
  call void @begin_ask(ptr %shared)
  %count = call i64 %preadv2(i32 %file, ptr %vector, i32 1, i64 %offset, i32 0)
  call void @end_ask(ptr %shared)
  %all = icmp eq i64 %count, %nbytes
  br i1 %all, label %part, label %give
part:
  %kind = call i64 @end_part(ptr %shared, ptr %fill)
  %quiet = icmp eq i64 %kind, {ENDED}
  br i1 %quiet, label %next, label %hand_over
give:
  %found = phi i64 [0, %who_reads], [%count, %read]
  br label %hand_over
hand_over:
  %why = phi i64 [%kind, %part], [{READ}, %give]
  %result = phi i64 [0, %part], [%found, %give]
  %out_count = {call("count")}
  store i64 %result, ptr %out_count
  %out_fill = {call("fill")}
  %out_address = {call("address")}
  %out_nbytes = {call("nbytes")}
  %out_offset = {call("offset")}
  store ptr %fill, ptr %out_fill
  store i64 %address, ptr %out_address
  store i64 %nbytes, ptr %out_nbytes
  store i64 %offset, ptr %out_offset
  store i64 %why, ptr %kind_at
  ret void
}}

define void @{PART_DONE}(ptr %call) {{
  %shared = load ptr, ptr %call
  %fill_at = {call("fill")}
  %fill = load ptr, ptr %fill_at
  %kind = call i64 @end_part(ptr %shared, ptr %fill)
  %kind_at = {call("kind")}
  store i64 %kind, ptr %kind_at
  ret void
}}

define void @{PIECE_OVER}(ptr %call) {{
  %shared = load ptr, ptr %call
  %fill_at = {call("fill")}
  %fill = load ptr, ptr %fill_at
  call void @end_piece(ptr %shared)
  %busy_at = {fill("busy")}
  store atomic i64 0, ptr %busy_at seq_cst, align 8
  ret void
}}

define void @{ASK}(ptr %call) {{
  %shared = load ptr, ptr %call
  call void @begin_ask(ptr %shared)
  ret void
}}

define void @{ANSWER}(ptr %call) {{
  %shared = load ptr, ptr %call
  call void @end_ask(ptr %shared)
  ret void
}}
"""


class ReadingCode:
    """Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._code = MachineCode(module(), folder)
        self.read_transfers = function_at(self._code.address(READ_TRANSFERS))
        self.part_done = self._quick(PART_DONE)
        self.piece_over = self._quick(PIECE_OVER)
        self.ask = self._quick(ASK)
        self.answer = self._quick(ANSWER)

    def _quick(self, name: str) -> Callable[[int], None]:
        # With the GIL: to have it back takes longer than what these do.
        return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self._code.address(name))

    @property
    def functions(self) -> dict[str, int]:
        """Addresses of the C library's, by their names in SHARED."""
        return {name: library_function(name) for name in ("syscall", "preadv2", "clock_gettime")}
