"""How a low-bit weight lies in a block store: as panels, each of which a kernel multiplies as it is. Imports no torch.

A panel is a row of the stored tensor, uint8 [num_panels, panel_bytes]. It holds `panel_rows` consecutive rows of the
weight, so a store cuts a weight into pieces, checks it and streams it without knowing what is inside:

    int4   codes, two in a byte, in the order of a layout below        [panel_rows * columns / 2] bytes
           scale and zero of each group of each row, bf16              [columns / group, panel_rows, 2]
    int8   codes                                                       [panel_rows, columns] int8
           scale of each row, bf16                                     [panel_rows]

The last panel is filled up with rows of zeros. Every part begins on a multiple of 64 bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pipo_ray.quant.formats import LowBitFormat

BLOCK_ROWS = 64
"""`panel_rows` is a multiple of this: the rows that torch's AVX-512 kernel computes at once, and a multiple of what the
others do.
"""

PANEL_BYTES = (16 << 20) - 2 * 4096
"""A panel is no larger, unless 64 rows are: with its pages it fits a slot of 16 MiB. A call of torch's kernel has to
start and to await its threads, which costs 35 % of the bandwidth with panels of 1 MiB, 14 with 4, 8 with 8
(`benchmarks/low_bit_kernels.py`). The price is the smallest slot that will do.
"""

SMALL_PANEL_BYTES = (2 << 20) - 2 * 4096
"""Where the project's own kernels are used, which take all panels of a piece in one call: with its pages it fits a slot
of `--mode memory-saver`, a quarter of one of 8 MiB.
"""

_MOST_PADDING = 0.005


class CodeOrder(NamedTuple):
    """The order of int4 codes: blocks of `block` rows; in each, column after column, block / 2 bytes. Byte j has the
    row j x `stride` of the block in its low half, and the row `offset` further in its high half.
    """

    block: int
    stride: int
    offset: int


INT4_LAYOUTS = {"avx512": CodeOrder(64, 1, 32), "avx2": CodeOrder(32, 1, 16), "plain": CodeOrder(32, 2, 1)}
"""By name, what the kernels that torch has for each instruction set take. Source: `weight_to_int4pack_kernel` in
aten/src/ATen/native/cpu/int4mm_kernel.cpp of torch 2.13; a test compares with the installed torch.
"""

INT8_LAYOUT = "rows"


@dataclass(frozen=True)
class Panels:
    """A low-bit weight of `rows` x `columns` and how it is stored; `format` is the name of a LowBitFormat, `layout` one
    of INT4_LAYOUTS, or INT8_LAYOUT.
    """

    format: str
    layout: str
    rows: int
    columns: int
    panel_rows: int

    # Computed once: a product asks for them, and with one row of inputs every microsecond shows.
    @cached_property
    def low_bit(self) -> LowBitFormat:
        """The format itself."""
        return LowBitFormat.parse(self.format)

    @cached_property
    def num_panels(self) -> int:
        """Rows of the stored tensor."""
        return -(-self.rows // self.panel_rows)

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of a panel's codes, which come first."""
        return self.panel_rows * self.columns * self.low_bit.bits // 8

    @cached_property
    def panel_bytes(self) -> int:
        """Columns of the stored tensor."""
        return self.code_bytes + _scale_bytes(self.low_bit, self.panel_rows, self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stored tensor."""
        return self.num_panels, self.panel_bytes

    @property
    def bits_per_weight(self) -> float:
        """Scales, zeros and padding included."""
        return 8.0 * self.num_panels * self.panel_bytes / (self.rows * self.columns)

    def rows_of(self, first: int, last: int) -> tuple[int, int]:
        """The weight's rows start:stop in the panels first:last."""
        return first * self.panel_rows, min(last * self.panel_rows, self.rows)


def divide(rows: int, columns: int, low_bit: LowBitFormat, layout: str, panel_bytes: int = PANEL_BYTES) -> Panels:
    """Panels of equal size, at most `panel_bytes`, with little or no padding. `layout` is that of int4."""
    layout = layout if low_bit.bits == 4 else INT8_LAYOUT
    block_bytes = BLOCK_ROWS * columns * low_bit.bits // 8 + _scale_bytes(low_bit, BLOCK_ROWS, columns)
    blocks = -(-rows // BLOCK_ROWS)
    fewest = -(-blocks // max(1, panel_bytes // block_bytes))
    counts = range(fewest, min(2 * fewest, blocks) + 1)
    padding = {count: count * -(-blocks // count) - blocks for count in counts}
    good = [count for count in counts if padding[count] <= _MOST_PADDING * blocks]
    count = good[0] if good else min(counts, key=lambda count: padding[count])
    return Panels(low_bit.name, layout, rows, columns, -(-blocks // count) * BLOCK_ROWS)


def _scale_bytes(low_bit: LowBitFormat, rows: int, columns: int) -> int:
    return 2 * rows if low_bit.bits == 8 else columns // low_bit.group * rows * 2 * 2


def machine_layout(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The int4 layout that torch's kernel takes on this machine's processor: one of INT4_LAYOUTS.

    Found as torch finds its instruction set (`compute_cpu_capability` in aten/src/ATen/native/DispatchStub.cpp), so
    that a process without torch knows it.
    """
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if asked in ("avx512", "avx2", "default"):
        return {"default": "plain"}.get(asked, asked)
    flags = processor_flags(cpuinfo)
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "plain"


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the kernel says that the processor can; nothing on another than x86."""
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
