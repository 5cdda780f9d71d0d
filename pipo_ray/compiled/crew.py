"""Threads that compute together with the one that calls them.

A product of one row with int4 weights takes a fraction of a millisecond, and the next one comes soon: threads that have
done their part wait awake for a little, where they are told to, and then they sleep.

A thread's state is one word, its futex as well (man 2 futex). Nobody waits for a thread that has not begun: if the
system has it wait for a core, the others do its part. So the crew is no slower than the caller alone, and a process
that was forked, which has no such threads, computes as well.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from pathlib import Path
from typing import Any

import torch

from pipo_ray.compiled.crew_code import HEADER, LINE, PAUSES, WORDS, source
from pipo_ray.compiled.kernel_calls import library_function
from pipo_ray.compiled.machine import MachineCode, context_of, function_at
from pipo_ray.compiled.steps import Steps


class Crew:
    """`num_threads` threads; `folder` is where their machine code is kept. They end with `dismiss`."""

    def __init__(self, num_threads: int, folder: Path | None = None) -> None:
        self.num_threads = num_threads
        self._code = MachineCode(source(), folder)
        size = 8 * WORDS * (1 + num_threads)
        self._memory = ctypes.create_string_buffer(size + LINE)
        address = ctypes.addressof(self._memory)
        self._address = address + -address % LINE
        self._words = (ctypes.c_int64 * (size // 8)).from_address(self._address)
        self._words[HEADER.index("syscall")] = library_function("syscall")
        self._words[HEADER.index("threads")] = num_threads
        self._work = function_at(self._code.address("work"))
        self._lead = function_at(self._code.address("lead"))
        self._dismiss = function_at(self._code.address("dismiss"))
        self._busy = threading.Lock()
        self._threads, self._contexts = [], []
        for number in range(num_threads):
            context = context_of([self._address, number])
            arguments = (ctypes.addressof(context),)
            self._contexts.append(context)
            thread = threading.Thread(target=self._work, args=arguments, name=f"crew {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def call(self, function: int, context: int, num_threads: int, awake: bool | None = False) -> None:
        """Run the function at `function` with the context at `context` here and on `num_threads` of the threads, or on
        fewer if they do not come in time, and wait. Afterwards they stay `awake` for a little or sleep; None: as the
        last time. Whoever calls while another call runs is alone.
        """
        if not self._busy.acquire(blocking=False):
            function_at(function)(context)
            return
        try:
            words = self._words
            words[0], words[1], words[2] = function, context, min(num_threads, self.num_threads)
            if awake is not None:
                words[_PAUSES_AT] = PAUSES if awake else 0
            self._lead(self._address)
        finally:
            self._busy.release()

    def run_steps(self, function: int, context: int, awake: bool = True) -> None:
        """Run here what calls the threads itself (`deferred`), again and again: in between they stay `awake`, or
        sleep.
        """
        with self._busy:
            self._words[_PAUSES_AT] = PAUSES if awake else 0
            function_at(function)(context)

    def deferred(self, function: int, context: int, num_threads: int) -> tuple[int, Any]:
        """See `deferred_on_threads`."""
        words = [self._address, function, context, min(num_threads, self.num_threads)]
        return self._code.address("lead_with"), context_of(words)

    def dismiss(self) -> None:
        """End the threads; later calls are computed by the caller alone."""
        with self._busy:
            self._words[HEADER.index("called")] = self.num_threads = 0
            self._dismiss(self._address)
        for thread in self._threads:
            thread.join()


_PAUSES_AT = HEADER.index("pauses")

CALLED_AT = 3
"""The word of a step that says how many threads it calls; see `add_on_threads`."""

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


def run_on_threads(function: int, context: int, awake: bool | None = False, folder: Path | None = None) -> None:
    """Run the function on as many threads as torch computes with, this one included; see `Crew.call`. The process has
    one crew.
    """
    others = torch.get_num_threads() - 1
    if not _crews or _crews[0].num_threads < others:
        if not others:
            function_at(function)(context)
            return
        _enlist(others, folder)
    _crews[0].call(function, context, others, awake)


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
