"""Products with 16-bit weights by the kernels in `float_dots.py` and `float_outer.py`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from pipo_ray.compiled import float_dots, float_outer
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.row_products import inputs_at_once, product_name
from pipo_ray.compiled.widened import LANES, Half

LEAST_COLUMNS = LANES

_TASK_BYTES = 256 << 10  # of a weight: what threads take from each other
_NAMES: dict[torch.dtype, Half] = {torch.bfloat16: "bfloat", torch.float16: "half"}


class CompiledFloats:
    """Multiplies 16-bit inputs with 16-bit weights of `dtype` in float32. One caller at a time.

    Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, dtype: torch.dtype, folder: Path | None = None) -> None:
        self._folder = folder
        dots, outer = (MachineCode(one.module(_NAMES[dtype]), folder) for one in (float_dots, float_outer))
        self._codes = dots, outer
        self._dots = [dots.address(product_name(count + 1)) for count in range(float_dots.MOST_INPUTS)]
        self._outer = {vectors: outer.address(float_outer.name(vectors)) for vectors in float_outer.VECTORS}
        self._context = context_of([0] * max(len(float_dots.FIELDS), len(float_outer.FIELDS)))
        self._address = ctypes.addressof(self._context)
        self._awake = False

    def stay_awake(self, on: bool) -> None:
        """See `CompiledBf16.stay_awake`."""
        self._awake = on

    def dots(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`F.linear`: `rows` [n, columns], `weight` [out, columns], whose rows are contiguous, `bias` [out] or None;
        [n, out]. There are 8 columns at least. For few rows.
        """
        sums = torch.empty(len(rows), len(weight))
        for start in range(0, len(rows), float_dots.KEPT_INPUTS):
            part = slice(start, start + float_dots.KEPT_INPUTS)
            self._dots_into(_padded(rows[part]), weight, sums[part])
        if bias is not None:
            sums += bias
        return sums.to(rows.dtype)

    def outer(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same for many rows."""
        output = rows.new_empty(len(rows), len(weight))
        vectors = best_vectors(len(rows))
        most = float_outer.MOST_GROUPS * float_outer.width(vectors)
        for start in range(0, len(rows), most):
            part = slice(start, start + most)
            self._outer_into(rows[part], vectors, weight, bias, output[part])
        return output

    def _dots_into(self, inputs: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> None:
        at_once = inputs_at_once(len(inputs), float_dots.MOST_INPUTS)
        side = float_dots.rows_side_by_side(at_once)
        self._context[:] = self._words(inputs, weight, sums, len(inputs), side)
        run_on_threads(self._dots[at_once - 1], self._address, self._awake, self._folder)

    def _outer_into(
        self, rows: torch.Tensor, vectors: int, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor
    ) -> None:
        width = float_outer.width(vectors)
        groups = -(-len(rows) // width)
        inputs = torch.zeros(groups, rows.shape[1], width)
        sums = torch.empty(groups, len(weight), width)
        for group, part in enumerate(rows.split(width)):
            inputs[group, :, : len(part)] = part.T
        side = float_outer.rows_side_by_side(vectors)
        self._context[:] = self._words(inputs, weight, sums, groups, side)
        run_on_threads(self._outer[vectors], self._address, False, self._folder)
        if bias is not None:
            sums += bias[:, None]
        for part, one in zip(output.split(width), sums, strict=True):
            part.copy_(one.T[: len(part)])

    def _words(
        self, inputs: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor, count: int, side: int
    ) -> tuple[int, ...]:
        rows, columns = weight.shape
        at_once = max(1, _TASK_BYTES // (2 * columns * side)) * side
        places = inputs.data_ptr(), weight.data_ptr(), sums.data_ptr()
        return (*places, count, columns, rows, 0, 2 * weight.stride(0), at_once)


def best_vectors(num_rows: int) -> int:
    """So many vectors of inputs side by side that least is computed for nothing, and the more the better."""
    return min(float_outer.VECTORS, key=lambda vectors: (-(-num_rows // (LANES * vectors)) * vectors, -vectors))


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Inputs as `float_dots.padded` has them."""
    columns = rows.shape[1]
    rest = columns % LANES
    if not rest:
        return rows.float()
    inputs = torch.zeros(len(rows), float_dots.padded(columns))
    inputs[:, : columns - rest] = rows[:, : columns - rest]
    inputs[:, -rest:] = rows[:, -rest:]
    return inputs
