"""A list of functions that run one after the other without coming back to Python in between.

Each has a context of its own and a word that is set to 0 before: the counter of what threads take from each other.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.machine import context_of

RUN, RUN_FIELDS = "run_steps", ("steps", "count")


def module() -> str:
    """The function that runs a list."""
    f = Function(RUN, RUN_FIELDS)
    steps = f.field("steps", "ptr")
    with f.loop(f.field("count")) as number:
        step = f.at(steps, f.multiply(number, 24))
        function, context, counter = (f.load("ptr", f.at(step, 8 * word)) for word in range(3))
        f.store("i64", "0", counter)
        f.do(f"call void {function}(ptr {context})")
    return f.text()


@dataclass
class Steps:
    """Functions, contexts and counters, which it keeps alive."""

    _words: list[int] = field(default_factory=list)
    _owned: list[Any] = field(default_factory=list)
    _no_counter: Any = field(default_factory=lambda: context_of([0]))

    def add(self, function: int, context: Any, counter: int | None = None, *owned: object) -> None:
        """One more: the function at `function` with the words `context`. The word at the address `counter` is set to 0
        before. All of `owned` is kept as well.
        """
        zeroed = ctypes.addressof(self._no_counter) if counter is None else counter
        self._words += [function, ctypes.addressof(context), zeroed]
        self._owned += [context, *owned]

    def context(self) -> Any:
        """The context for `RUN`; needs this object."""
        words = context_of(self._words)
        self._owned.append(words)
        return context_of([ctypes.addressof(words), len(self._words) // 3])
