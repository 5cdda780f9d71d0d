"""Products with the parts of a matrix, each as soon as it is in its slot, as one call of machine code.

Between two products Python would find every cache full of weights: what it does there in 40 us takes 280. So all that
it does for a part is done before the first of them: where the part will be, by which load number it is known (see
`pipo_ray/pipeline/slots.py`), and what multiplies it. Machine code looks whether a part is there, sleeps until it is,
multiplies, and releases the slot. A part that is long in coming, or cannot be read, it leaves to Python, which waits
for it or raises, as for any other.

All threads run this code, and share each part's product among them. Who finds nothing left of a part goes on to the
next one: nobody waits at the end of a small part for a thread that came late, or whose core the loader had meanwhile.
The last one out of a part releases it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.kernel_calls import kernel_calls, library_function
from pipo_ray.compiled.machine import MachineCode
from pipo_ray.pipeline import futex
from pipo_ray.pipeline.slots import CONSUMED_BYTE, LOAD_BYTE, RELEASED_BYTE, RESIDENT, SlotState

FIELDS = ("parts", "steps", "count", "done", "header", "syscall", "clock_gettime", "working", "stopped", "waited")
"""The context of `RUN`, 64-bit words: addresses of the parts and of the steps; how many parts there are, and how many
of them are done, from where it goes on; addresses of the slot table's header and of two functions of the C library; how
many threads are within a part; whether one has left because the next part did not come, so that the others do, too; and
nanoseconds for which who came first slept because a part was not there.
"""

RUN = "run_parts"
_PART_WORDS = 6
"""Address of its row in the slot table, load number, first step, the one behind its last step; how many threads are
within it, and whether it is over.
"""
_STEP_WORDS = 2  # function, context
_LOOKS = 1_000
"""So often a thread looks for the next part when no other is within one any more, some 0.01 to 0.05 ms, and sleeps."""
_PATIENCE_NS = 100_000_000
"""So long it sleeps for one part, at most twice that. Then Python waits, which sees when all are to stop."""

Int64s = npt.NDArray[np.int64]


class Step(NamedTuple):
    """A call of the function at address `function` with the first rows of a matrix, which are at address 0: `words` are
    its context. Elsewhere the word number `address_at` has the address of the first row; and behind other rows each
    word in `moves` is so many bytes further for each of them.
    """

    function: int
    words: tuple[int, ...]
    address_at: int
    moves: Mapping[int, int]

    def at(self, address: int) -> list[int]:
        """The context where the matrix is at `address`."""
        words = list(self.words)
        words[self.address_at] += address
        return words


class RowsProduct(Protocol):
    """Products of the same inputs with rows of a matrix, each into its columns of the same output."""

    def steps(self, rows: int, row_bytes: int) -> list[Step]:
        """The product with so many rows, which are `row_bytes` apart: functions that threads share, as many whatever
        the number of rows. What they point to lives as long as this object.
        """
        ...


def module() -> str:
    """The function that runs parts. All that others see is written in the order of `SlotTable.release`."""
    fields = "\n".join(f"  %{name}_at = getelementptr i8, ptr %context, i64 {8 * n}" for n, name in enumerate(FIELDS))
    addresses = ("parts", "steps", "header", "syscall", "clock_gettime")
    pointers = "\n".join(f"  %{n} = load ptr, ptr %{n}_at" for n in addresses)
    return f"""
{kernel_calls(_PATIENCE_NS)}
declare void @llvm.x86.sse2.pause()

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
  ; Who has released the part behind this one may have been faster.
  atomicrmw umax ptr %consumed_at, i64 %after seq_cst
  atomicrmw umax ptr %released_at, i64 %after seq_cst
  store atomic i32 {SlotState.FREE:d}, ptr %row release, align 4
  call void @futex_wake(ptr %syscall, ptr %row, i64 {futex.WAKE_ALL})
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
  %looks = phi i64 [0, %next], [%looks_next, %look_again], [%looks_next, %sleep]
  %slept = phi i64 [0, %next], [%slept, %look_again], [%slept_now, %sleep]
  %part = call ptr @part(ptr %parts, i64 %index)
  %others_left = load atomic i64, ptr %stopped_at monotonic, align 8
  %all_stay = icmp eq i64 %others_left, 0
  br i1 %all_stay, label %here, label %end
here:
  ; Who sleeps expects the state as it was before all that is looked at here.
  %row = load ptr, ptr %part
  %state = load atomic i32, ptr %row acquire, align 4
  %there = call i1 @is_there(ptr %part)
  br i1 %there, label %enter, label %absent
absent:
  ; Another thread may have released it already.
  %done_now = load atomic i64, ptr %done_at acquire, align 8
  %is_behind = icmp ult i64 %index, %done_now
  br i1 %is_behind, label %pass, label %patient
patient:
  ; Who sleeps while another one computes has to be woken for the next part.
  %at_work = load atomic i64, ptr %working_at monotonic, align 8
  %nobody = icmp eq i64 %at_work, 0
  %one_more = zext i1 %nobody to i64
  %looks_next = add i64 %looks, %one_more
  %again = icmp ult i64 %looks_next, {_LOOKS}
  %awake = select i1 %nobody, i1 %again, i1 true
  br i1 %awake, label %look_again, label %comes
look_again:
  call void @llvm.x86.sse2.pause()
  br label %look
