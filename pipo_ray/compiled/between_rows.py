"""What lies between the products of a layer, for many rows at once: the functions of `row_steps.py` on all threads.

torch computes an RMS norm of many rows in six passes over memory, three of them in float32, and the gate of an MLP in
two; here each is one. A row's bits do not depend on the other rows or on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from pipo_ray.compiled import row_steps
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.ir import Function, float_word
from pipo_ray.compiled.machine import MachineCode, context_of, function_at
from pipo_ray.compiled.support import row_instructions

SHARE, FIELDS = "share", ("function", "contexts", "context_bytes", "count", "next")
"""Call a function with each of `count` contexts that lie one behind the other; threads take one at a time."""

MULTIPLE = 16
"""Of the length of a row."""
_TASKS = 4  # for each thread, so that they end together


def module() -> str:
    """The function."""
    f = Function(SHARE, FIELDS)
    function, contexts, size = f.field("function", "ptr"), f.field("contexts", "ptr"), f.field("context_bytes")
    with f.tasks(f.place_of("next"), f.field("count")) as number:
        f.do(f"call void {function}(ptr {f.at(contexts, f.multiply(number, size))})")
    return f.text()


class BetweenRows:
    """Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`). One caller at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._codes = MachineCode(row_steps.module(row_instructions()), folder), MachineCode(module(), folder)
        self._norm, self._gate = (self._codes[0].address(name) for name in (row_steps.NORM, row_steps.GATE))
        self._share = self._codes[1].address(SHARE)

    def norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """LlamaRMSNorm of `rows` bf16 [..., size], contiguous as is `weight`, bf16 [size]."""
        size = len(weight)
        count = rows.numel() // size
        output = torch.empty_like(rows)
        bits = float_word(epsilon)
        source, target, of_weight = rows.data_ptr(), output.data_ptr(), weight.data_ptr()
        words = [
            (source + 2 * size * start, of_weight, target + 2 * size * start, stop - start, size, bits)
            for start, stop in _ranges(count)
        ]
        self._run(self._norm, words)
        return output

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(`gate`) times `up`, both bf16 [rows, size] and contiguous; [rows, size]."""
        count, size = gate.shape
        output = torch.empty_like(gate)
        source, other, target = gate.data_ptr(), up.data_ptr(), output.data_ptr()
        words = [
            (source + 2 * size * start, other + 2 * size * start, target + 2 * size * start, (stop - start) * size)
            for start, stop in _ranges(count)
        ]
        self._run(self._gate, words)
        return output

    def _run(self, function: int, contexts: Sequence[tuple[int, ...]]) -> None:
        words = context_of([word for context in contexts for word in context])
        address = ctypes.addressof(words)
        if len(contexts) == 1:
            function_at(function)(address)
            return
        shared = context_of([function, address, 8 * len(contexts[0]), len(contexts), 0])
        run_on_threads(self._share, ctypes.addressof(shared), awake=None, folder=self._folder)


def _ranges(count: int) -> list[tuple[int, int]]:
    """`count` rows in parts for the threads, each from a start to before a stop."""
    at_once = -(-count // (_TASKS * torch.get_num_threads()))
    return [(start, min(start + at_once, count)) for start in range(0, count, at_once)]
