"""What of a product by the matrix unit (`amx.py`) a thread takes at once."""

from __future__ import annotations

import heapq
from functools import lru_cache

from pipo_ray.compiled.amx import INPUTS, MOST_SUMS, ROWS

_FEW_INPUTS = 64
# Of the product of `ROWS` rows of a weight with `INPUTS` of inputs over the same columns: reading the inputs, once for
# all rows that a thread takes, and copying a block of the weight, once for all inputs. 72 rows of 14336 columns and 256
# inputs are better shared out by inputs, 64 by rows (`docs/architecture.md`).
_READ, _COPY = 0.5, 2.5
_FEW_TASKS = 8


def shares(num_rows: int, num_inputs: int, block_rows: int, num_threads: int) -> tuple[int, int]:
    """Rows of a weight and of inputs, multiples of `block_rows` and of `INPUTS`: with them `num_threads` threads, each
    of which takes the next task when it has done one, are ready first.

    With few inputs it is memory that takes the time, and a thread takes one block's rows: the order of reading is best.
    """
    if num_inputs <= _FEW_INPUTS:
        return block_rows, _up(num_inputs, INPUTS)
    return _chosen(num_rows, _up(num_inputs, INPUTS), block_rows, num_threads)


@lru_cache(maxsize=1024)
def _chosen(num_rows: int, num_inputs: int, block_rows: int, num_threads: int) -> tuple[int, int]:
    candidates: list[tuple[int, int]] = []
    for inputs_at_once in {_up(-(-num_inputs // parts), INPUTS) for parts in (1, num_threads)}:
        most = MOST_SUMS // inputs_at_once // block_rows * block_rows
        fewest = -(-num_rows // most)
        # Of many tasks for each thread one more or less is no matter.
        tasks = range(fewest, fewest + num_threads + 1) if fewest <= _FEW_TASKS * num_threads else (fewest,)
        candidates.extend((_up(-(-num_rows // number), block_rows), inputs_at_once) for number in tasks)
    # Where that is as long, the largest shares.
    return min(
        candidates, key=lambda share: (_duration(num_rows, num_inputs, share, num_threads), -share[0], -share[1])
    )


def _duration(num_rows: int, num_inputs: int, share: tuple[int, int], num_threads: int) -> float:
    """Until all threads are ready, in products of `ROWS` with `INPUTS` rows."""
    rows_at_once, inputs_at_once = share
    ready = [0.0] * num_threads
    for first in range(0, num_rows, rows_at_once):
        blocks = -(-min(rows_at_once, num_rows - first) // (ROWS // 2)) / 2  # a half is multiplied by itself
        for first_input in range(0, num_inputs, inputs_at_once):
            pairs = -(-min(inputs_at_once, num_inputs - first_input) // INPUTS)
            heapq.heapreplace(ready, ready[0] + blocks * pairs + _READ * pairs + _COPY * blocks)
    return max(ready)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
