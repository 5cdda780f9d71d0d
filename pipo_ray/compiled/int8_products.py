"""Products with int8 panels by the kernels in `int8_rows.py`, for few rows of inputs, and `int8_blocks.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipo_ray.compiled import int8_blocks, int8_rows
from pipo_ray.compiled.crew import add_on_threads, run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.row_products import inputs_at_once, product_name
from pipo_ray.compiled.steps import Steps
from pipo_ray.quant.panels import BLOCK_ROWS, Panels


class CompiledInt8:
    """Multiplies bf16 inputs with int8 panels. One caller at a time.

    Each kernel is compiled when it is first used; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._codes: dict[Any, MachineCode] = {}
        self._awake = False

    def product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int, *, blocks: bool
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """`F.linear` with the first `num_rows` rows in the panels `memory`, uint8 [panels, panel_bytes]: takes inputs,
        bf16 [num_inputs, columns] and contiguous, and gives bf16 [num_inputs, num_rows].

        With `blocks` by the kernel that unpacks, which takes 384 KiB of each thread's stack.
        """
        if blocks:
            fields, product = int8_blocks.FIELDS, self._code(int8_blocks).address(int8_blocks.PRODUCT)
        else:
            fields, product = int8_rows.FIELDS, self._rows_product(num_inputs)
        context = _context(fields, memory, panels, num_rows, num_inputs)
        address = ctypes.addressof(context)
        inputs, output_at, next_at = map(fields.index, ("inputs", "output", "next"))
        few = not blocks and num_inputs <= int8_rows.MOST_INPUTS  # more are not bound by memory

        def multiply(rows: torch.Tensor) -> torch.Tensor:
            output = rows.new_empty(num_inputs, num_rows)
            context[inputs], context[output_at], context[next_at] = rows.data_ptr(), output.data_ptr(), 0
            run_on_threads(product, address, few and self._awake, self._folder)
            return output

        return multiply

    def add_product(
        self, steps: Steps, memory: torch.Tensor, panels: Panels, num_rows: int, row: torch.Tensor, output: torch.Tensor
    ) -> None:
        """A step, on all threads, that fills `output`, bf16 [num_rows] and contiguous, with the product of a row of
        inputs, bf16 [columns]. See `product`.
        """
        fields = int8_rows.FIELDS
        context = _context(fields, memory, panels, num_rows, 1)
        context[fields.index("inputs")], context[fields.index("output")] = row.data_ptr(), output.data_ptr()
        next_at = fields.index("next")
        add_on_threads(steps, self._rows_product(1), context, next_at, self._folder, memory, row, output)

    def stay_awake(self, on: bool) -> None:
        """Whether threads wait awake for a little after a product with few inputs. For weights that stay where they
        are: the next product comes soon.
        """
        self._awake = on

    def _rows_product(self, num_inputs: int) -> int:
        return self._code(int8_rows).address(product_name(inputs_at_once(num_inputs, int8_rows.MOST_INPUTS)))

    def _code(self, kernel: Any) -> MachineCode:
        code = self._codes.get(kernel)
        if code is None:
            code = self._codes[kernel] = MachineCode(kernel.module(), self._folder)
        return code


def _context(fields: Sequence[str], memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> Any:
    """A kernel's context without inputs and output."""
    words = {
        "codes": memory.data_ptr(), "scales": memory.data_ptr() + panels.code_bytes, "num_inputs": num_inputs,
        "columns": panels.columns, "rows": num_rows, "panel_bytes": memory.stride(0), "panel_rows": panels.panel_rows,
        "panel_blocks": panels.panel_rows // BLOCK_ROWS,
    }  # fmt: skip
    return context_of([words.get(field, 0) for field in fields])
