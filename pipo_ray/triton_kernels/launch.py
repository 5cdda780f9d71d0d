"""Launching a kernel again and again with the same numbers.

For every launch Triton looks at each argument to find out which of the compiled kernels it is for: 40 us of the host's,
beside 10 for the launch itself. A product in a sweep has the same numbers every time, and memory that begins on the
same multiples of bytes: it is for the kernel of the time before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton

_ALIGNED = 16
"""Bytes: whether an address is a multiple of it is all that a kernel is compiled for, of addresses
(`triton.runtime.jit`).
"""


class Launch:
    """Launches `kernel` on `grid` with `numbers` behind its tensors; `options` are how it is compiled.

    The compiled kernel itself is called from the second time on (`CompiledKernel.__getitem__`, of Triton 3.3 and
    later). An earlier Triton's takes other arguments and says so, and finds its kernel anew for each launch.
    """

    def __init__(
        self, kernel: triton.JITFunction, grid: tuple[int, ...], numbers: tuple[Any, ...], **options: int
    ) -> None:
        self._find = kernel[grid]
        self._grid = (*grid, 1, 1)[:3]
        self._numbers, self._options = numbers, options
        self._again: dict[int, Callable[..., object]] = {}
        self._finds_anew = False

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """On torch's current stream. None is an argument that the kernel has not."""
        kind = 0  # which are not there, and which are not aligned
        for tensor in tensors:
            kind = 3 * kind + (2 if tensor is None else tensor.data_ptr() % _ALIGNED != 0)
        again = self._again.get(kind)
        if again is None:
            compiled = self._find(*tensors, *self._numbers, **self._options)
            if compiled is not None and not self._finds_anew:  # None: Triton's interpreter
                self._again[kind] = compiled[self._grid]
            return
        try:
            again(*tensors, *self._numbers)
        except TypeError:
            self._finds_anew = True
            self._again.clear()
            self._find(*tensors, *self._numbers, **self._options)
