"""Products with weights of 16 or 8 bits by the kernels in `float_dots.py` and `float_outer.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pipo_ray.compiled import float_dots, float_outer
from pipo_ray.compiled.crew import add_on_threads, run_on_threads
from pipo_ray.compiled.dots_row import DotsRow
from pipo_ray.compiled.float_inputs import GroupedInputs, PaddedInputs, vectors_for
from pipo_ray.compiled.machine import MachineCode, context_of, run_here
from pipo_ray.compiled.outer_rows import OuterRows
from pipo_ray.compiled.row_products import inputs_at_once, product_name, rows_at_once
from pipo_ray.compiled.steps import Steps
from pipo_ray.compiled.widened import LANES, Element

LEAST_COLUMNS = LANES
"""Of a weight."""

MOST_SUMS = 1 << 20
"""How many sums a call makes at a time."""

_FEW_NUMBERS = 1 << 16  # that are sooner made ready than other threads are woken
_NAMES: dict[torch.dtype, Element] = {torch.bfloat16: "bfloat", torch.float16: "half", torch.int8: "i8"}


class CompiledFloats:
    """Multiplies inputs with weights of `dtype` in float32. One caller at a time.

    Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`). With few inputs a call takes 4
    bytes for each sum, for `MOST_SUMS` at most.
    """

    def __init__(self, dtype: torch.dtype, folder: Path | None = None) -> None:
        self.dtype, self._folder = dtype, folder
        dots, outer = (MachineCode(one.module(_NAMES[dtype]), folder) for one in (float_dots, float_outer))
        self._codes = dots, outer
        self._dots = [dots.address(product_name(count + 1)) for count in range(float_dots.MOST_INPUTS)]
        self._outer = {vectors: outer.address(float_outer.name(vectors)) for vectors in float_outer.VECTORS}
        self._group = {vectors: outer.address(float_outer.group_name(vectors)) for vectors in float_outer.VECTORS}
        # In bf16, with which every number stays what it is: times one, or added to the other.
        self._no_scale, self._no_bias = (torch.tensor([number], dtype=torch.bfloat16) for number in (1.0, -0.0))
        self._context = context_of([0] * len(float_dots.FIELDS))
        self._address = ctypes.addressof(self._context)
        self._row_inputs: dict[int, torch.Tensor] = {}
        self._awake = False

    def stay_awake(self, on: bool) -> None:
        """See `CompiledBf16.stay_awake`."""
        self._awake = on

    def dots_into(
        self, inputs: PaddedInputs, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """`F.linear` into `output` [n, out] of few inputs [n, columns]: `weight` [out, columns] or, in panels, [panels,
        rows, columns], whose rows are contiguous, times `scales` [out]; `bias` [out] or None. There are 8 columns at
        least, and nothing may be empty.
        """
        first = 0
        for part in inputs.parts:
            at_once = inputs_at_once(len(part), float_dots.MOST_INPUTS)
            side = float_dots.rows_side_by_side(at_once)
            for start, stop, some in _slabs(weight, output.shape[1], len(part)):
                sums = torch.empty(len(part), stop - start)
                self._context[:] = _words(part, some, sums, len(part), stop - start, side)
                run_on_threads(self._dots[at_once - 1], self._address, self._awake, self._folder)
                if scales is not None:
                    sums *= scales[start:stop]
                if bias is not None:
                    sums += bias[start:stop]
                output[first : first + len(part), start:stop] = sums
            first += len(part)

    def takes_row(self, weight: torch.Tensor) -> bool:
        """Whether `add_product` is for `weight` [out, columns]."""
        return self.dtype is weight.dtype is torch.bfloat16 and weight.shape[1] % LANES == 0

    def add_inputs(self, steps: Steps, row: torch.Tensor) -> torch.Tensor:
        """What `add_product` takes for a row of inputs, bf16 [columns], a multiple of 8: float32, filled by a step.
        Another row's of this length are in the same memory, so that lists of many layers take no more: products with
        one row come before the step of the next.
        """
        inputs = self._row_inputs.get(len(row))
        if inputs is None:
            inputs = self._row_inputs[len(row)] = torch.empty(len(row))
        words = row.data_ptr(), inputs.data_ptr(), len(row)
        steps.add(self._codes[0].address(float_dots.WIDEN), context_of(words), None, row, inputs)
        return inputs

    def add_product(
        self, steps: Steps, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """A step, on all threads, that fills `output`, bf16 [out] and contiguous, with the product of one row of
        `inputs`, float32 [columns], by `dots_into` otherwise; `scales` and `bias` are bf16.
        """
        side = float_dots.rows_side_by_side(1)
        words = list(_words(inputs, weight, output, 1, len(output), side))
        for numbers, none in ((scales, self._no_scale), (bias, self._no_bias)):
            words += (none.data_ptr(), 0) if numbers is None else (numbers.data_ptr(), 2 * numbers.stride(0))
        context, counter = context_of(words), float_dots.ROW_FIELDS.index("next")
        owned = inputs, weight, bias, scales, output, self
        add_on_threads(steps, self._codes[0].address(float_dots.ROW), context, counter, self._folder, *owned)

    def row_product(self, row: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> DotsRow:
        """The same with rows of a weight, while threads sleep between products: `row` and `output` are bf16."""
        added, stride = (self._no_bias, 0) if bias is None else (bias, 2 * bias.stride(0))
        inputs = row.to(torch.float32, memory_format=torch.contiguous_format)
        return DotsRow(self._codes[0].address(float_dots.ROW), inputs, self._no_scale, added, stride, output)

    def group(self, rows: torch.Tensor) -> GroupedInputs:
        """Inputs [n, columns], side by side: of this dtype, or bf16 for int8."""
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        num_rows, columns = rows.shape
        vectors = vectors_for(num_rows)
        width = float_outer.width(vectors)
        inputs = torch.empty(-(-num_rows // width), columns, width)
        words = (rows.data_ptr(), inputs.data_ptr(), num_rows, len(inputs), columns, 2 * rows.stride(0), 0)
        make_ready(self._group[vectors], words, rows.numel(), self._folder)
        return GroupedInputs(inputs, num_rows)

    def outer_into(
        self, inputs: GroupedInputs, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """The same of many inputs. The rows of `output` are contiguous."""
        product = self.rows_product(inputs, bias, output, scales)
        size = weight.element_size()
        panel = None if weight.dim() == 2 else (weight.shape[1], size * weight.stride(0))
        context = context_of(product.words(output.shape[1], weight.data_ptr(), size * weight.stride(-2), panel))
        run_on_threads(product.function, ctypes.addressof(context), False, self._folder)

    def rows_product(
        self, inputs: GroupedInputs, bias: torch.Tensor | None, output: torch.Tensor, scales: torch.Tensor | None = None
    ) -> OuterRows:
        """The same with rows of a weight."""
        return OuterRows(self._outer[inputs.vectors], inputs, output, scales, bias)


def make_ready(function: int, words: Sequence[int], count: int, folder: Path | None) -> None:
    """Run the function that makes `count` inputs ready for a kernel, with the context `words`."""
    context = context_of(words)
    if count <= _FEW_NUMBERS:
        run_here(function, ctypes.addressof(context))
    else:
        run_on_threads(function, ctypes.addressof(context), folder=folder)


def _slabs(weight: torch.Tensor, num_rows: int, num_inputs: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The first `num_rows` rows of a weight, in panels or not, so many at a time that their sums with so many inputs
    are no more than `MOST_SUMS`.
    """
    most = max(1, MOST_SUMS // num_inputs)
    if weight.dim() == 2:
        for start in range(0, num_rows, most):
            yield start, min(start + most, num_rows), weight[start : start + most]
        return
    of_panel = weight.shape[1]
    panels = most // of_panel
    if not panels:
        for first, panel in enumerate(weight):
            wanted = min(of_panel, num_rows - first * of_panel)
            for start, stop, some in _slabs(panel, wanted, num_inputs):
                yield first * of_panel + start, first * of_panel + stop, some
        return
    for first in range(0, -(-num_rows // of_panel), panels):
        stop = min((first + panels) * of_panel, num_rows)
        yield first * of_panel, stop, weight[first : first + panels]


def _words(
    inputs: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor, count: int, num_rows: int, side: int
) -> tuple[int, ...]:
    """The context of "dots"."""
    size, columns = weight.element_size(), weight.shape[-1]
    at_once = rows_at_once(size * columns, side)
    places = inputs.data_ptr(), weight.data_ptr(), sums.data_ptr()
    panel = (weight.shape[1], size * weight.stride(0)) if weight.dim() == 3 else (num_rows, 0)
    return (*places, count, columns, num_rows, 0, size * weight.stride(-2), at_once, *panel)
