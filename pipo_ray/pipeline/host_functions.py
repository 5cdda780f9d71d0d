"""Functions that the processor runs where a CUDA stream's work comes to them, and what they write as a GPU reads it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor


class HostFunctions:
    """Puts functions on the stream that is current, behind what it was given before: a thread of the driver calls them
    when that is done, and what the stream is given afterwards waits for them. They must not call CUDA.

    CUDA driver API, `cuLaunchHostFunc`: torch has no name for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def __call__(self, function: int, context: int) -> None:
        """The function at `function` with the context at `context`, which both have to stay until it is over."""
        code = self._launch(torch.cuda.current_stream(self._device).cuda_stream, function, context)
        if code:
            raise RuntimeError(f"cuLaunchHostFunc: CUDA error {code}")


def as_device_sees(pinned: Tensor, device: torch.device) -> Tensor:
    """`pinned` memory, uint8 [n], as a tensor on `device`, whose kernels read it across the link themselves (CUDA's
    unified addresses). A copy of it would queue with the copy engine behind those of weights: 2.5 ms instead of 0.06
    (0.5 MB behind pieces of 32 MiB, H200).
    """
    return torch.as_tensor(_Interface(pinned), device=device)


class _Interface:
    """Memory in the form of https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def __init__(self, memory: Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (memory.nbytes,), "typestr": "|u1", "data": (memory.data_ptr(), False), "version": 3
        }  # fmt: skip
        self._memory = memory