comes:
  ; From these states it gets to READY or FAILED, and whoever brings that about wakes all, whatever they expected. READY
  ; is of another load here.
  %is_free = icmp eq i32 %state, {SlotState.FREE:d}
  %is_filling = icmp eq i32 %state, {SlotState.FILLING:d}
  %on_its_way = or i1 %is_free, %is_filling
  %patient_yet = icmp ult i64 %slept, {_PATIENCE_NS}
  %waits = and i1 %on_its_way, %patient_yet
  br i1 %waits, label %sleep, label %leave
sleep:
  %lies_down = call i64 @time_ns(ptr %clock_gettime)
  call void @futex_wait(ptr %syscall, ptr %row, i32 %state)
  %gets_up = call i64 @time_ns(ptr %clock_gettime)
  %night = sub i64 %gets_up, %lies_down
  %slept_now = add i64 %slept, %night
  br label %look
leave:
  %first_to_leave = cmpxchg ptr %stopped_at, i64 0, i64 1 seq_cst seq_cst
  %tells = extractvalue {{ i64, i1 }} %first_to_leave, 1
  br i1 %tells, label %tell, label %end
tell:
  atomicrmw add ptr %waited_at, i64 %slept seq_cst
  br label %end

enter:
  ; Whoever comes so late that the part is over, or even another one is in its slot, finds nothing left of its steps.
  %within_at = getelementptr i8, ptr %part, i64 32
  %over_at = getelementptr i8, ptr %part, i64 40
  atomicrmw add ptr %working_at, i64 1 seq_cst
  %before = atomicrmw add ptr %within_at, i64 1 seq_cst
  %was_over = load atomic i64, ptr %over_at seq_cst, align 8
  %comes_early = or i64 %before, %was_over
  %is_first = icmp eq i64 %comes_early, 0
  %counted_sleep = select i1 %is_first, i64 %slept, i64 0
  atomicrmw add ptr %waited_at, i64 %counted_sleep seq_cst
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


class Parts(NamedTuple):
    """The parts of a matrix in the order in which they are used: the addresses of their rows in the slot table, and
    load numbers, or RESIDENT; the first row of the matrix that each has, how many it has, and where those lie. Each
    int64 [parts].
    """

    table_row: Int64s
    load: Int64s
    first: Int64s
    rows: Int64s
    address: Int64s


class PartRun:
    """`parts`, whose rows are `row_bytes` apart, multiplied by `product`. `header` is the address of the slot table
    that knows of them.
    """

    def __init__(self, runner: PartRunner, header: int, parts: Parts, product: RowsProduct, row_bytes: int) -> None:
        self._runner, self._product = runner, product  # the steps point to what lives as long as the product
        self._words = _laid_out(header, parts, product, row_bytes)
        self._address = self._words.ctypes.data
        self.done = 0
        """How many parts are multiplied, and released."""

    @property
    def waited_s(self) -> float:
        """Seconds for which threads slept because a part was not there yet."""
        return float(self._words[FIELDS.index("waited")]) / 1e9

    def run(self) -> None:
        """Go on until all parts are done, or the next one does not come, on as many threads as torch computes with.

        Threads sleep afterwards: awake they would take a core from whoever loads.
        """
        self._words[FIELDS.index("stopped")] = 0
        run_on_threads(self._runner.function, self._address, folder=self._runner.folder)
        self.done = int(self._words[FIELDS.index("done")])


def _laid_out(header: int, parts: Parts, product: RowsProduct, row_bytes: int) -> Int64s:
    """The context, and behind it all that it points to. For all parts at once: one by one they took Python 0.02 ms
    each, before the first of them is multiplied.
    """
    num_parts = len(parts.load)
    kinds = {rows: product.steps(rows, row_bytes) for rows in np.unique(parts.rows).tolist()}
    one = next(iter(kinds.values()))
    num_steps, num_words = len(one), len(one[0].words)
    at_steps = len(FIELDS) + _PART_WORDS * num_parts
    at_contexts = at_steps + _STEP_WORDS * num_steps * num_parts
    words = np.zeros(at_contexts + num_words * num_steps * num_parts, np.int64)
    address = words.ctypes.data
    of_each = words[len(FIELDS) : at_steps].reshape(num_parts, _PART_WORDS)
    steps = words[at_steps:at_contexts].reshape(num_parts, num_steps, _STEP_WORDS)
    contexts = words[at_contexts:].reshape(num_parts, num_steps, num_words)
    words[: FIELDS.index("working")] = (
        address + 8 * len(FIELDS), address + 8 * at_steps, num_parts, 0, header,
        library_function("syscall"), library_function("clock_gettime"),
    )  # fmt: skip
    of_each[:, 0], of_each[:, 1] = parts.table_row, parts.load
    of_each[:, 2] = np.arange(0, num_steps * num_parts, num_steps)
    of_each[:, 3] = of_each[:, 2] + num_steps
    places = address + 8 * at_contexts + 8 * num_words * np.arange(num_parts * num_steps)
    steps[:, :, 1] = places.reshape(num_parts, num_steps)
    for rows, made in kinds.items():
        these = slice(None) if len(kinds) == 1 else parts.rows == rows
        for number, step in enumerate(made):
            steps[these, number, 0] = step.function
            contexts[these, number] = step.words
            contexts[these, number, step.address_at] += parts.address[these]
            for word, nbytes in step.moves.items():
                contexts[these, number, word] += parts.first[these] * nbytes
    return words
