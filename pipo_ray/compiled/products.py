"""Products with int4 panels by the kernel in `int4.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipo_ray.compiled import int4
from pipo_ray.compiled.crew import add_on_threads, run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of, run_here
from pipo_ray.compiled.row_products import inputs_at_once, product_name
from pipo_ray.compiled.steps import Steps
from pipo_ray.quant.panels import BLOCK_ROWS, Panels

_ROWS_ON_THREADS = 32  # whose sums take longer than starting the threads


class CompiledInt4:
    """Multiplies bf16 inputs with panels of the layout `pipo_ray.compiled.support.LAYOUT`. One caller at a time.

    Compiled for each group size when it is first used; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._codes: dict[int, MachineCode] = {}
        self._sums = torch.empty(0)
        self._awake = False

    def product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """`F.linear` with the first `num_rows` rows in the panels `memory`, uint8 [panels, panel_bytes]: takes inputs,
        bf16 [num_inputs, columns] and contiguous, and gives bf16 [num_inputs, num_rows].
        """
        code = self._code(panels.low_bit.group)
        sums, product = (
            code.address(int4.SUMS_NAME),
            code.address(product_name(inputs_at_once(num_inputs, int4.MOST_INPUTS))),
        )
        run_sums = run_on_threads if num_inputs >= _ROWS_ON_THREADS else run_here
        groups = panels.columns // panels.low_bit.group
        if self._sums.numel() < num_inputs * groups:
            self._sums = torch.empty(num_inputs * groups)
        context = _context(memory, panels, num_rows, num_inputs)
        address = ctypes.addressof(context)
        few = num_inputs <= int4.MOST_INPUTS  # more are not bound by memory

        def multiply(rows: torch.Tensor) -> torch.Tensor:
            output = rows.new_empty(num_inputs, num_rows)
            context[_INPUTS], context[_OUTPUT] = rows.data_ptr(), output.data_ptr()
            context[_SUMS] = self._sums.data_ptr()  # may have grown since
            context[_NEXT] = 0
            run_sums(sums, address)
            context[_NEXT] = 0
            run_on_threads(product, address, few and self._awake, self._folder)
            return output

        return multiply

    def add_sums(self, steps: Steps, row: torch.Tensor, group: int) -> torch.Tensor:
        """A step that fills what is returned with the sums of a row of inputs, bf16 [columns], by groups."""
        groups = row.numel() // group
        sums = torch.empty(groups)
        words = {"inputs": row.data_ptr(), "sums": sums.data_ptr(), "num_inputs": 1, "groups": groups}
        context = context_of([words.get(field, 0) for field in int4.FIELDS])
        counter = ctypes.addressof(context) + 8 * _NEXT
        steps.add(self._code(group).address(int4.SUMS_NAME), context, counter, row, sums)
        return sums

    def add_product(
        self, steps: Steps, memory: torch.Tensor, panels: Panels, num_rows: int, row: torch.Tensor, sums: torch.Tensor,
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        """A step, on all threads, that fills `output`, bf16 [num_rows] and contiguous, with the product of a row of
        inputs, bf16 [columns], whose sums are `sums`. See `product`.
        """
        context = _context(memory, panels, num_rows, 1)
        context[_INPUTS], context[_SUMS], context[_OUTPUT] = row.data_ptr(), sums.data_ptr(), output.data_ptr()
        product = self._code(panels.low_bit.group).address(product_name(1))
        add_on_threads(steps, product, context, _NEXT, self._folder, memory, row, sums, output)

    def stay_awake(self, on: bool) -> None:
        """Whether threads wait awake for a little after a product with few inputs. For weights that stay where they
        are: the next product comes soon.
        """
        self._awake = on

    def _code(self, group: int) -> MachineCode:
        code = self._codes.get(group)
        if code is None:
            code = self._codes[group] = MachineCode(int4.module(group), self._folder)
        return code


def _context(memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> Any:
    """The kernel's context without inputs, sums and output."""
    words = {
        "codes": memory.data_ptr(), "scales": memory.data_ptr() + panels.code_bytes, "num_inputs": num_inputs,
        "groups": panels.columns // panels.low_bit.group, "rows": num_rows, "panel_bytes": memory.stride(0),
        "panel_blocks": panels.panel_rows // BLOCK_ROWS, "scales_bytes": 4 * panels.panel_rows,
    }  # fmt: skip
    return context_of([words.get(field, 0) for field in int4.FIELDS])


_INPUTS, _SUMS, _OUTPUT, _NEXT = map(int4.FIELDS.index, ("inputs", "sums", "output", "next"))
