"""Products with low-bit panels on a CUDA device. Importing this needs triton.

Kernels by name: for int4 "codes" multiplies by tensor cores, with codes as they are; for int8 "vector" multiplies up to
four rows of inputs in float32, and "tiles" any number by tensor cores. All of them straight from the panels, with one
launch for all panels of a weight; "tiles" rounds weights to bf16, the others do not. "native" unpacks part of a weight
into scratch memory as bf16 and has torch multiply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from pipo_ray.model.kernel_profile import GPU_SCRATCH_BYTES, Kernel, KernelProfile, Layout
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, Panels
from pipo_ray.triton_kernels import int4, int8
from pipo_ray.triton_kernels.launch import Launch


class RowsProduct(Protocol):
    """A product of inputs with rows of a weight."""

    def __call__(
        self, rows: torch.Tensor, bias: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Inputs bf16 [n, columns] in, products bf16 [n, rows] out: `output` where it is given, whose rows may lie
        apart. `bias`, bf16 [rows], is added to them.
        """
        ...


_Chunk = tuple[Launch, torch.Tensor, torch.Tensor, slice]
"""A launch that unpacks rows of a weight, the matrix that it fills; what of the matrix is multiplied, as [columns,
rows], and the columns of the output that it gives.
"""

MOST_INPUTS: Mapping[Kernel, int] = {"vector": 4}
"""Rows of inputs that a kernel takes at most; others any number."""

_MOST_PARTS = 16
_INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True)
class Tuning:
    """How kernels are cut: programs for each multiprocessor, as several must wait for memory at the same time, and
    steps of their loops that are loaded ahead, one less than stages.
    """

    codes_programs: int = 8
    codes_stages: int = 3
    tiles_programs: int = 4
    tiles_stages: int = 3


