"""Products with bf16 weights by the kernel in `bf16.py`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from pipo_ray.compiled import bf16
from pipo_ray.compiled.crew import add_on_threads, run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.part_run import Step
from pipo_ray.compiled.row_products import inputs_at_once, product_name, rows_at_once
from pipo_ray.compiled.steps import Steps

_WEIGHT, _OUTPUT, _BIAS = (bf16.FIELDS.index(name) for name in ("weight", "output", "bias"))


@dataclass(frozen=True)
class Bf16Rows:
    """A `RowsProduct`: one row of inputs, bf16 [columns], with rows of a weight bf16 [out, columns], plus `bias` bf16
    [out], or one number for all, into `output` bf16 [out]. All are contiguous but the bias.
    """

    function: int
    inputs: torch.Tensor
    bias: torch.Tensor
    bias_stride: int
    output: torch.Tensor

    def steps(self, rows: int, row_bytes: int) -> list[Step]:
        """See `RowsProduct`."""
        places = self.inputs.data_ptr(), 0, self.bias.data_ptr(), self.output.data_ptr()
        words = _words(*places, 1, rows, len(self.inputs), row_bytes, self.bias_stride)
        return [Step(self.function, words, _WEIGHT, {_OUTPUT: 2, _BIAS: self.bias_stride})]


class CompiledBf16:
    """Multiplies bf16 inputs with bf16 weights. One caller at a time.

    Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        code = MachineCode(bf16.module(), folder)
        self._code = code
        self._functions = [code.address(product_name(count + 1)) for count in range(bf16.MOST_INPUTS)]
        self._context = context_of([0] * len(bf16.FIELDS))
        self._address = ctypes.addressof(self._context)
        self._no_bias = torch.tensor([-0.0], dtype=torch.bfloat16)  # added to it every number stays what it is
        self._awake = False

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`F.linear`: `rows` bf16 [n, columns], `weight` bf16 [out, columns], whose rows are contiguous, `bias` bf16
        [out] or None; bf16 [n, out]. Nothing may be empty.
        """
        rows = rows.contiguous()
        num_inputs = len(rows)
        output = rows.new_empty(num_inputs, len(weight))
        self._context[:] = self._words_of(rows, weight, bias, output)
        function = self._functions[inputs_at_once(num_inputs, bf16.MOST_INPUTS) - 1]
        run_on_threads(function, self._address, num_inputs <= bf16.MOST_INPUTS and self._awake, self._folder)
        return output

    def add_inputs(self, steps: Steps, row: torch.Tensor) -> torch.Tensor:
        """What `add_product` takes for a row of inputs: the row itself."""
        return row

    def add_product(
        self, steps: Steps, row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor
    ) -> None:
        """A step, on all threads, that fills `output`, bf16 [out] and contiguous, with the product of a `row` of
        inputs, bf16 [columns] and contiguous. See `linear`.
        """
        context = context_of(self._words_of(row[None], weight, bias, output))
        owned = row, weight, bias, output, self
        add_on_threads(steps, self._functions[0], context, bf16.FIELDS.index("next"), self._folder, *owned)

    def rows_product(self, row: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> Bf16Rows:
        """The same with rows of a weight, while threads sleep between products."""
        return Bf16Rows(self._functions[0], row, *self._bias(bias), output)

    def stay_awake(self, on: bool) -> None:
        """Whether threads wait awake for a little after a product with few inputs. For weights that stay where they
        are: the next product comes soon.
        """
        self._awake = on

    def _words_of(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor
    ) -> tuple[int, ...]:
        of_bias, bias_stride = self._bias(bias)
        places = rows.data_ptr(), weight.data_ptr(), of_bias.data_ptr(), output.data_ptr()
        num_rows, columns = weight.shape
        return _words(*places, len(rows), num_rows, columns, 2 * weight.stride(0), bias_stride)

    def _bias(self, bias: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        return (self._no_bias, 0) if bias is None else (bias, 2 * bias.stride(0))


def _words(
    inputs: int, weight: int, bias: int, output: int, num_inputs: int, num_rows: int, columns: int, row_bytes: int,
    bias_stride: int,
) -> tuple[int, ...]:  # fmt: skip
    """The context of a product (`bf16.FIELDS`)."""
    block = -(-columns // 32) * 64 if num_inputs <= bf16.MOST_INPUTS else bf16.BLOCK_BYTES
    return (
        inputs, weight, bias, output, num_inputs, columns, num_rows, 0, row_bytes, bias_stride,
        rows_at_once(2 * columns, bf16.ROWS), block,
    )  # fmt: skip
