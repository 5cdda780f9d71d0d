"""Products with int8 panels by the kernel in `int8.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipo_ray.compiled import int8
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.quant.panels import BLOCK_ROWS, Panels


class CompiledInt8:
    """Multiplies bf16 inputs with int8 panels. One caller at a time. Takes 384 KiB of each thread's stack.

    Compiled when it is first used; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._code: MachineCode | None = None

    def product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """`F.linear` with the first `num_rows` rows in the panels `memory`, uint8 [panels, panel_bytes]: takes inputs,
        bf16 [num_inputs, columns] and contiguous, and gives bf16 [num_inputs, num_rows].
        """
        if self._code is None:
            self._code = MachineCode(int8.module(), self._folder)
        product = self._code.address(int8.PRODUCT)
        context = _context(memory, panels, num_rows, num_inputs)
        address = ctypes.addressof(context)

        def multiply(rows: torch.Tensor) -> torch.Tensor:
            output = rows.new_empty(num_inputs, num_rows)
            context[_INPUTS], context[_OUTPUT], context[_NEXT] = rows.data_ptr(), output.data_ptr(), 0
            run_on_threads(product, address, folder=self._folder)
            return output

        return multiply


def _context(memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> Any:
    """The kernel's context without inputs and output."""
    words = {
        "codes": memory.data_ptr(), "scales": memory.data_ptr() + panels.code_bytes, "num_inputs": num_inputs,
        "columns": panels.columns, "rows": num_rows, "panel_bytes": memory.stride(0),
        "panel_blocks": panels.panel_rows // BLOCK_ROWS,
    }  # fmt: skip
    return context_of([words.get(field, 0) for field in int8.FIELDS])


_INPUTS, _OUTPUT, _NEXT = map(int8.FIELDS.index, ("inputs", "output", "next"))
