"""Threads that compute together with the one that calls them, and in between bring near what is multiplied next.

A product of one row with int4 weights is bound by memory, and between two of them Python, norms and attention take a
seventh of a sweep, in which memory would idle. So threads that have done their part go on with what comes next (its
first bytes, as many as the caller says), until they are called again; that call finds them awake. Then they wait in a
short loop, and then they sleep.

A thread's state is one word, its futex as well (man 2 futex). Nobody waits for a thread that has not begun: if the
system has it wait for a core, the others do its part. So the crew is no slower than the caller alone, and a process
that was forked, which has no such threads, computes as well.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipo_ray.compiled.machine import MachineCode, context_of, function_at
from pipo_ray.compiled.steps import Steps

AHEAD_RANGES = 2
"""So many pieces of memory are brought near after a call."""

_RESTING, _CALLED, _WORKING, _AWAITED, _ASLEEP, _DISMISSED = range(6)
_HEADER = (
    "function", "context", "called", "number", "threads", "syscall", "crowded_until", "disturbance", "half",
    "crowded_calls",
)  # fmt: skip
_AHEAD = ("pauses", *(f"{what}{number}" for number in range(AHEAD_RANGES) for what in ("start", "bytes")))
_WORDS = 16  # of the header, and of each line behind it: two cache lines, which processors fetch together
_HALF_WORDS = _WORDS // 2
"""Behind the header is a line with what comes next, twice: one half is written while a thread may read the other. A
thread that finds no newer call behind its reading knows that nobody has written there (a sequence lock).
"""
_STEP = 4096  # bytes brought near between two looks at one's state
_STREAMS, _RUN = 4, 16
"""A thread takes a step in turns from each of four runs of 16: so one core reads 1.4 times as fast as from one place,
because the processor's own reading ahead begins anew with every page.
"""
_LINE = 64
_PAUSES = 20_000
"""Of the loop before sleeping: some 0.5 ms, more than lies between two products of a layer."""
_WAIT_PAUSES = 5_000
"""The caller loops so often for a thread that has begun, 0.12 ms; then another process has its core."""
_CROWDED_PAUSES = 200
"""Of the caller where that was so lately: the core that it leaves may be the one that the thread waits for."""
_CROWDED_CALLS, _MOST_CROWDED_CALLS, _AGAIN_CALLS = 64, 512, 64
"""For so many calls after that, half a sweep, threads sleep as soon as they can: who sleeps is let in before who does
not. If it is crowded again within so few calls, twice as many, up to a limit.
"""
_FORGOTTEN = 7
_DISTURBED, _CROWDED, _CALM = 1 << 9, 1 << 15, 3 << 13
"""The share of calls for which a thread's core was another's, of those lately (the last 2^7 or so), in 2^-16: it is
crowded above a half, and what it counts from again afterwards is three eighths. What Ray does between two tokens is a
tenth, and giving way for it took a fifth longer; a process that computes is all of them within a sweep.
"""


class Crew:
    """`num_threads` threads; `folder` is where their machine code is kept. They end with `dismiss`."""

    def __init__(self, num_threads: int, folder: Path | None = None) -> None:
        self.num_threads = num_threads
        self._code = MachineCode(_source(), folder)
        syscall = ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value
        size = 8 * _WORDS * (2 + num_threads)
        self._memory = ctypes.create_string_buffer(size + _LINE)
        address = ctypes.addressof(self._memory)
        self._address = address + -address % _LINE
        self._words = (ctypes.c_int64 * (size // 8)).from_address(self._address)
        self._words[_HEADER.index("syscall")], self._words[_HEADER.index("threads")] = syscall or 0, num_threads
        self._work = function_at(self._code.address("work"))
        self._lead = function_at(self._code.address("lead"))
        self._dismiss = function_at(self._code.address("dismiss"))
        self._busy = threading.Lock()
        self._ahead: deque[object] = deque(maxlen=4)
        """What the threads may be reading: one that is kept from its core may still be some calls behind."""
        self._threads, self._contexts = [], []
        for number in range(num_threads):
            context = context_of([self._address, number])
            arguments = (ctypes.addressof(context),)
            self._contexts.append(context)
            thread = threading.Thread(target=self._work, args=arguments, name=f"crew {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def call(
        self, function: int, context: int, num_threads: int, ahead: Sequence[tuple[torch.Tensor, int]] | None = ()
    ) -> None:
        """Run the function at `function` with the context at `context` here and on `num_threads` of the threads, or on
        fewer if they do not come in time, and wait. Afterwards they bring near the first bytes, so many, of up to
        AHEAD_RANGES tensors `ahead`, and stay awake a little; with none of them they sleep; None: as the last time.
        Whoever calls while another call runs is alone.
        """
        if not self._busy.acquire(blocking=False):
            function_at(function)(context)
            return
        try:
            words = self._words
            words[0], words[1], words[2] = function, context, min(num_threads, self.num_threads)
            if ahead is not None:
                self._come_near(ahead, _PAUSES if ahead else 0)
            self._lead(self._address)
            if ahead is not None:
                self._ahead.append(ahead)
        finally:
            self._busy.release()

    def run_steps(self, function: int, context: int) -> None:
        """Run here what calls the threads itself (`deferred`), again and again: in between they stay awake."""
        with self._busy:
            self._come_near((), _PAUSES)
            function_at(function)(context)

    def _come_near(self, ahead: Sequence[tuple[torch.Tensor, int]], pauses: int) -> None:
        """What the threads do behind the next call."""
        words = self._words
        ranges = [number for memory, nbytes in ahead for number in (memory.data_ptr(), nbytes)]
        ranges += [0] * (2 * AHEAD_RANGES - len(ranges))
        half = 1 - words[_HALF_AT]
        first = _WORDS + _HALF_WORDS * half
        words[first : first + len(_AHEAD)] = [pauses, *ranges]
        words[_HALF_AT] = half

    def deferred(self, function: int, context: int, num_threads: int) -> tuple[int, Any]:
        """See `deferred_on_threads`."""
        words = [self._address, function, context, min(num_threads, self.num_threads)]
        return self._code.address("lead_with"), context_of(words)

    def dismiss(self) -> None:
        """End the threads; later calls are computed by the caller alone."""
        with self._busy:
            self._words[_HEADER.index("called")] = self.num_threads = 0
            self._dismiss(self._address)
        for thread in self._threads:
            thread.join()


_HALF_AT = _HEADER.index("half")


_lock = threading.Lock()
_crews: list[Crew] = []


def deferred_on_threads(function: int, context: int, folder: Path | None = None) -> tuple[int, Any] | None:
    """A function and its context: whoever calls it, a thread without Python too, runs `function` with `context` as
    `run_on_threads` does, on half as many threads: who defers a call has something else to do meanwhile. Only one such
    call, and none of `run_on_threads`, may run at a time; what is returned has to stay until it is over. None where
    that is one thread alone: the function itself does then.
    """
    others = (torch.get_num_threads() + 1) // 2 - 1
    if not others:
        return None
    _enlist(others, folder)
    return _crews[0].deferred(function, context, others)


def add_on_threads(
    steps: Steps, function: int, context: Any, counter: int, folder: Path | None, *owned: object
) -> tuple[Any, int]:
    """A step that runs `function` with `context`, whose word number `counter` is set to 0 before, on as many threads as
    torch computes with. Returns the step's words, of which number CALLED_AT is how many threads it calls, and how many
    there are to call. For `run_steps`.
    """
    others = torch.get_num_threads() - 1
    _enlist(others, folder)
    lead, words = _crews[0].deferred(function, ctypes.addressof(context), others)
    steps.add(lead, words, ctypes.addressof(context) + 8 * counter, _crews[0], context, *owned)
    return words, others


def run_steps(function: int, context: int) -> None:
    """Run a list of steps (`steps.py`), some of which call the threads."""
    _crews[0].run_steps(function, context)


CALLED_AT = 3


def run_on_threads(
    function: int, context: int, ahead: Sequence[tuple[torch.Tensor, int]] | None = (), folder: Path | None = None
) -> None:
    """Run the function on as many threads as torch computes with, this one included; see `Crew.call`. The process has
    one crew.
    """
    others = torch.get_num_threads() - 1
    if not _crews or _crews[0].num_threads < others:
        if not others:
            function_at(function)(context)
            return
        _enlist(others, folder)
    _crews[0].call(function, context, others, ahead)


def _enlist(num_threads: int, folder: Path | None) -> None:
    """At least so many threads."""
    with _lock:
        if not _crews or _crews[0].num_threads < num_threads:
            crew = Crew(num_threads, folder)
            _crews.insert(0, crew)
            for smaller in _crews[1:]:
                smaller.dismiss()


@atexit.register
def _dismiss_all() -> None:
    """Threads in machine code must not see it unloaded."""
    for crew in _crews:
        crew.dismiss()


def _source() -> str:
    """`lead`, `dismiss` (context: the memory's address), `work` (context: the address, the thread's number) and
    `lead_with` (context: the address, a function, its context, the number of threads to call).
    """
    places = "\n".join(f"  %{name} = getelementptr i8, ptr %crew, i64 {8 * at}" for at, name in enumerate(_HEADER))
    here = "\n".join(
        f"  %{name} = getelementptr i8, ptr %half_place, i64 {8 * at}\n"
        f"  %{name}_now = load atomic i64, ptr %{name} acquire, align 8"
        for at, name in enumerate(_AHEAD)
    )
    # Loads: what asks for memory and waits for nothing (PREFETCHT1) is dropped as soon as a few are on their way.
    reads = "\n".join(
        f"  %line{at} = getelementptr i8, ptr %page, i64 {at}\n    %read{at} = load volatile i64, ptr %line{at}\n"
        f"    %next{at} = getelementptr i8, ptr %page, i64 {at + _STEP}\n"
        f"    call void @llvm.prefetch.p0(ptr %next{at}, i32 0, i32 1, i32 1)"
        for at in range(0, _STEP, _LINE)
    )
    return f"""
