"""Products with low-bit panels by kernels for AVX2: in `int4_words.py`, and in `float_dots.py` and `float_outer.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipo_ray.compiled import int4_words
from pipo_ray.compiled.crew import add_on_threads, run_on_threads
from pipo_ray.compiled.float_inputs import GroupedInputs, PaddedInputs
from pipo_ray.compiled.float_products import MOST_SUMS, CompiledFloats, make_ready
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.row_products import inputs_at_once
from pipo_ray.compiled.steps import Steps
from pipo_ray.compiled.word_inputs import WordInputs
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import INT4_LAYOUTS, Panels

_ANY_HALF = 16  # inputs are the same for all layouts


class FloatLowBit:
    """Multiplies bf16 inputs with panels of int8, or of int4 in a layout whose blocks have neighbouring rows in
    neighbouring bytes. One caller at a time.

    Compiled when it is first used; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._int4: dict[tuple[int, int], MachineCode] = {}
        self._int8: CompiledFloats | None = None
        self._row_inputs: dict[tuple[int, int], WordInputs] = {}
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
            self._int8.stay_awake(self._awake)
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

    def words(self, rows: torch.Tensor, group: int) -> WordInputs:
        """Inputs bf16 [n, columns], contiguous, for `int4_product` with such groups."""
        function, inputs = self._rounding(rows, group)
        make_ready(function, _rounding_words(rows, inputs), rows.numel(), self._folder)
        return inputs

    def int4_product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int
    ) -> Callable[[WordInputs, torch.Tensor], None]:
        """The same with int4 panels, of `num_inputs` rows: takes the inputs, and the output, [n, num_rows]. What does
        not depend on them is made ready once.
        """
        all_rows = _block_rows(panels, num_rows)
        most = max(1, min(int4_words.KEPT_INPUTS, MOST_SUMS // all_rows))
        at_once = -(-num_inputs // -(-num_inputs // most))  # about the same every time
        few = num_inputs <= int4_words.MOST_FEW
        starts = range(0, num_inputs, at_once)
        calls = {
            count: self._int4_sums(memory, panels, all_rows, count, few)
            for count in {min(at_once, num_inputs - start) for start in starts}
        }

        def multiply(inputs: WordInputs, output: torch.Tensor, _kept: torch.Tensor = memory) -> None:
            if len(starts) == 1:
                output.copy_(calls[num_inputs](*inputs.tensors)[:, :num_rows])
                return
            for start in starts:
                target = output[start : start + at_once]
                parts = (one[start : start + at_once] for one in inputs.tensors)
                target.copy_(calls[len(target)](*parts)[:, :num_rows])

        return multiply

    def _int4_sums(
        self, memory: torch.Tensor, panels: Panels, all_rows: int, count: int, few: bool
    ) -> Callable[..., torch.Tensor]:
        """Products of `count` rows of inputs with the first `all_rows` rows of panels, bf16 if they are few, else
        float32.
        """
        name = int4_words.FEW if few else int4_words.many_name(inputs_at_once(count, int4_words.MOST_INPUTS))
        function = self._panels_code(panels).address(name)
        dtype = torch.bfloat16 if few else torch.float32
        context = _context(memory, panels, all_rows, count, dtype.itemsize)
        address = ctypes.addressof(context)

        def multiply(*inputs: torch.Tensor) -> torch.Tensor:
            output = torch.empty(count, all_rows, dtype=dtype)
            for place, one in zip(_INPUTS, inputs, strict=True):
                context[place] = one.data_ptr()
            context[_OUTPUT], context[_NEXT] = output.data_ptr(), 0
            run_on_threads(function, address, few and self._awake, self._folder)
            return output

        return multiply

    def add_inputs(self, steps: Steps, row: torch.Tensor, low_bit: LowBitFormat) -> WordInputs | torch.Tensor:
        """What `add_product` takes for a row of inputs, bf16 [columns], with such panels; see
        `CompiledFloats.add_inputs`.
        """
        if low_bit.bits == 8:
            return self.int8.add_inputs(steps, row)
        key = low_bit.group, len(row)
        function, inputs = self._rounding(row[None], low_bit.group, self._row_inputs.get(key))
        self._row_inputs[key] = inputs
        context = context_of(_rounding_words(row[None], inputs))
        counter = ctypes.addressof(context) + 8 * int4_words.WORDS_FIELDS.index("next")
        steps.add(function, context, counter, row, inputs)
        return inputs

    def takes_row(self, panels: Panels, num_rows: int) -> bool:
        """Whether `add_product` is for so many rows in these panels."""
        return panels.low_bit.bits == 8 or (self.takes(panels) and _block_rows(panels, num_rows) == num_rows)

    def add_product(
        self, steps: Steps, memory: torch.Tensor, panels: Panels, num_rows: int, row: torch.Tensor,
        inputs: WordInputs | torch.Tensor, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """A step, on all threads, that fills `output`, bf16 [num_rows] and contiguous, with the product of the row
        that `inputs` were made of. `takes_row` says what may come; see `int4_product`.
        """
        if not isinstance(inputs, WordInputs):
            codes, scales = _int8(memory, panels)
            self.int8.add_product(steps, inputs, codes, None, output, scales)
            return
        context = _context(memory, panels, num_rows, 1, output.element_size())
        for place, one in zip(_INPUTS, inputs.tensors, strict=True):
            context[place] = one.data_ptr()
        context[_OUTPUT] = output.data_ptr()
        product = self._panels_code(panels).address(int4_words.FEW)
        add_on_threads(steps, product, context, _NEXT, self._folder, memory, row, inputs, output)

    def _rounding(self, rows: torch.Tensor, group: int, inputs: WordInputs | None = None) -> tuple[int, WordInputs]:
        """The function that rounds inputs bf16 [n, columns], contiguous, and what it fills: `inputs`, or new ones."""
        count, columns = rows.shape
        few = count <= int4_words.MOST_FEW
        if inputs is None:
            words = torch.empty(count, columns * (int4_words.SPREAD_BYTES // 2 if few else 1), dtype=torch.int16)
            steps, sums = torch.empty(2, count, columns // group)
            inputs = WordInputs(group, words, steps, sums, torch.empty_like(sums, dtype=torch.int32))
        return self._code(group, _ANY_HALF).address(int4_words.SPREAD if few else int4_words.WORDS), inputs

    def _panels_code(self, panels: Panels) -> MachineCode:
        return self._code(panels.low_bit.group, INT4_LAYOUTS[panels.layout].block // 2)

    def _code(self, group: int, half: int) -> MachineCode:
        code = self._int4.get((group, half))
        if code is None:
            code = self._int4[group, half] = MachineCode(int4_words.module(group, half), self._folder)
        return code


def _rounding_words(rows: torch.Tensor, inputs: WordInputs) -> tuple[int, ...]:
    """The context of the function that fills `inputs` with `rows`."""
    return (*(one.data_ptr() for one in (rows, *inputs.tensors)), inputs.sums.numel(), 0)


def _block_rows(panels: Panels, num_rows: int) -> int:
    """`num_rows`, and those that fill the last block."""
    block = INT4_LAYOUTS[panels.layout].block
    return -(-num_rows // block) * block


def _context(memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int, number_bytes: int) -> Any:
    """The kernel's context without inputs and output: `num_rows` whole blocks of rows, and numbers of so many bytes."""
    block = INT4_LAYOUTS[panels.layout].block
    fields = {
        "panels": memory.data_ptr(), "num_inputs": num_inputs, "columns": panels.columns,
        "panel_blocks": panels.panel_rows // block, "blocks": num_rows // block, "panel_bytes": memory.stride(0),
        "scales": panels.code_bytes, "output_bytes": number_bytes * num_rows,
    }  # fmt: skip
    return context_of([fields.get(field, 0) for field in int4_words.FIELDS])


def _int8(memory: torch.Tensor, panels: Panels) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [panels, panel_rows, columns], over the same memory, and all rows' scales."""
    codes = memory[:, : panels.code_bytes].view(torch.int8).unflatten(1, (panels.panel_rows, panels.columns))
    return codes, memory[:, panels.code_bytes :].view(torch.bfloat16)[:, : panels.panel_rows].flatten()


_INPUTS = [int4_words.FIELDS.index(field) for field in ("words", "steps", "sums", "middles")]
_OUTPUT, _NEXT = map(int4_words.FIELDS.index, ("output", "next"))
