"""Matrices in bf16 for tests of compiled products, and what such a product must not do to them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator

import torch

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of inputs [n, columns] and a weight [rows, columns]: [n, rows]."""

_PROT_NONE, _PROT_BOTH = 0, mmap.PROT_READ | mmap.PROT_WRITE


def matrix(rows: int, columns: int, gap: int = 0, offset: int = 0) -> torch.Tensor:
    """Random, `gap` numbers between two rows, `offset` in front."""
    memory = torch.randn(rows * (columns + gap) + offset).bfloat16()
    return memory[offset:].view(rows, columns + gap)[:, :columns]


@contextlib.contextmanager
def at_the_end(count: int, rows: int, columns: int) -> Iterator[list[torch.Tensor]]:
    """So many random matrices, of at most a page, behind each of which is a page that cannot be read."""
    page = mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    memories = [torch.frombuffer(mmap.mmap(-1, 2 * page), dtype=torch.bfloat16) for _ in range(count)]
    for memory in memories:
        assert protect(memory.data_ptr() + page, page, _PROT_NONE) == 0
    try:
        ends = [memory[page // 2 - rows * columns : page // 2].view(rows, columns) for memory in memories]
        yield [end.copy_(torch.randn(rows, columns)) for end in ends]
    finally:
        for memory in memories:
            assert protect(memory.data_ptr() + page, page, _PROT_BOTH) == 0


def check_no_numbers(product: Product, num_inputs: int, rows: int, columns: int, value: float) -> None:
    """`value`, which is no number or infinite, in the first or the last column of the last row of the inputs and of the
    weight, changes what is computed with it and nothing else.
    """
    x, weight = torch.ones(num_inputs, columns).bfloat16(), torch.ones(rows, columns).bfloat16()
    for at in (0, columns - 1):
        x[-1, at] = weight[-1, at] = value
        expected = torch.full((num_inputs, rows), columns).bfloat16()
        expected[-1] = expected[:, -1] = value
        expected[-1, -1] = value * value
        assert torch.equal(product(x, weight).nan_to_num(nan=5.0), expected.nan_to_num(nan=5.0))
        x[-1, at] = weight[-1, at] = 1.0
