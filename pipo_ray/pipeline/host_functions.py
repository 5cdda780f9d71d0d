"""Functions that the processor runs where a CUDA stream's work comes to them."""

from __future__ import annotations

import ctypes

import torch


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
