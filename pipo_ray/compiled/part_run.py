"""Products with the parts of a matrix, each as soon as it is in its slot, as one call of machine code.

Between two products Python would find every cache full of weights: what it does there in 40 us takes 280. So all that
it does for a part is done before the first of them: where the part will be, by which load number it is known (see
`pipo_ray/pipeline/slots.py`), and what multiplies it. Machine code looks whether a part is there, multiplies, and
releases the slot. It never waits: where a part is not there yet, or cannot be read, it comes back, and Python waits
for that part or raises, as for any other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipo_ray.compiled.crew import call_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of, function_at
from pipo_ray.pipeline import futex
from pipo_ray.pipeline.slots import CONSUMED_BYTE, LOAD_BYTE, RELEASED_BYTE, SlotState

FIELDS = ("parts", "steps", "count", "done", "header", "syscall", "lead", "call")
"""The context of `RUN`, 64-bit words: addresses of the parts and of the steps; how many parts there are, and how many
are done, from where it goes on; addresses of the slot table's header, of the C library's `syscall`, of the crew's
`lead_with` and of its words (0: the caller multiplies alone).
"""

RUN = "run_parts"
RESIDENT = -1
"""In place of a load number: the part stays, and is not released."""

_PART_WORDS = 4  # address of its row in the slot table, load number, first step, the one behind its last step
_STEP_WORDS = 2  # function, context

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
    pointers = "\n".join(f"  %{n} = load ptr, ptr %{n}_at" for n in FIELDS if n not in ("count", "done"))
    wake = f"i64 {futex.NUMBER or 0}, ptr %row, i64 {futex.WAKE}, i64 {futex.WAKE_ALL}, ptr null, ptr null, i64 0"
    return f"""
declare i64 @llvm.umax.i64(i64, i64)

define internal void @raise_to(ptr %word, i64 %least) {{
  %before = load atomic i64, ptr %word monotonic, align 8
  %after = call i64 @llvm.umax.i64(i64 %before, i64 %least)
  store atomic i64 %after, ptr %word release, align 8
  ret void
}}

define void @{RUN}(ptr %context) {{
entry:
{fields}
{pointers}
  %count = load i64, ptr %count_at
  %alone = icmp eq ptr %lead, null
  br label %next

next:
  %done = load i64, ptr %done_at
  %more = icmp ult i64 %done, %count
  br i1 %more, label %look, label %end
look:
  %part_offset = mul i64 %done, {8 * _PART_WORDS}
  %part = getelementptr i8, ptr %parts, i64 %part_offset
  %load_at = getelementptr i8, ptr %part, i64 8
  %first_at = getelementptr i8, ptr %part, i64 16
  %stop_at = getelementptr i8, ptr %part, i64 24
  %row = load ptr, ptr %part
  %load = load i64, ptr %load_at
  %first = load i64, ptr %first_at
  %stop = load i64, ptr %stop_at
  %state = load atomic i32, ptr %row acquire, align 4
  %ready = icmp eq i32 %state, {SlotState.READY:d}
  br i1 %ready, label %whose, label %end
whose:
  %resident = icmp eq i64 %load, {RESIDENT}
  br i1 %resident, label %multiply, label %number
number:
  %number_at = getelementptr i8, ptr %row, i64 {LOAD_BYTE}
  %number_here = load atomic i64, ptr %number_at acquire, align 8
  %right = icmp eq i64 %number_here, %load
  br i1 %right, label %multiply, label %end

multiply:
  %step = phi i64 [%first, %whose], [%first, %number], [%step_next, %stepped]
  %left = icmp ult i64 %step, %stop
  br i1 %left, label %call_step, label %multiplied
call_step:
  %step_offset = mul i64 %step, {8 * _STEP_WORDS}
  %function_at = getelementptr i8, ptr %steps, i64 %step_offset
  %argument_at = getelementptr i8, ptr %function_at, i64 8
  %function = load ptr, ptr %function_at
  %argument = load ptr, ptr %argument_at
  br i1 %alone, label %call_alone, label %call_crew
call_alone:
  call void %function(ptr %argument)
  br label %stepped
call_crew:
  %called_function = getelementptr i8, ptr %call, i64 8
  %called_argument = getelementptr i8, ptr %call, i64 16
  store ptr %function, ptr %called_function
  store ptr %argument, ptr %called_argument
  call void %lead(ptr %call)
  br label %stepped
stepped:
  %step_next = add i64 %step, 1
  br label %multiply

multiplied:
  br i1 %resident, label %passed, label %release
release:
  %after = add i64 %load, 1
  %consumed_at = getelementptr i8, ptr %header, i64 {CONSUMED_BYTE}
  %released_at = getelementptr i8, ptr %row, i64 {RELEASED_BYTE}
  call void @raise_to(ptr %consumed_at, i64 %after)
  call void @raise_to(ptr %released_at, i64 %after)
  store atomic i32 {SlotState.FREE:d}, ptr %row release, align 4
  call i64 (i64, ...) %syscall({wake})
  br label %passed
passed:
  %done_next = add i64 %done, 1
  store i64 %done_next, ptr %done_at
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
        self._crew = call_on_threads(runner.folder)
        self._words = self._laid_out(header, parts)
        self.done = 0
        """How many parts are multiplied, and released."""

    def run(self) -> None:
        """Go on until all parts are done, or the next one is not there, on as many threads as torch computes with.

        Threads sleep behind every product, as where parts are multiplied one by one: awake they would take a core from
        whoever loads.
        """
        address = ctypes.addressof(self._words)
        if self._crew is None:
            function_at(self._runner.function)(address)
        else:
            self._crew[0].run_steps(self._runner.function, address, awake=False)
        self.done = self._words[FIELDS.index("done")]

    def _laid_out(self, header: int, parts: Sequence[Part]) -> Any:
        """The context, and behind it all that it points to."""
        lead, call = (0, 0) if self._crew is None else (self._crew[1], ctypes.addressof(self._crew[2]))
        steps = [step for part in parts for step in part.steps]
        at_steps = len(FIELDS) + _PART_WORDS * len(parts)
        at_contexts = at_steps + _STEP_WORDS * len(steps)
        words = context_of([0] * (at_contexts + sum(len(context) for _, context in steps)))
        address = ctypes.addressof(words)
        filled = [address + 8 * len(FIELDS), address + 8 * at_steps, len(parts), 0, header, self._runner.syscall]
        filled += (lead, call)
        first = 0
        for part in parts:
            stop = first + len(part.steps)
            filled += (part.row, part.load, first, stop)
            first = stop
        place = address + 8 * at_contexts
        for function, context in steps:
            filled += (function, place)
            place += 8 * len(context)
        for _, context in steps:
            filled += context
        words[:] = filled
        return words
