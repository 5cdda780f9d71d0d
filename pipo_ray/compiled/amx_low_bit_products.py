"""Products of many rows of bf16 inputs with low-bit panels by the kernels in `amx_low_bit.py`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from pipo_ray.compiled import amx
from pipo_ray.compiled.amx_inputs import InputPacking, PackedInputs
from pipo_ray.compiled.amx_low_bit import Int4Panels, Int8Panels
from pipo_ray.compiled.amx_shares import shares
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, Panels


class CompiledAmxLowBit:
    """Multiplies bf16 inputs with panels of int8, or of int4 in the layout `pipo_ray.compiled.support.LAYOUT`, by the
    matrix unit, where `amx_obstacle` gives none. One caller at a time.

    Takes 290 KiB of each thread's stack. Compiled when it is first used, for int8 and each group size of int4; `folder`
    is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._packing: InputPacking | None = None
        self._codes: dict[int, tuple[MachineCode, tuple[str, ...]]] = {}

    def pack(self, rows: torch.Tensor) -> PackedInputs:
        """See `InputPacking.pack`."""
        if self._packing is None:
            self._packing = InputPacking(self._folder)
        return self._packing.pack(rows)

    def linear_into(
        self, inputs: PackedInputs, memory: torch.Tensor, panels: Panels, num_rows: int, output: torch.Tensor
    ) -> None:
        """`F.linear` with the first `num_rows` rows in the panels `memory`, uint8 [panels, panel_bytes], into `output`,
        bf16 [n, num_rows], whose rows are contiguous.
        """
        code, fields = self._code(panels.low_bit)
        output_bytes = 2 * output.stride(0)
        words = {
            "output": output.data_ptr(), "columns": panels.columns, "rows": num_rows, "output_stride": output_bytes,
            "codes": memory.data_ptr(), "scales": memory.data_ptr() + panels.code_bytes,
            "panel_bytes": memory.stride(0), "panel_blocks": panels.panel_rows // BLOCK_ROWS,
            "scales_bytes": 4 * panels.panel_rows,
        }  # fmt: skip
        for packed, num_inputs in inputs.parts:
            words["packed"], words["num_inputs"] = packed.data_ptr(), num_inputs
            words["rows_at_once"], words["inputs_at_once"] = shares(
                num_rows, num_inputs, BLOCK_ROWS, torch.get_num_threads()
            )
            context = context_of([words.get(field, 0) for field in fields])
            run_on_threads(code.address(amx.PRODUCT), ctypes.addressof(context), folder=self._folder)
            words["output"] += num_inputs * output_bytes

    def _code(self, low_bit: LowBitFormat) -> tuple[MachineCode, tuple[str, ...]]:
        group = low_bit.group  # 0: int8
        found = self._codes.get(group)
        if found is None:
            weights = Int4Panels(group) if group else Int8Panels()
            code = MachineCode(amx.module(weights), self._folder)
            found = self._codes[group] = code, (*amx.FIELDS, *weights.fields)
        return found
