"""Products of many rows of bf16 inputs by the kernel in `amx.py`."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch

from pipo_ray.compiled import amx
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.part_run import Step
from pipo_ray.compiled.support import obstacle
from pipo_ray.quant.panels import processor_flags

_NEEDED = {"amx_tile", "amx_bf16"}
# arch/x86/include/uapi/asm/prctl.h and Documentation/arch/x86/xstate.rst: a process asks for the tiles' registers.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILE_DATA = 158, 0x1023, 18
_ALIGNED = 64
_FEW_INPUTS = 64


def amx_obstacle(flags: Set[str] | None = None) -> str | None:
    """Why the matrix unit cannot be used here, in words for the user; None if it can, now that Linux was asked for it.
    `flags` are those of the processor in /proc/cpuinfo.
    """
    missing = sorted(_NEEDED - (processor_flags() if flags is None else flags))
    if missing:
        return f"this processor has no {', '.join(name.upper() for name in missing)}"
    reason = obstacle()
    if reason is None and platform.machine() == "x86_64":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILE_DATA):
            return f"Linux does not let this process use AMX (arch_prctl: error {ctypes.get_errno()})"
    return reason


@dataclass(frozen=True)
class PackedInputs:
    """Rows of inputs in tiles: memory of each `amx.MOST_INPUTS`, and how many rows there are."""

    parts: tuple[tuple[torch.Tensor, int], ...]


@dataclass(frozen=True)
class AmxRows:
    """A `RowsProduct`: `inputs` with rows of a weight bf16 [out, columns], plus `bias`, float32 with room to a multiple
    of `amx.ROWS` behind the last row, or the same `amx.ROWS` numbers for all, into `output` bf16 [n, out].
    """

    function: int
    inputs: PackedInputs
    columns: int
    bias: torch.Tensor
    bias_stride: int
    output: torch.Tensor

    def steps(self, start: int, stop: int, address: int, row_bytes: int) -> list[Step]:
        """See `RowsProduct`: one product for each of the inputs' parts."""
        rows, output_bytes = stop - start, 2 * self.output.stride(0)
        bias = self.bias.data_ptr() + start * self.bias_stride
        output = self.output.data_ptr() + 2 * start
        made: list[Step] = []
        for memory, num_inputs in self.inputs.parts:
            words = (
                memory.data_ptr(), address, bias, output, num_inputs, self.columns, rows, 0, row_bytes,
                self.bias_stride, output_bytes, _rows_at_once(rows, num_inputs),
            )  # fmt: skip
            made.append((self.function, words))
            output += num_inputs * output_bytes
        return made


class CompiledAmx:
    """Multiplies bf16 inputs with bf16 weights by the matrix unit, where `amx_obstacle` gives none. One caller at a
    time.

    Compiled when it is made; `folder` is where machine code is kept (see `MachineCode`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._code = MachineCode(amx.module(), folder)
        self._pack, self._product = self._code.address(amx.PACK), self._code.address(amx.PRODUCT)
        self._no_bias = torch.full((amx.ROWS,), -0.0)  # added to it every number stays what it is

    def pack(self, rows: torch.Tensor) -> PackedInputs:
        """Inputs bf16 [n, columns] for `linear_into`: as much memory again, and up to 15 rows. Nothing may be empty."""
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        parts = []
        at_once = -(-len(rows) // -(-len(rows) // amx.MOST_INPUTS))  # about the same every time
        for part in rows.split(-(-at_once // amx.INPUTS) * amx.INPUTS):
            num_inputs, columns = part.shape
            size = amx.packed_bytes(num_inputs, columns)
            memory = torch.empty(size + _ALIGNED, dtype=torch.uint8)
            memory = memory[-memory.data_ptr() % _ALIGNED :][:size]
            words = (part.data_ptr(), memory.data_ptr(), num_inputs, columns, 2 * part.stride(0), 0)
            self._run(self._pack, words)
            parts.append((memory, num_inputs))
        return PackedInputs(tuple(parts))

    def linear_into(
        self, inputs: PackedInputs, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor
    ) -> None:
        """`F.linear` into `output`, bf16 [n, out]: what `pack` made of bf16 [n, columns], `weight` bf16 [out, columns],
        `bias` bf16 [out] or None. The rows of `weight` and of `output` are contiguous.
        """
        product = self.rows_product(inputs, weight.shape[1], bias, output)
        for function, words in product.steps(0, len(weight), weight.data_ptr(), 2 * weight.stride(0)):
            self._run(function, words)

    def rows_product(
        self, inputs: PackedInputs, columns: int, bias: torch.Tensor | None, output: torch.Tensor
    ) -> AmxRows:
        """The same with rows of a weight of so many `columns`."""
        of_bias, bias_stride = (self._no_bias, 0) if bias is None else (_padded(bias), 4)
        return AmxRows(self._product, inputs, columns, of_bias, bias_stride, output)

    def _run(self, function: int, words: tuple[int, ...]) -> None:
        context = context_of(words)
        run_on_threads(function, ctypes.addressof(context), folder=self._folder)


def _padded(bias: torch.Tensor) -> torch.Tensor:
    """In float32, with room for `amx.ROWS` behind any number."""
    padded = torch.zeros(len(bias) + amx.ROWS - 1)
    padded[: len(bias)] = bias
    return padded


def _rows_at_once(num_rows: int, num_inputs: int) -> int:
    """As many tasks for every thread, of about the same size. With few inputs it is memory that takes the time, and a
    block's next columns are better asked for right before they are read.
    """
    if num_inputs <= _FEW_INPUTS:
        return amx.ROWS
    threads = torch.get_num_threads()
    tasks = threads * -(-num_rows // (amx.MOST_ROWS * threads))
    return -(-num_rows // (tasks * amx.ROWS)) * amx.ROWS