declare void @llvm.x86.sse2.pause()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define internal ptr @state(ptr %crew, i64 %number) {{
  %line = add i64 %number, 2
  %offset = mul i64 %line, {8 * _WORDS}
  %state = getelementptr i8, ptr %crew, i64 %offset
  ret ptr %state
}}

define internal void @sleep(ptr %crew, ptr %state, i32 %expected) {{
{places}
  %kernel = load ptr, ptr %syscall
  call i64 (i64, ...) %kernel(i64 202, ptr %state, i64 128, i32 %expected, ptr null, ptr null, i64 0)
  ret void
}}

define internal void @wake(ptr %crew, ptr %state) {{
{places}
  %kernel = load ptr, ptr %syscall
  call i64 (i64, ...) %kernel(i64 202, ptr %state, i64 129, i64 1, ptr null, ptr null, i64 0)
  ret void
}}

define void @lead_with(ptr %words) {{
  %crew = load ptr, ptr %words
{places}
  %function_word = getelementptr i8, ptr %words, i64 8
  %context_word = getelementptr i8, ptr %words, i64 16
  %called_word = getelementptr i8, ptr %words, i64 24
  %given_function = load i64, ptr %function_word
  %given_context = load i64, ptr %context_word
  %given_called = load i64, ptr %called_word
  store i64 %given_function, ptr %function
  store i64 %given_context, ptr %context
  store i64 %given_called, ptr %called
  call void @lead(ptr %crew)
  ret void
}}

