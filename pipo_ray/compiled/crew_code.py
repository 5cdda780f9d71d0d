"""What a crew's threads do, as LLVM IR, and the memory that they and their caller share. See `crew.py`.

A thread's state is one word, its futex as well (man 2 futex). The header comes first, then a line for each thread.
Imports neither torch nor llvmlite.
"""

from __future__ import annotations

_RESTING, _CALLED, _WORKING, _AWAITED, _ASLEEP, _DISMISSED = range(6)
HEADER = (
    "function", "context", "called", "number", "threads", "syscall", "crowded_until", "disturbance", "pauses",
    "crowded_calls",
)  # fmt: skip
WORDS = 16  # of the header, and of each line behind it: two cache lines, which processors fetch together
LINE = 64
PAUSES = 20_000
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
_DISTURBED, CROWDED, _CALM = 1 << 9, 1 << 15, 3 << 13
"""The share of calls for which a thread's core was another's, of those lately (the last 2^7 or so), in 2^-16: it is
crowded above a half, and what it counts from again afterwards is three eighths. What Ray does between two tokens is a
tenth, and giving way for it took a fifth longer; a process that computes is all of them within a sweep.
"""


def source() -> str:
    """`lead`, `dismiss` (context: the memory's address), `work` (context: the address, the thread's number) and
    `lead_with` (context: the address, a function, its context, the number of threads to call).
    """
    places = "\n".join(f"  %{name} = getelementptr i8, ptr %crew, i64 {8 * at}" for at, name in enumerate(HEADER))
    return f"""
declare void @llvm.x86.sse2.pause()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)

define internal ptr @state(ptr %crew, i64 %number) {{
  %line = add i64 %number, 1
  %offset = mul i64 %line, {8 * WORDS}
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
  %too_much = icmp ugt i64 %new_score, {CROWDED}
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
  %patience = alloca i64
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
  %current = load atomic i64, ptr %number monotonic, align 8
  %until = load i64, ptr %crowded_until
  %crowded = icmp ult i64 %current, %until
  %pauses_now = load i64, ptr %pauses
  %patience_now = select i1 %crowded, i64 0, i64 %pauses_now
  store i64 %patience_now, ptr %patience
  br i1 %awaited, label %tell, label %look
tell:
  call void @wake(ptr %crew, ptr %state)
  br label %look

idle:
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
