"""Products with int4 panels by the kernel in `int4.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipo_ray.compiled import int4
from pipo_ray.compiled.machine import MachineCode, context_of, run_here, run_on_threads
from pipo_ray.quant.panels import BLOCK_ROWS, Panels

_ROWS_ON_THREADS = 32  # whose sums take longer than starting the threads
_REMEMBERED = 1024


class CompiledInt4:
    """Multiplies bf16 inputs with panels of the layout `pipo_ray.compiled.support.LAYOUT`. One caller at a time.

    Compiled for each group size when it is first used; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._codes: dict[int, MachineCode] = {}
        self._sums = torch.empty(0)
        self._calls: dict[tuple[Panels, int, int], _Call] = {}

    def linear(self, rows: torch.Tensor, memory: torch.Tensor, panels: Panels, num_rows: int) -> torch.Tensor:
        """`F.linear` of `rows`, bf16 [n, columns] and contiguous, with the first `num_rows` rows in the panels
        `memory`, uint8 [panels, panel_bytes]: bf16 [n, num_rows].
        """
        call = self._calls.get((panels, num_rows, len(rows)))
        if call is None:
            call = self._prepare(panels, num_rows, len(rows))
        output = rows.new_empty(len(rows), num_rows)
        context, codes = call.context, memory.data_ptr()
        context[_INPUTS], context[_OUTPUT], context[_SUMS] = rows.data_ptr(), output.data_ptr(), self._sums.data_ptr()
        context[_CODES], context[_SCALES] = codes, codes + panels.code_bytes
        context[_PANEL_BYTES] = memory.stride(0)
        context[_NEXT] = 0
        call.run_sums(call.sums, call.address)
        context[_NEXT] = 0
        run_on_threads(call.product, call.address)
        return output

    def _prepare(self, panels: Panels, num_rows: int, num_inputs: int) -> _Call:
        """The call for these shapes, with memory for the sums."""
        group = panels.low_bit.group
        code = self._codes.get(group)
        if code is None:
            code = self._codes[group] = MachineCode(int4.module(group), self._folder)
        groups = panels.columns // group
        words = {
            "num_inputs": num_inputs, "groups": groups, "rows": num_rows,
            "panel_blocks": panels.panel_rows // BLOCK_ROWS, "scales_bytes": 4 * panels.panel_rows,
        }  # fmt: skip
        context = context_of([words.get(field, 0) for field in int4.FIELDS])
        call = _Call(
            context, ctypes.addressof(context), code.address(int4.SUMS_NAME),
            run_on_threads if num_inputs >= _ROWS_ON_THREADS else run_here,
            code.address(int4.product_name(int4.inputs_at_once(num_inputs))),
        )  # fmt: skip
        if self._sums.numel() < num_inputs * groups:
            self._sums = torch.empty(num_inputs * groups)
        if len(self._calls) >= _REMEMBERED:
            self._calls.clear()
        self._calls[panels, num_rows, num_inputs] = call
        return call


@dataclass(frozen=True)
class _Call:
    """What stays the same for the same shapes: every microsecond shows with one row of inputs."""

    context: Any
    address: int
    sums: int
    run_sums: Callable[[int, int], None]
    product: int


def _index(field: str) -> int:
    return int4.FIELDS.index(field)


_INPUTS, _SUMS, _CODES, _SCALES, _OUTPUT, _NEXT, _PANEL_BYTES = map(
    _index, ("inputs", "sums", "codes", "scales", "output", "next", "panel_bytes")
)