define void @lead(ptr %crew) {{
entry:
{places}
  %last = load i64, ptr %number
  %now = add i64 %last, 1
  store i64 %now, ptr %number
  %count = load i64, ptr %called
  %until = load i64, ptr %crowded_until
  %crowded = icmp ult i64 %now, %until
  %patience = select i1 %crowded, i64 {_CROWDED_PAUSES}, i64 {_WAIT_PAUSES}
  br label %call

call:
  %i = phi i64 [0, %entry], [%i_next, %called_one]
  %awake = phi i64 [0, %entry], [%awake_next, %called_one]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %call_one, label %compute
call_one:
  %state = call ptr @state(ptr %crew, i64 %i)
  %before = atomicrmw xchg ptr %state, i32 {_CALLED} seq_cst
  %slept = icmp eq i32 %before, {_ASLEEP}
  %was_awake = xor i1 %slept, true
  %one_more = zext i1 %was_awake to i64
  %awake_next = add i64 %awake, %one_more
  br i1 %slept, label %wake_one, label %called_one
wake_one:
  call void @wake(ptr %crew, ptr %state)
  br label %called_one
called_one:
  %i_next = add i64 %i, 1
  br label %call

compute:
  %product = load ptr, ptr %function
  %argument = load ptr, ptr %context
  call void %product(ptr %argument)
  br label %await

await:
  %k = phi i64 [0, %compute], [%k_next, %awaited_one]
  %absent = phi i64 [0, %compute], [%absent_next, %awaited_one]
  %left = icmp ult i64 %k, %count
  br i1 %left, label %await_one, label %awaited
await_one:
  %working = call ptr @state(ptr %crew, i64 %k)
  %taken = cmpxchg ptr %working, i32 {_CALLED}, i32 {_RESTING} seq_cst seq_cst
  %never_came = extractvalue {{ i32, i1 }} %taken, 1
  %absent_more = zext i1 %never_came to i64
  br i1 %never_came, label %awaited_one, label %look
look:
  %looks = phi i64 [0, %await_one], [%looks_next, %look_again]
  %seen = load atomic i32, ptr %working seq_cst, align 4
  %at_work = icmp eq i32 %seen, {_WORKING}
  br i1 %at_work, label %look_again, label %awaited_one
look_again:
  call void @llvm.x86.sse2.pause()
  %looks_next = add i64 %looks, 1
  %patient = icmp ult i64 %looks, %patience
  br i1 %patient, label %look, label %announce
announce:
  cmpxchg ptr %working, i32 {_WORKING}, i32 {_AWAITED} seq_cst seq_cst
  br label %asleep
asleep:
  %still = load atomic i32, ptr %working seq_cst, align 4
  %waited_for = icmp eq i32 %still, {_AWAITED}
  br i1 %waited_for, label %sleep, label %awaited_one
sleep:
  call void @sleep(ptr %crew, ptr %working, i32 {_AWAITED})
  br label %asleep
awaited_one:  ; with more threads absent than were asleep, some were kept from coming
  %absent_here = phi i64 [%absent_more, %await_one], [0, %look], [%count, %asleep]
  %absent_next = add i64 %absent, %absent_here
  %k_next = add i64 %k, 1
  br label %await

awaited:
  %asleep_first = sub i64 %count, %awake
  %disturbed = icmp ugt i64 %absent, %asleep_first
  br i1 %crowded, label %done, label %count_up
count_up:
  %score = load i64, ptr %disturbance
  %forgotten = lshr i64 %score, {_FORGOTTEN}
  %less_score = sub i64 %score, %forgotten
  %more_score = add i64 %less_score, {_DISTURBED}
  %new_score = select i1 %disturbed, i64 %more_score, i64 %less_score
  store i64 %new_score, ptr %disturbance
  %too_much = icmp ugt i64 %new_score, {_CROWDED}
  br i1 %too_much, label %step_back, label %done
step_back:
  %lately = add i64 %until, {_AGAIN_CALLS}
  %again = icmp ult i64 %now, %lately
  %calls_before = load i64, ptr %crowded_calls
  %twice = shl i64 %calls_before, 1
  %calls_again = call i64 @llvm.umin.i64(i64 %twice, i64 {_MOST_CROWDED_CALLS})
  %calls_now = select i1 %again, i64 %calls_again, i64 0
  %calls_next = call i64 @llvm.umax.i64(i64 %calls_now, i64 {_CROWDED_CALLS})
  store i64 %calls_next, ptr %crowded_calls
  %next_until = add i64 %now, %calls_next
  store i64 %next_until, ptr %crowded_until
  store i64 {_CALM}, ptr %disturbance
  br label %done
done:
  ret void
}}

