"""Products with the parts of a matrix, each as soon as it is in its slot, as one call of machine code.

Between two products Python would find every cache full of weights: what it does there in 40 us takes 280. So all that
it does for a part is done before the first of them: where the part will be, by which load number it is known (see
`pipo_ray/pipeline/slots.py`), and what multiplies it. Machine code looks whether a part is there, multiplies, and
releases the slot. It never sleeps: where a part is not there yet, or cannot be read, it comes back, and Python waits
for that part or raises, as for any other.

All threads run this code, and share each part's product among them. Who finds nothing left of a part goes on to the
next one: nobody waits at the end of a small part for a thread that came late, or whose core the loader had meanwhile.
The last one out of a part releases it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.pipeline import futex
from pipo_ray.pipeline.slots import CONSUMED_BYTE, LOAD_BYTE, RELEASED_BYTE, SlotState

FIELDS = ("parts", "steps", "count", "done", "header", "syscall", "working", "stopped")
"""The context of `RUN`, 64-bit words: addresses of the parts and of the steps; how many parts there are, and how many
of them are done, from where it goes on; addresses of the slot table's header and of the C library's `syscall`; how many
threads are within a part; and whether one has left because the next part was not there, so that the others do, too.
"""

RUN = "run_parts"
RESIDENT = -1
"""In place of a load number: the part stays, and is not released."""

_PART_WORDS = 6
"""Address of its row in the slot table, load number, first step, the one behind its last step; how many threads are
within it, and whether it is over.
"""
_STEP_WORDS = 2  # function, context
_LOOKS = 1_000
"""So often a thread looks for the next part when no other is within one any more, some 0.01 to 0.05 ms, and leaves.
Coming back takes Python more: its caches are full of weights.
"""

Step = tuple[int, tuple[int, ...]]
"""The address of a function, and its context's words."""


class RowsProduct(Protocol):
    """Products of the same inputs with rows of a matrix, each into its columns of the same output."""

    def steps(self, start: int, stop: int, address: int, row_bytes: int) -> list[Step]:
        """The product with rows `start:stop`, which begin at `address` and are `row_bytes` apart: functions that
        threads share. What they point to lives as long as this object, and as the rows do.
        """
        ...