class TritonProducts:
    """Multiplies bf16 inputs with panels on `device`. One caller at a time, on torch's current stream.

    Takes `scratch_bytes` of the device's memory, for parts of sums and for unpacked weights: at least what 64 rows of a
    weight are in bf16. On the CPU only under Triton's interpreter.
    """

    def __init__(
        self, device: torch.device, scratch_bytes: int = GPU_SCRATCH_BYTES, tuning: Tuning | None = None
    ) -> None:
        self._tuning = tuning or Tuning()
        on_gpu = device.type == "cuda"
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else _INTERPRETED_PROCESSORS
        )
        self._dot = tl.bfloat16 if on_gpu else tl.float32
        with torch.inference_mode(False):  # written to in and out of inference mode
            self._scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
            self._arrivals = torch.zeros(1 << 16, dtype=torch.int32, device=device)

    def product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int, kernel: Kernel
    ) -> RowsProduct:
        """`F.linear` with the first `num_rows` rows in the panels `memory`, uint8 [panels, panel_bytes]: takes inputs,
        bf16 [num_inputs, columns] and contiguous, and gives bf16 [num_inputs, num_rows]. `kernel` is one of those
        above, for no more inputs than it takes.
        """
        if not num_inputs:
            return _nothing(num_rows)
        of_int4 = {"codes": self._int4_codes, "native": self._int4_unpacked}
        of_int8 = {"vector": self._int8_vector, "tiles": self._int8_tiles, "native": self._int8_unpacked}
        makers = of_int4 if panels.low_bit.bits == 4 else of_int8
        return makers[kernel](memory, panels, num_rows, num_inputs)

    def choose(self, profile: KernelProfile, num_inputs: int, panels: Panels, num_rows: int) -> Kernel:
        """The kernel that takes the least time for the product of so many inputs with `num_rows` rows in such panels,
        by what was measured.
        """
        if not num_inputs:
            return "native"
        without = [kernel for kernel, most in MOST_INPUTS.items() if num_inputs > most]
        chunks = -(-num_rows // self._rows_at_once(panels.columns))
        return profile.choose(layout_of(panels), num_inputs, num_rows * panels.columns, without, {"native": chunks})

    def _int4_codes(self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> RowsProduct:
        block, group = INT4_LAYOUTS[panels.layout].block, panels.low_bit.group
        inputs = 8 if num_inputs <= 8 else 16
        programs, tiles = triton.cdiv(num_rows, int4.PROGRAM_ROWS), triton.cdiv(num_inputs, inputs)
        counters = programs * tiles
        wanted = self._tuning.codes_programs * self._processors // counters
        parts, part_columns = self._divide(panels.columns, group, wanted, num_inputs * num_rows, counters)
        numbers = (
            num_inputs, num_rows, panels.columns, memory.stride(0), panels.panel_rows // block, part_columns, parts,
            *_int4_constants(panels), inputs, _MOST_PARTS, self._tuning.codes_stages, self._dot,
        )  # fmt: skip
        sums = self._partials, self._arrivals
        return _in_one_launch(int4.int4_codes, (tiles, programs, parts), memory, sums, numbers, num_warps=1)

    def _int4_unpacked(self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> RowsProduct:
        block, columns = INT4_LAYOUTS[panels.layout].block, panels.columns
        at_once, step = self._rows_at_once(columns), 64
        constants = (*_int4_constants(panels), step)
        chunks: list[_Chunk] = []
        for first in range(0, num_rows, at_once):
            count = min(at_once, num_rows - first)
            held = -(-count // BLOCK_ROWS) * BLOCK_ROWS
            matrix = self._scratch.view(torch.bfloat16)[: held * columns].view(columns, held)
            grid = triton.cdiv(count, block), triton.cdiv(columns, step)
            numbers = (first // block, columns, memory.stride(0), panels.panel_rows // block, held, *constants)
            launch = Launch(int4.int4_unpack, grid, numbers, num_warps=4)
            chunks.append((launch, matrix, matrix[:, :count], slice(first, first + count)))

        return _by_chunks(chunks, memory, num_rows)

    def _int8_vector(self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> RowsProduct:
        rows_at_once = 4
        numbers = (
            num_inputs, num_rows, panels.columns, memory.stride(0), panels.panel_rows,
            triton.next_power_of_2(num_inputs), rows_at_once, 512,
        )  # fmt: skip
        grid = (triton.cdiv(num_rows, rows_at_once),)
        return _in_one_launch(int8.int8_vector, grid, memory, (), numbers, num_warps=4)

    def _int8_tiles(self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> RowsProduct:
        inputs = _tile_inputs(num_inputs)
        blocks, tiles = triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(num_inputs, inputs)
        wanted = self._tuning.tiles_programs * self._processors // (blocks * tiles)
        parts, part_columns = self._divide(panels.columns, 256, wanted, num_inputs * num_rows, blocks * tiles)
        numbers = (
            num_inputs, num_rows, panels.columns, memory.stride(0), panels.panel_rows, part_columns, parts,
            inputs, BLOCK_ROWS, 64, self._dot,
        )  # fmt: skip
        sums = self._partials, self._arrivals
        options = {"num_warps": 8 if inputs >= 64 else 4, "num_stages": self._tuning.tiles_stages}
        return _in_one_launch(int8.int8_tiles, (blocks, parts, tiles), memory, sums, numbers, **options)

    def _int8_unpacked(self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> RowsProduct:
        columns = panels.columns
        at_once, rows_each, step = self._rows_at_once(columns), 8, 512
        chunks: list[_Chunk] = []
        for first in range(0, num_rows, at_once):
            count = min(at_once, num_rows - first)
            held = -(-count // rows_each) * rows_each
            matrix = self._scratch.view(torch.bfloat16)[: held * columns].view(held, columns)
            numbers = (first, columns, memory.stride(0), panels.panel_rows, rows_each, step)
            grid = held // rows_each, triton.cdiv(columns, step)
            launch = Launch(int8.int8_unpack, grid, numbers, num_warps=4)
            chunks.append((launch, matrix, matrix[:count].t(), slice(first, first + count)))

        return _by_chunks(chunks, memory, num_rows)

    @property
    def _partials(self) -> torch.Tensor:
        return self._scratch.view(torch.float32)

    def _divide(self, columns: int, step: int, wanted: int, outputs: int, counters: int) -> tuple[int, int]:
        """How many parts of the columns are computed apart, and the columns of each, a multiple of `step`; one where
        their sums do not fit the scratch memory.
        """
        if counters > self._arrivals.numel():
            return 1, -(-columns // step) * step
        room = self._scratch.numel() // 4 // max(1, outputs)
        most = max(1, min(wanted, _MOST_PARTS, room, -(-columns // step)))
        part_columns = -(-columns // (most * step)) * step
        return -(-columns // part_columns), part_columns

    def _rows_at_once(self, columns: int) -> int:
        """Rows whose unpacked weights fit the scratch memory."""
        return max(1, self._scratch.numel() // 2 // columns // BLOCK_ROWS) * BLOCK_ROWS


def _nothing(num_rows: int) -> RowsProduct:
    def multiply(
        rows: torch.Tensor, bias: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        return rows.new_empty(0, num_rows) if output is None else output

    return multiply


def _in_one_launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], memory: torch.Tensor, sums: tuple[torch.Tensor, ...],
    numbers: tuple[Any, ...], **options: int,
) -> RowsProduct:  # fmt: skip
    """A kernel that multiplies with all of `memory`; `numbers` begin with how many rows of inputs there are, and rows
    of the weight.
    """
    num_inputs, num_rows = numbers[:2]
    launches: dict[int, Launch] = {}  # by the stride of outputs: one in most runs

    def multiply(
        rows: torch.Tensor, bias: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        if output is None:
            output = rows.new_empty(num_inputs, num_rows)
        stride = output.stride(0)
        launch = launches.get(stride)
        if launch is None:
            launch = launches[stride] = Launch(kernel, grid, (stride, *numbers), **options)
        launch(rows, memory, output, bias, *sums)
        return output

    return multiply


def _by_chunks(chunks: Sequence[_Chunk], memory: torch.Tensor, num_rows: int) -> RowsProduct:
    """Each chunk's weights are unpacked, and multiplied by torch."""

    def multiply(
        rows: torch.Tensor, bias: torch.Tensor | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        if output is None:
            output = rows.new_empty(len(rows), num_rows)
        for launch, matrix, weight, place in chunks:
            launch(memory, matrix)
            torch.mm(rows, weight, out=output[:, place])
        if bias is not None:
            output += bias
        return output

    return multiply


def layout_of(panels: Panels) -> Layout:
    """Under which kernels for these panels are measured."""
    return "cuda-int4" if panels.low_bit.bits == 4 else "cuda-int8"


def _int4_constants(panels: Panels) -> tuple[int, bool, int, int, int]:
    order = INT4_LAYOUTS[panels.layout]
    return panels.low_bit.group, panels.low_bit.symmetric, order.block // 2, order.stride, order.offset


def _tile_inputs(num_inputs: int) -> int:
    return min(64, max(16, int(triton.next_power_of_2(num_inputs))))
