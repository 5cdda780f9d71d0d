"""Products of many inputs with rows of a weight by the kernel in `float_outer.py`, shared out among threads."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from pipo_ray.compiled import float_outer
from pipo_ray.compiled.float_inputs import GroupedInputs
from pipo_ray.compiled.part_run import Step
from pipo_ray.compiled.thread_shares import end, parts
from pipo_ray.compiled.widened import LANES

_WEIGHT, _OUTPUT, _SCALES, _BIAS = (float_outer.FIELDS.index(name) for name in ("weight", "output", "scales", "bias"))
_ROW_COST = 0.15
_GROUP_COST = 1.5
"""What it takes to widen a row of the weight, and to bring a group of inputs near, when a row times a group takes 1."""
_LATE = 16.0
"""What the other threads come late, in the same unit: 0.03 ms of 4,096 columns."""

_ALL_ROWS = {number: torch.full((LANES,), number) for number in (1.0, -0.0)}
"""Multiplied with one of them, or added to the other, every number stays what it is."""


class OuterRows:
    """A `RowsProduct`: `inputs` with rows of a weight [out, columns], times `scales` [out] or None, plus `bias` [out]
    or None, into `output` [n, out], whose rows are contiguous. `function` is the kernel's address.
    """

    def __init__(
        self, function: int, inputs: GroupedInputs, output: torch.Tensor, scales: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.function = function
        self._inputs, self._output = inputs, output
        self._scales, self._bias = _of_rows(scales, 1.0), _of_rows(bias, -0.0)
        self._num_threads = torch.get_num_threads()

    def steps(self, rows: int, row_bytes: int) -> list[Step]:
        """See `RowsProduct`."""
        moves = {_OUTPUT: 2, _SCALES: self._scales[1], _BIAS: self._bias[1]}
        return [Step(self.function, self.words(rows, 0, row_bytes), _WEIGHT, moves)]

    def words(self, rows: int, address: int, row_bytes: int, panel: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The context (`float_outer.FIELDS`) of the product with the first rows. In panels of so many rows, those are
        `panel[1]` bytes apart.
        """
        memory = self._inputs.memory
        groups, columns, _ = memory.shape
        rows_at_once, groups_at_once = shares(rows, groups, self._inputs.vectors, self._num_threads)
        (scales, scale_bytes), (bias, bias_bytes) = self._scales, self._bias
        return (
            memory.data_ptr(), address, self._output.data_ptr(), groups, columns, rows, 0, row_bytes,
            rows_at_once, *(panel or (rows, 0)), groups_at_once, self._inputs.num_rows, 2 * self._output.stride(0),
            scales.data_ptr(), scale_bytes, bias.data_ptr(), bias_bytes,
        )  # fmt: skip


def _of_rows(numbers: torch.Tensor | None, otherwise: float) -> tuple[torch.Tensor, int]:
    """As the kernel takes them, and the bytes from one to the next."""
    if numbers is None:
        return _ALL_ROWS[otherwise], 0
    padded = torch.zeros(len(numbers) + LANES - 1)
    padded[: len(numbers)] = numbers
    return padded, 4


def row_multiple(vectors: int) -> int:
    """What `shares` are a multiple of: whole steps of the kernel, and whole vectors of results."""
    return math.lcm(float_outer.rows_side_by_side(vectors), LANES)


@lru_cache(maxsize=4096)
def shares(rows: int, groups: int, vectors: int, num_threads: int) -> tuple[int, int]:
    """How many rows of a weight, and how many groups of inputs with so many `vectors`, a thread takes at once, so that
    all are done soonest. Fewer rows want the inputs more often, fewer groups want rows widened again, and of large
    shares the last ones leave threads without work.
    """
    multiple = row_multiple(vectors)
    fewest = -(-groups // float_outer.MOST_GROUPS)
    choices = [
        (at_once, some)
        for some in sorted({-(-groups // number) for number in range(fewest, groups + 1)}, reverse=True)
        for at_once in range(multiple, float_outer.MOST_ROWS + 1, multiple)
    ]
    costs = {"row_cost": _ROW_COST, "input_cost": _GROUP_COST, "late": _LATE}
    return min(choices, key=lambda choice: end(parts(rows, choice[0]), parts(groups, choice[1]), num_threads, **costs))
