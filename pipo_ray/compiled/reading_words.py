"""The words that threads which read in machine code share (`reading.py`), and what counts with them: time, pieces in
flight, and what the drive is asked for.
"""

from __future__ import annotations

from pipo_ray.compiled.kernel_calls import kernel_calls

SHARED = (
    "head", "tail", "bell", "feed", "stop", "in_flight", "busy_since", "reading", "asked", "bytes", "pieces",
    "waiting_since", "reading_then", "waiting", "asked_at", "header", "ring", "number", "syscall", "preadv2",
    "clock_gettime",
)  # fmt: skip
"""64-bit words that all threads share. How many transfers there have been, and been taken; two futexes; whether to end;
pieces in flight, since when there are any, and nanoseconds for which there were; transfers that the drive is asked for;
bytes and pieces read; since when a thread waits for a slot (0: none does), `reading` as it was then, and nanoseconds of
waiting while nothing was in flight. Then addresses: of the loader's word in the slot table, of the table, of the ring;
the loader's number; and functions of the C library.
"""

ENTRY = ("fill", "descriptor", "address", "nbytes", "offset", "first")
"""A transfer: the address of its piece's words, what to read, and whether it is the piece's first one. With a
descriptor of -1 Python reads.
"""

FILL = ("busy", "begun", "left", "error", "row", "load", "least", "epoch", "nbytes")
"""A piece: whether these words are in use; whether its slot has been taken, or nobody wants it any more; how many
transfers are left; 1 if one failed, or `DROPPED`; the slot's row, its load number, what has to have been released
before (`SlotTable.wait_free`), and the epoch; its bytes. With a row of 0 Python has its place and wants to see its end.
"""

CALL = ("shared", "fill", "address", "nbytes", "offset", "count", "kind")
"""A thread's own words: what it gives to Python, with what `preadv2` returned (0: it was not called), and why (`ENDED`,
`READ`, `FINISH`).
"""

ENDED, READ, FINISH = 0, 1, 2
DROPPED = 2
"""In `error`: the epoch changed before the piece had its slot."""

_WAIT_NS = 500_000_000


def word_at(base: str, names: tuple[str, ...], field: str) -> str:
    """The expression for where the word `field` of `names` is, behind the pointer `base`."""
    return f"getelementptr i64, ptr %{base}, i64 {names.index(field)}"


def counting() -> str:
    """Functions that the others are made of."""
    shared = lambda field: word_at("shared", SHARED, field)  # noqa: E731
    return f"""
{kernel_calls(_WAIT_NS)}
define internal i64 @now(ptr %shared) {{
  %clock_at = {shared("clock_gettime")}
  %clock = load ptr, ptr %clock_at
  %ns = call i64 @time_ns(ptr %clock)
  ret i64 %ns
}}

define internal void @wake(ptr %shared, ptr %word, i64 %count) {{
  %syscall_at = {shared("syscall")}
  %syscall = load ptr, ptr %syscall_at
  call void @futex_wake(ptr %syscall, ptr %word, i64 %count)
  ret void
}}

define internal void @sleep(ptr %shared, ptr %word, i32 %value) {{
  %syscall_at = {shared("syscall")}
  %syscall = load ptr, ptr %syscall_at
  call void @futex_wait(ptr %syscall, ptr %word, i32 %value)
  ret void
}}

; Nanoseconds in which pieces were in flight, until %now.
define internal i64 @reading(ptr %shared, i64 %now) {{
  %reading_at = {shared("reading")}
  %flight_at = {shared("in_flight")}
  %since_at = {shared("busy_since")}
  %before = load atomic i64, ptr %reading_at monotonic, align 8
  %since = load atomic i64, ptr %since_at monotonic, align 8
  %flight = load atomic i64, ptr %flight_at monotonic, align 8
  %busy = icmp ne i64 %flight, 0
  %current = sub i64 %now, %since
  %more = select i1 %busy, i64 %current, i64 0
  %sum = add i64 %before, %more
  ret i64 %sum
}}

; Since when pieces are in flight is written before this one counts, for whoever ends then, and again if it counts
; alone: the one that was in flight may have ended meanwhile.
define internal void @begin_piece(ptr %shared) {{
entry:
  %now = call i64 @now(ptr %shared)
  %flight_at = {shared("in_flight")}
  %since_at = {shared("busy_since")}
  %before = load atomic i64, ptr %flight_at seq_cst, align 8
  %none = icmp eq i64 %before, 0
  br i1 %none, label %first, label %count
first:
  store atomic i64 %now, ptr %since_at seq_cst, align 8
  br label %count
count:
  %found = atomicrmw add ptr %flight_at, i64 1 seq_cst
  %alone = icmp eq i64 %found, 0
  br i1 %alone, label %again, label %end
again:
  store atomic i64 %now, ptr %since_at seq_cst, align 8
  br label %end
end:
  ret void
}}

; While a piece is in flight nobody else changes `busy_since`.
define internal void @end_piece(ptr %shared) {{
entry:
  %now = call i64 @now(ptr %shared)
  %flight_at = {shared("in_flight")}
  %since_at = {shared("busy_since")}
  %since = load atomic i64, ptr %since_at seq_cst, align 8
  %found = atomicrmw sub ptr %flight_at, i64 1 seq_cst
  %last = icmp eq i64 %found, 1
  br i1 %last, label %add, label %end
add:
  %took = sub i64 %now, %since
  %reading_at = {shared("reading")}
  atomicrmw add ptr %reading_at, i64 %took seq_cst
  br label %end
end:
  ret void
}}

; Whoever writes the word looks whether it is still right: so the last one has written what is true.
define internal void @note_asked(ptr %shared) {{
entry:
  %now = call i64 @now(ptr %shared)
  %us = udiv i64 %now, 1000
  %asked_at = {shared("asked")}
  %word_at = {shared("asked_at")}
  %word = load ptr, ptr %word_at
  br label %write
write:
  %asked = load atomic i64, ptr %asked_at seq_cst, align 8
  %any = icmp ne i64 %asked, 0
  %since = select i1 %any, i64 %us, i64 0
  store atomic i64 %since, ptr %word seq_cst, align 8
  %asked_now = load atomic i64, ptr %asked_at seq_cst, align 8
  %any_now = icmp ne i64 %asked_now, 0
  %same = icmp eq i1 %any, %any_now
  br i1 %same, label %end, label %write
end:
  ret void
}}

define internal void @begin_ask(ptr %shared) {{
entry:
  %asked_at = {shared("asked")}
  %before = atomicrmw add ptr %asked_at, i64 1 seq_cst
  %none = icmp eq i64 %before, 0
  br i1 %none, label %note, label %end
note:
  call void @note_asked(ptr %shared)
  br label %end
end:
  ret void
}}

define internal void @end_ask(ptr %shared) {{
  %asked_at = {shared("asked")}
  atomicrmw sub ptr %asked_at, i64 1 seq_cst
  call void @note_asked(ptr %shared)
  ret void
}}
"""
