"""What the kernels have in common that read a weight row by row: names, and how its rows are shared out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipo_ray.compiled.ir import Function

TASK_BYTES = 256 << 10  # of a weight: what threads take from each other


def product_name(num_inputs: int) -> str:
    """The function that computes `num_inputs` rows at once, or fewer where they do not divide all rows of inputs."""
    return f"product{num_inputs}"


def inputs_at_once(num_inputs: int, most: int) -> int:
    """Of rows of inputs, those that are computed at once, at most `most`: about the same every time."""
    return -(-num_inputs // -(-num_inputs // most))


def rows_at_once(row_bytes: int, side: int) -> int:
    """Rows of a weight that a thread takes at once, of which `side` are computed side by side."""
    return max(1, TASK_BYTES // (row_bytes * side)) * side


@contextlib.contextmanager
def rows_taken(f: Function, side_by_side: int) -> Iterator[list[str]]:
    """For each so many rows of a weight of those that this thread takes, by the words `rows`, `rows_at_once` (a
    multiple of them) and `next` of a context: their numbers. Past the end the last row comes again.
    """
    rows, chunk = f.field("rows"), f.field("rows_at_once")
    tasks = f.value(f"udiv i64 {f.add(rows, f.add(chunk, -1))}, {chunk}")
    with f.tasks(f.place_of("next"), tasks) as task:
        start = f.multiply(task, chunk)
        with f.loop(f.without(f.least(f.add(start, chunk), rows), start), side_by_side) as offset:
            first = f.add(start, offset)
            yield [f.least(f.add(first, number), f.add(rows, -1)) for number in range(side_by_side)]
