"""Products of one row of inputs with rows of a bf16 weight by the kernel `ROW` of `float_dots.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipo_ray.compiled import float_dots
from pipo_ray.compiled.part_run import Step
from pipo_ray.compiled.row_products import rows_at_once

_WEIGHT, _OUTPUT, _BIAS = (float_dots.ROW_FIELDS.index(name) for name in ("weight", "output", "bias"))


@dataclass(frozen=True)
class DotsRow:
    """A `RowsProduct`: one row of `inputs`, float32 [columns], a multiple of 8, with rows of a weight bf16
    [out, columns], times `scale`, one number, plus `bias` bf16 [out], or one number for all, into `output` bf16 [out].
    All are contiguous but the bias. `function` is the kernel's address.
    """

    function: int
    inputs: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    bias_bytes: int
    output: torch.Tensor

    def steps(self, rows: int, row_bytes: int) -> list[Step]:
        """See `RowsProduct`."""
        columns = len(self.inputs)
        words = (
            self.inputs.data_ptr(), 0, self.output.data_ptr(), 1, columns, rows, 0, row_bytes,
            rows_at_once(2 * columns, float_dots.rows_side_by_side(1)), rows, 0,
            self.scale.data_ptr(), 0, self.bias.data_ptr(), self.bias_bytes,
        )  # fmt: skip
        return [Step(self.function, words, _WEIGHT, {_OUTPUT: 2, _BIAS: self.bias_bytes})]
