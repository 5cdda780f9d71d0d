"""What of a product by the matrix unit (`amx.py`) a thread takes at once."""

from __future__ import annotations

from functools import lru_cache

from pipo_ray.compiled.amx import INPUTS, MOST_SUMS, ROWS
from pipo_ray.compiled.thread_shares import end, parts

_FEW_INPUTS = 64
# Of the product of `ROWS` rows of a weight with `INPUTS` of inputs over the same columns: reading the inputs, once for
# all rows that a thread takes, and copying a block of the weight, once for all inputs. 72 rows of 14336 columns and 256
# inputs are better shared out by inputs, 64 by rows (`docs/architecture.md`).
_READ, _COPY = 0.5, 2.5


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
    for inputs_at_once in {_up(-(-num_inputs // number), INPUTS) for number in (1, num_threads)}:
        most = MOST_SUMS // inputs_at_once // block_rows * block_rows
        fewest = -(-num_rows // most)
        tasks = range(fewest, fewest + num_threads + 1)
        candidates.extend((_up(-(-num_rows // number), block_rows), inputs_at_once) for number in tasks)
    # Where that is as long, the largest shares.
    return min(candidates, key=lambda share: (_end(num_rows, num_inputs, share, num_threads), -share[0], -share[1]))


def _end(num_rows: int, num_inputs: int, share: tuple[int, int], num_threads: int) -> float:
    # In products of `ROWS` with `INPUTS` rows; half of `ROWS` are multiplied by themselves.
    blocks = [-(-rows // (ROWS // 2)) / 2 for rows in parts(num_rows, share[0])]
    pairs = [inputs // INPUTS for inputs in parts(num_inputs, share[1])]
    return end(blocks, pairs, num_threads, row_cost=_COPY, input_cost=_READ)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
