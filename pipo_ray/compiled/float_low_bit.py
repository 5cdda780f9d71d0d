"""Products with low-bit panels in float32, by the kernels in `float_int4.py`, `float_dots.py` and `float_outer.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from pipo_ray.compiled import float_int4
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.float_inputs import GroupedInputs, PaddedInputs
from pipo_ray.compiled.float_products import CompiledFloats
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.row_products import inputs_at_once
from pipo_ray.quant.panels import INT4_LAYOUTS, Panels

_MOST_SUMS = 1 << 20


class FloatLowBit:
    """Multiplies bf16 inputs with panels of int8, or of int4 in a layout whose blocks have neighbouring rows in
    neighbouring bytes. One caller at a time.

    Compiled when it is first used; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._int4: dict[tuple[int, int], MachineCode] = {}
        self._int8: CompiledFloats | None = None
        self._awake = False

    @staticmethod
    def takes(panels: Panels) -> bool:
        """Whether they are of a kind that this multiplies."""
        return panels.low_bit.bits == 8 or INT4_LAYOUTS[panels.layout].stride == 1

    @property
    def int8(self) -> CompiledFloats:
        """Products with a panel's codes."""
        if self._int8 is None:
            self._int8 = CompiledFloats(torch.int8, self._folder)
        return self._int8

    def stay_awake(self, on: bool) -> None:
        """See `CompiledBf16.stay_awake`."""
        self._awake = on
        if self._int8 is not None:
            self._int8.stay_awake(on)

    def int8_dots_into(self, inputs: PaddedInputs, memory: torch.Tensor, panels: Panels, output: torch.Tensor) -> None:
        """`F.linear` into `output`, [n, rows], with int8 panels `memory`, uint8 [panels, panel_bytes]: few inputs."""
        codes, scales = _int8(memory, panels)
        self.int8.dots_into(inputs, codes, None, output, scales)

    def int8_outer_into(
        self, inputs: GroupedInputs, memory: torch.Tensor, panels: Panels, output: torch.Tensor
    ) -> None:
        """The same of many."""
        codes, scales = _int8(memory, panels)
        self.int8.outer_into(inputs, codes, None, output, scales)

    def int4_product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int
    ) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """The same with int4 panels, of `num_inputs` rows: takes the inputs, float32 [n, columns] and contiguous, and
        the output, [n, num_rows]. What does not depend on them is made ready once.
        """
        all_rows = len(memory) * panels.panel_rows
        most = max(1, min(float_int4.KEPT_INPUTS, _MOST_SUMS // all_rows))
        at_once = -(-num_inputs // -(-num_inputs // most))  # about the same every time
        calls = {count: self._int4_sums(memory, panels, all_rows, count) for count in {at_once, num_inputs % at_once}}

        def multiply(rows: torch.Tensor, output: torch.Tensor) -> None:
            if at_once == num_inputs:
                output.copy_(calls[at_once](rows)[:, :num_rows])
                return
            for part, target in zip(rows.split(at_once), output.split(at_once), strict=True):
                target.copy_(calls[len(part)](part)[:, :num_rows])

        return multiply

    def _int4_sums(
        self, memory: torch.Tensor, panels: Panels, all_rows: int, count: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Products of `count` rows of inputs with all rows of panels, float32."""
        if not count:
            return lambda rows: rows
        group, block = panels.low_bit.group, INT4_LAYOUTS[panels.layout].block
        few = count <= float_int4.MOST_FEW
        many = float_int4.many_name(inputs_at_once(count, float_int4.MOST_INPUTS))
        function = self._code(group, block // 2).address(float_int4.few_name(count) if few else many)
        words = {
            "panels": memory.data_ptr(), "num_inputs": count, "columns": panels.columns,
            "panel_blocks": panels.panel_rows // block, "blocks": all_rows // block,
            "panel_bytes": memory.stride(0), "scales": panels.code_bytes, "output_bytes": 4 * all_rows,
        }  # fmt: skip
        context = context_of([words.get(field, 0) for field in float_int4.FIELDS])
        address = ctypes.addressof(context)
        of_groups = (count, panels.columns // group, group)

        def multiply(rows: torch.Tensor) -> torch.Tensor:
            output = torch.empty(count, all_rows)
            sums = rows.view(of_groups).sum(-1) if few else rows
            context[_INPUTS], context[_SUMS], context[_OUTPUT] = rows.data_ptr(), sums.data_ptr(), output.data_ptr()
            context[_NEXT] = 0
            run_on_threads(function, address, few and self._awake, self._folder)
            return output

        return multiply

    def _code(self, group: int, half: int) -> MachineCode:
        code = self._int4.get((group, half))
        if code is None:
            code = self._int4[group, half] = MachineCode(float_int4.module(group, half), self._folder)
        return code


def _int8(memory: torch.Tensor, panels: Panels) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [panels, panel_rows, columns], over the same memory, and all rows' scales."""
    codes = memory[:, : panels.code_bytes].view(torch.int8).unflatten(1, (panels.panel_rows, panels.columns))
    return codes, memory[:, panels.code_bytes :].view(torch.bfloat16)[:, : panels.panel_rows].flatten()


_INPUTS, _SUMS, _OUTPUT, _NEXT = map(float_int4.FIELDS.index, ("inputs", "sums", "output", "next"))