define void @work(ptr %own) {{
entry:
  %crew = load ptr, ptr %own
  %second = getelementptr i8, ptr %own, i64 8
  %index = load i64, ptr %second
{places}
  %state = call ptr @state(ptr %crew, i64 %index)
  %first = mul i64 %index, {_STEP}
  %all = load i64, ptr %threads
  %stride = mul i64 %all, {_STEP}
  %seen = alloca i64       ; the call whose memory is brought near, or was
  %place = alloca ptr      ; that memory, its bytes, and how far it is done
  %size = alloca i64
  %done = alloca i64
  %next_place = alloca ptr ; and what comes behind it
  %next_size = alloca i64
  %patience = alloca i64
  store i64 0, ptr %seen
  store i64 0, ptr %size
  store i64 0, ptr %done
  store i64 0, ptr %next_size
  store i64 0, ptr %patience
  br label %look

look:
  %word = load atomic i32, ptr %state monotonic, align 4
  switch i32 %word, label %idle [ i32 {_CALLED}, label %take
                                  i32 {_DISMISSED}, label %end ]
take:
  %taken = cmpxchg ptr %state, i32 {_CALLED}, i32 {_WORKING} seq_cst seq_cst
  %got = extractvalue {{ i32, i1 }} %taken, 1
  br i1 %got, label %compute, label %look
compute:
  %product = load ptr, ptr %function
  %argument = load ptr, ptr %context
  call void %product(ptr %argument)
  %before = atomicrmw xchg ptr %state, i32 {_RESTING} seq_cst
  %awaited = icmp eq i32 %before, {_AWAITED}
  br i1 %awaited, label %tell, label %look
tell:
  call void @wake(ptr %crew, ptr %state)
  br label %look

idle:
  %current = load atomic i64, ptr %number monotonic, align 8
  %last = load i64, ptr %seen
  %same = icmp eq i64 %current, %last
  br i1 %same, label %ahead, label %begin_ahead
begin_ahead:
  %half_now = load atomic i64, ptr %half acquire, align 8
  %half_offset = mul i64 %half_now, {8 * _HALF_WORDS}
  %halves = getelementptr i8, ptr %crew, i64 {8 * _WORDS}
  %half_place = getelementptr i8, ptr %halves, i64 %half_offset
{here}
  %number_behind = load atomic i64, ptr %number acquire, align 8
  %unchanged = icmp eq i64 %number_behind, %current
  br i1 %unchanged, label %set_ahead, label %look
set_ahead:
  store i64 %current, ptr %seen
  %until = load i64, ptr %crowded_until
  %crowded = icmp ult i64 %current, %until
  %size_now = select i1 %crowded, i64 0, i64 %bytes0_now
  %next_size_now = select i1 %crowded, i64 0, i64 %bytes1_now
  %patience_now = select i1 %crowded, i64 0, i64 %pauses_now
  store i64 %start0_now, ptr %place
  store i64 %size_now, ptr %size
  store i64 %first, ptr %done
  store i64 %start1_now, ptr %next_place
  store i64 %next_size_now, ptr %next_size
  store i64 %patience_now, ptr %patience
  br label %look

ahead:
  %at = load i64, ptr %done
  %bytes = load i64, ptr %size
  %unfinished = icmp ult i64 %at, %bytes
  br i1 %unfinished, label %near, label %piece_done
near:
  %piece = load ptr, ptr %place
  %step = lshr i64 %at, {_STEP.bit_length() - 1}
  %inside = and i64 %step, {_STREAMS * _RUN - 1}
  %turn = lshr i64 %inside, {_STREAMS.bit_length() - 1}
  %stream = and i64 %inside, {_STREAMS - 1}
  %run = mul i64 %stream, {_RUN}
  %place_inside = add i64 %run, %turn
  %bytes_inside = mul i64 %place_inside, {_STEP}
  %chunk = and i64 %at, {-_STREAMS * _RUN * _STEP}
  %turned = add i64 %chunk, %bytes_inside
  %chunk_end = add i64 %chunk, {_STREAMS * _RUN * _STEP}
  %whole = icmp ule i64 %chunk_end, %bytes
  %from = select i1 %whole, i64 %turned, i64 %at
  %page = getelementptr i8, ptr %piece, i64 %from
{reads}
  %at_next = add i64 %at, %stride
  store i64 %at_next, ptr %done
  br label %look
piece_done:
  %next_bytes = load i64, ptr %next_size
  %another = icmp ne i64 %next_bytes, 0
  br i1 %another, label %next_piece, label %rest
next_piece:
  %next = load ptr, ptr %next_place
  store ptr %next, ptr %place
  store i64 %next_bytes, ptr %size
  store i64 %first, ptr %done
  store i64 0, ptr %next_size
  br label %look

rest:
  %left = load i64, ptr %patience
  %tired = icmp eq i64 %left, 0
  br i1 %tired, label %lie_down, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  %less = sub i64 %left, 1
  store i64 %less, ptr %patience
  br label %look
lie_down:
  %lying = cmpxchg ptr %state, i32 {_RESTING}, i32 {_ASLEEP} seq_cst seq_cst
  %lies = extractvalue {{ i32, i1 }} %lying, 1
  br i1 %lies, label %sleep, label %look
sleep:
  call void @sleep(ptr %crew, ptr %state, i32 {_ASLEEP})
  %now = load atomic i32, ptr %state seq_cst, align 4
  %still = icmp eq i32 %now, {_ASLEEP}
  br i1 %still, label %sleep, label %look

end:
  ret void
}}

define void @dismiss(ptr %crew) {{
entry:
{places}
  %count = load i64, ptr %threads
  br label %one
one:
  %i = phi i64 [0, %entry], [%i_next, %told]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %tell, label %done
tell:
  %state = call ptr @state(ptr %crew, i64 %i)
  %before = atomicrmw xchg ptr %state, i32 {_DISMISSED} seq_cst
  call void @wake(ptr %crew, ptr %state)
  br label %told
told:
  %i_next = add i64 %i, 1
  br label %one
done:
  ret void
}}
"""
