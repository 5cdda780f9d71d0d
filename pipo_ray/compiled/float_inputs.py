"""Rows of inputs in float32 as the kernels in `float_dots.py` and `float_outer.py` take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipo_ray.compiled import float_dots, float_outer
from pipo_ray.compiled.widened import LANES

_GROUP_COSTS = {2: 1.0, 3: 1.31}
"""Of a group with so many vectors (2 cores AMD EPYC, `benchmarks/cpu_compute.py`)."""


@dataclass(frozen=True)
class PaddedInputs:
    """For `float_dots`: of at most `KEPT_INPUTS` rows each, float32 [rows, `float_dots.padded`(columns)]."""

    parts: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, rows: torch.Tensor) -> PaddedInputs:
        """Inputs [n, columns]."""
        return cls(tuple(map(_padded, rows.split(float_dots.KEPT_INPUTS))))


@dataclass(frozen=True)
class GroupedInputs:
    """For `float_outer`: `num_rows` rows in `memory`, float32 [groups, columns, rows side by side]; where the last
    group lacks rows, it has the last one again.
    """

    memory: torch.Tensor
    num_rows: int

    @property
    def vectors(self) -> int:
        """Of inputs side by side."""
        return self.memory.shape[2] // LANES


def vectors_for(num_rows: int) -> int:
    """So many vectors of inputs side by side that it takes least: most is lost to zeros, and a little to reading
    widened weights once more.
    """
    return min(float_outer.VECTORS, key=lambda vectors: -(-num_rows // (LANES * vectors)) * _GROUP_COSTS[vectors])


def _padded(rows: torch.Tensor) -> torch.Tensor:
    columns = rows.shape[1]
    rest = columns % LANES
    if not rest:
        return rows.to(torch.float32, memory_format=torch.contiguous_format)
    inputs = torch.zeros(len(rows), float_dots.padded(columns))
    inputs[:, : columns - rest] = rows[:, : columns - rest]
    inputs[:, -rest:] = rows[:, -rest:]
    return inputs