def module() -> str:
    """The function that runs parts. All that others see is written in the order of `SlotTable.release`."""
    fields = "\n".join(f"  %{name}_at = getelementptr i8, ptr %context, i64 {8 * n}" for n, name in enumerate(FIELDS))
    pointers = "\n".join(f"  %{n} = load ptr, ptr %{n}_at" for n in ("parts", "steps", "header", "syscall"))
    wake = f"i64 {futex.NUMBER or 0}, ptr %row, i64 {futex.WAKE}, i64 {futex.WAKE_ALL}, ptr null, ptr null, i64 0"
    return f"""
declare i64 @llvm.umax.i64(i64, i64)
declare void @llvm.x86.sse2.pause()

define internal void @raise_to(ptr %word, i64 %least) {{
  %before = load atomic i64, ptr %word monotonic, align 8
  %after = call i64 @llvm.umax.i64(i64 %before, i64 %least)
  store atomic i64 %after, ptr %word release, align 8
  ret void
}}

define internal ptr @part(ptr %parts, i64 %index) {{
  %offset = mul i64 %index, {8 * _PART_WORDS}
  %part = getelementptr i8, ptr %parts, i64 %offset
  ret ptr %part
}}

define internal i1 @is_there(ptr %part) {{
entry:
  %load_at = getelementptr i8, ptr %part, i64 8
  %row = load ptr, ptr %part
  %load = load i64, ptr %load_at
  ; The number before the state: a READY of the load before, and the number that is written behind its end, are not one.
  %number_at = getelementptr i8, ptr %row, i64 {LOAD_BYTE}
  %number_here = load atomic i64, ptr %number_at acquire, align 8
  %state = load atomic i32, ptr %row acquire, align 4
  %ready = icmp eq i32 %state, {SlotState.READY:d}
  br i1 %ready, label %whose, label %no
whose:
  %resident = icmp eq i64 %load, {RESIDENT}
  %same = icmp eq i64 %number_here, %load
  %right = or i1 %resident, %same
  br i1 %right, label %yes, label %no
yes:
  ret i1 true
no:
  ret i1 false
}}

; Takes what threads have left of each of the part's steps.
define internal void @multiply(ptr %part, ptr %steps) {{
entry:
  %first_at = getelementptr i8, ptr %part, i64 16
  %stop_at = getelementptr i8, ptr %part, i64 24
  %first = load i64, ptr %first_at
  %stop = load i64, ptr %stop_at
  br label %next
next:
  %step = phi i64 [%first, %entry], [%following, %call_step]
  %left = icmp ult i64 %step, %stop
  br i1 %left, label %call_step, label %end
call_step:
  %offset = mul i64 %step, {8 * _STEP_WORDS}
  %function_at = getelementptr i8, ptr %steps, i64 %offset
  %argument_at = getelementptr i8, ptr %function_at, i64 8
  %function = load ptr, ptr %function_at
  %argument = load ptr, ptr %argument_at
  call void %function(ptr %argument)
  %following = add i64 %step, 1
  br label %next
end:
  ret void
}}

define internal void @release(ptr %part, ptr %header, ptr %syscall) {{
entry:
  %load_at = getelementptr i8, ptr %part, i64 8
  %row = load ptr, ptr %part
  %load = load i64, ptr %load_at
  %resident = icmp eq i64 %load, {RESIDENT}
  br i1 %resident, label %end, label %free
free:
  %after = add i64 %load, 1
  %consumed_at = getelementptr i8, ptr %header, i64 {CONSUMED_BYTE}
  %released_at = getelementptr i8, ptr %row, i64 {RELEASED_BYTE}
  call void @raise_to(ptr %consumed_at, i64 %after)
  call void @raise_to(ptr %released_at, i64 %after)
  store atomic i32 {SlotState.FREE:d}, ptr %row release, align 4
  call i64 (i64, ...) %syscall({wake})
  br label %end
end:
  ret void
}}

define void @{RUN}(ptr %context) {{
entry:
{fields}
{pointers}
  %count = load i64, ptr %count_at
  %begun = load atomic i64, ptr %done_at acquire, align 8
  br label %next

next:
  %index = phi i64 [%begun, %entry], [%passed, %pass]
  %more = icmp ult i64 %index, %count
  br i1 %more, label %look, label %end
look:
  %looks = phi i64 [0, %next], [%looks_next, %look_again]
  %part = call ptr @part(ptr %parts, i64 %index)
  %others_left = load atomic i64, ptr %stopped_at monotonic, align 8
  %all_stay = icmp eq i64 %others_left, 0
  br i1 %all_stay, label %here, label %end
here:
  %there = call i1 @is_there(ptr %part)
  br i1 %there, label %enter, label %absent
absent:
  ; Another thread may have released it already.
  %done_now = load atomic i64, ptr %done_at acquire, align 8
  %is_behind = icmp ult i64 %index, %done_now
  br i1 %is_behind, label %pass, label %patient
patient:
  ; Who left while another one computes would have it go on alone, or come back as well.
  %at_work = load atomic i64, ptr %working_at monotonic, align 8
  %nobody = icmp eq i64 %at_work, 0
  %one_more = zext i1 %nobody to i64
  %looks_next = add i64 %looks, %one_more
  %again = icmp ult i64 %looks_next, {_LOOKS}
  br i1 %again, label %look_again, label %leave
look_again:
  call void @llvm.x86.sse2.pause()
  br label %look
leave:
  store atomic i64 1, ptr %stopped_at monotonic, align 8
  br label %end

enter:
  ; Whoever comes so late that the part is over, or even another one is in its slot, finds nothing left of its steps.
  %within_at = getelementptr i8, ptr %part, i64 32
  %over_at = getelementptr i8, ptr %part, i64 40
  atomicrmw add ptr %working_at, i64 1 seq_cst
  atomicrmw add ptr %within_at, i64 1 seq_cst
  call void @multiply(ptr %part, ptr %steps)
  %within = atomicrmw sub ptr %within_at, i64 1 seq_cst
  atomicrmw sub ptr %working_at, i64 1 seq_cst
  %is_last = icmp eq i64 %within, 1
  br i1 %is_last, label %out, label %pass
out:
  store atomic i64 1, ptr %over_at seq_cst, align 8
  br label %advance

advance:
  ; In their order: each by the one that counts it as done.
  %done = load atomic i64, ptr %done_at seq_cst, align 8
  %any = icmp ult i64 %done, %count
  br i1 %any, label %ask, label %pass
ask:
  %oldest = call ptr @part(ptr %parts, i64 %done)
  %oldest_over_at = getelementptr i8, ptr %oldest, i64 40
  %oldest_over = load atomic i64, ptr %oldest_over_at seq_cst, align 8
  %is_over = icmp ne i64 %oldest_over, 0
  br i1 %is_over, label %count_it, label %pass
count_it:
  %done_next = add i64 %done, 1
  %counted = cmpxchg ptr %done_at, i64 %done, i64 %done_next seq_cst seq_cst
  %mine = extractvalue {{ i64, i1 }} %counted, 1
  br i1 %mine, label %release_it, label %advance
release_it:
  call void @release(ptr %oldest, ptr %header, ptr %syscall)
  br label %advance

pass:
  %passed = add i64 %index, 1
  br label %next
end:
  ret void
}}
"""


class PartRunner:
    """Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._code = MachineCode(module(), folder)
        self.function = self._code.address(RUN)
        self.syscall = ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0


class Part(NamedTuple):
    """A part that is known by its row in the slot table, an address, and its load number, or RESIDENT; and what is done
    with it.
    """

    row: int
    load: int
    steps: Sequence[Step]


class PartRun:
    """`parts` in the order in which they are used. `header` is the address of the slot table that knows of them. What
    their steps point to has to live as long.
    """

    def __init__(self, runner: PartRunner, header: int, parts: Sequence[Part]) -> None:
        self._runner = runner
        self._words = self._laid_out(header, parts)
        self.done = 0
        """How many parts are multiplied, and released."""

    def run(self) -> None:
        """Go on until all parts are done, or the next one is not there, on as many threads as torch computes with.

        Threads sleep afterwards: awake they would take a core from whoever loads.
        """
        self._words[FIELDS.index("stopped")] = 0
        run_on_threads(self._runner.function, ctypes.addressof(self._words), folder=self._runner.folder)
        self.done = self._words[FIELDS.index("done")]

    def _laid_out(self, header: int, parts: Sequence[Part]) -> Any:
        """The context, and behind it all that it points to."""
        steps = [step for part in parts for step in part.steps]
        at_steps = len(FIELDS) + _PART_WORDS * len(parts)
        at_contexts = at_steps + _STEP_WORDS * len(steps)
        words = context_of([0] * (at_contexts + sum(len(context) for _, context in steps)))
        address = ctypes.addressof(words)
        filled = [address + 8 * len(FIELDS), address + 8 * at_steps, len(parts), 0, header, self._runner.syscall, 0, 0]
        first = 0
        for part in parts:
            stop = first + len(part.steps)
            filled += (part.row, part.load, first, stop, 0, 0)
            first = stop
        place = address + 8 * at_contexts
        for function, context in steps:
            filled += (function, place)
            place += 8 * len(context)
        for _, context in steps:
            filled += context
        words[:] = filled
        return words
