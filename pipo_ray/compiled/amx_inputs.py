"""Rows of inputs in tiles, for products by the matrix unit (`amx.py`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from pipo_ray.compiled import amx
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of

_ALIGNED = 64


@dataclass(frozen=True)
class PackedInputs:
    """Rows of inputs in tiles: memory of each `amx.MOST_INPUTS`, and how many rows there are."""

    parts: tuple[tuple[torch.Tensor, int], ...]


class InputPacking:
    """Puts inputs into tiles, for all weights. Compiled when it is made; `folder` is where machine code is kept (see
    `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._code = MachineCode(amx.pack_module(), folder)

    def pack(self, rows: torch.Tensor) -> PackedInputs:
        """Inputs bf16 [n, columns]: as much memory again, with rows rounded up to 32 and columns to 256. Nothing may be
        empty.
        """
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        parts = []
        at_once = -(-len(rows) // -(-len(rows) // amx.MOST_INPUTS))  # about the same every time
        for part in rows.split(-(-at_once // amx.INPUTS) * amx.INPUTS):
            num_inputs, columns = part.shape
            size = amx.packed_bytes(num_inputs, columns)
            memory = torch.empty(size + _ALIGNED, dtype=torch.uint8)
            memory = memory[-memory.data_ptr() % _ALIGNED :][:size]
            context = context_of((part.data_ptr(), memory.data_ptr(), num_inputs, columns, 2 * part.stride(0), 0))
            run_on_threads(self._code.address(amx.PACK), ctypes.addressof(context), folder=self._folder)
            parts.append((memory, num_inputs))
        return PackedInputs(tuple(parts))
