"""Products of many rows of bf16 inputs with a bf16 weight as it lies in a store, by the kernel in `amx.py`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from pipo_ray.compiled import amx
from pipo_ray.compiled.amx_bf16 import Bf16Rows
from pipo_ray.compiled.amx_inputs import InputPacking, PackedInputs
from pipo_ray.compiled.amx_shares import shares
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.part_run import Step

_FIELDS = (*amx.FIELDS, *Bf16Rows.fields)
_WEIGHT, _OUTPUT, _BIAS = (_FIELDS.index(name) for name in ("weight", "output", "bias"))


@dataclass(frozen=True)
class AmxRows:
    """A `RowsProduct`: `inputs` with rows of a weight bf16 [out, columns], plus `bias`, float32 with room to a multiple
    of `amx.ROWS` behind the last row, or the same `amx.ROWS` numbers for all, into `output` bf16 [n, out].
    """

    function: int
    inputs: PackedInputs
    columns: int
    bias: torch.Tensor
    bias_stride: int
    output: torch.Tensor

    def steps(self, rows: int, row_bytes: int) -> list[Step]:
        """See `RowsProduct`: one product for each of the inputs' parts."""
        output, output_bytes = self.output.data_ptr(), 2 * self.output.stride(0)
        made: list[Step] = []
        for memory, num_inputs in self.inputs.parts:
            words = (
                memory.data_ptr(), output, num_inputs, self.columns, rows, 0, output_bytes,
                *shares(rows, num_inputs, Bf16Rows.block_rows, torch.get_num_threads()), 0, row_bytes,
                self.bias.data_ptr(), self.bias_stride,
            )  # fmt: skip
            made.append(Step(self.function, words, _WEIGHT, {_OUTPUT: 2, _BIAS: self.bias_stride}))
            output += num_inputs * output_bytes
        return made


class CompiledAmx:
    """Multiplies bf16 inputs with bf16 weights by the matrix unit, where `amx_obstacle` gives none. One caller at a
    time.

    Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._packing = InputPacking(folder)
        self._code = MachineCode(amx.module(Bf16Rows()), folder)
        self._product = self._code.address(amx.PRODUCT)
        self._no_bias = torch.full((amx.ROWS,), -0.0)  # added to it every number stays what it is

    def pack(self, rows: torch.Tensor) -> PackedInputs:
        """See `InputPacking.pack`."""
        return self._packing.pack(rows)

    def linear_into(
        self, inputs: PackedInputs, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor
    ) -> None:
        """`F.linear` into `output`, bf16 [n, out]: what `pack` made of bf16 [n, columns], `weight` bf16 [out, columns],
        `bias` bf16 [out] or None. The rows of `weight` and of `output` are contiguous.
        """
        product = self.rows_product(inputs, weight.shape[1], bias, output)
        for step in product.steps(len(weight), 2 * weight.stride(0)):
            context = context_of(step.at(weight.data_ptr()))
            run_on_threads(step.function, ctypes.addressof(context), folder=self._folder)

    def rows_product(
        self, inputs: PackedInputs, columns: int, bias: torch.Tensor | None, output: torch.Tensor
    ) -> AmxRows:
        """The same with rows of a weight of so many `columns`."""
        of_bias, bias_stride = (self._no_bias, 0) if bias is None else (_padded(bias), 4)
        return AmxRows(self._product, inputs, columns, of_bias, bias_stride, output)


def _padded(bias: torch.Tensor) -> torch.Tensor:
    """In float32, with room for `amx.ROWS` behind any number."""
    padded = torch.zeros(len(bias) + amx.ROWS - 1)
    padded[: len(bias)] = bias
    return padded
