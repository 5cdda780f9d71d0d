"""When threads are done that share a product of rows of a weight with inputs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_FEW_SHARES = 8
"""For each thread: with more it does not matter who takes the last ones."""


def parts(count: int, at_once: int) -> list[int]:
    """How many each share of `count` has."""
    return [min(at_once, count - start) for start in range(0, count, at_once)]


def end(
    row_parts: Sequence[float],
    input_parts: Sequence[int],
    num_threads: int,
    *,
    row_cost: float,
    input_cost: float,
    late: float = 0.0,
) -> float:
    """When all are done that take one share after the other, each of rows of one part with inputs of another. A row
    times an input takes 1; a row of a share takes `row_cost` besides, an input `input_cost`; all threads but the first
    come `late`.
    """
    costs = [height * (width + row_cost) + width * input_cost for height in row_parts for width in input_parts]
    if len(costs) > _FEW_SHARES * num_threads:
        return sum(costs) / num_threads + max(costs) / 2
    ends = [0.0] + [late] * (num_threads - 1)
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)
