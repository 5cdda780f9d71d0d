"""torch's int4 product for CUDA, with the values of our panels in the order of codes that it takes.

`gpu_low_bit_kernels.py` imports `torch_int4.py`, which does nothing by itself, to measure that kernel beside ours.

`_convert_weight_to_int4pack` takes codes from 0 to 15, two in a byte, that of the even column in the high half, and
makes tiles of 8 rows by 16 columns of them, of which `inner_k_tiles` lie side by side. `_weight_int4pack_mm` computes
with (q - 8) x scale + zero, rounded to bf16 once, where scale and zero of a group of 32, 64, 128 or 256 columns are
bf16 in [groups, rows, 2]: all as in our panels. It refuses rows that are no multiple of 8, and columns that are none of
16 x `inner_k_tiles`. Source: aten/src/ATen/native/cuda/int4mm.cu of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.panels import Panels

NAME = "torch int4"
INNER_K_TILES = (8, 4, 2)
"""Of 8 a thread reads 16 bytes at once, of 2 four."""

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Int4Weight:
    """`codes` int32 [rows / 8, columns / (16 x inner_k_tiles), 32, inner_k_tiles / 2], as torch packed them;
    `scales_and_zeros` bf16 [columns / group, rows, 2].
    """

    codes: torch.Tensor
    scales_and_zeros: torch.Tensor
    group: int

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """bf16 [n, rows] of inputs bf16 [n, columns]. Raises RuntimeError for what torch refuses."""
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
            inputs, self.codes, self.group, self.scales_and_zeros
        )
        return product


def code_pairs(memory: torch.Tensor, panels: Panels) -> torch.Tensor:
    """Of a weight, uint8 [panels, panel_bytes], what torch's conversion takes: uint8 [rows, columns / 2]."""
    codes = torch.cat([read_rows(views_of(panel, panels), panels).codes for panel in memory])[: panels.rows]
    return codes[:, ::2] << 4 | codes[:, 1::2]


def scales_and_zeros(memory: torch.Tensor, panels: Panels) -> torch.Tensor:
    """Of a weight, uint8 [panels, panel_bytes], what torch's product takes: bf16 [columns / group, rows, 2]."""
    return torch.cat([views_of(panel, panels).scales for panel in memory], 1)[:, : panels.rows].contiguous()


def converted(memory: torch.Tensor, panels: Panels, inner_k_tiles: int) -> Int4Weight:
    """An int4 weight, uint8 [panels, panel_bytes] on a CUDA device. Raises RuntimeError for what torch refuses."""
    codes = torch.ops.aten._convert_weight_to_int4pack(code_pairs(memory, panels), inner_k_tiles)
    return Int4Weight(codes, scales_and_zeros(memory, panels), panels.low_bit.group)


def timed(
    memory: torch.Tensor, panels: Panels, rows: Sequence[int], require_right: Callable[[Product], None],
    seconds_of: Callable[[list[Product], torch.Tensor], float],
) -> tuple[dict[int, tuple[float, int]], list[str]]:  # fmt: skip
    """For each number of rows the least seconds of the kernel, and of which `inner_k_tiles` they are; and a line with
    the reason for each `inner_k_tiles` that torch refuses or computes wrongly.

    `memory` uint8 [weights, panels, panel_bytes] are weights to be taken in turn; `require_right` raises
    ArithmeticError for a product, of the first, that is wrong; `seconds_of` products and inputs is the time of one.
    """
    found: dict[int, tuple[float, int]] = {}
    refused: list[str] = []
    for tiles in INNER_K_TILES:
        try:
            products: list[Product] = [converted(weight, panels, tiles).product for weight in memory]
            require_right(products[0])
            for n in rows:
                inputs = torch.randn(n, panels.columns, device=memory.device).bfloat16()
                seconds = seconds_of(products, inputs)
                found[n] = min(found.get(n, (seconds, tiles)), (seconds, tiles))
        except (RuntimeError, ArithmeticError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            refused.append(f"{[panels.rows, panels.columns]} {panels.format} {NAME}, {tiles} inner tiles: {reason}")
    return found, refused


def comparisons(entries: Sequence[dict[str, Any]], ours: Sequence[str]) -> list[str]:
    """A line per shape and format with both: by number of rows, the time of torch's kernel over that of the fastest of
    `ours`, more than 1 where ours is faster.
    """
    least: dict[tuple[Any, str, int, bool], float] = {}
    for one in entries:
        if one["kernel"] == NAME or one["kernel"] in ours:
            key = (tuple(one["shape"]), one["format"], one["rows"], one["kernel"] == NAME)
            least[key] = min(one["seconds"], least.get(key, float("inf")))
    lines: dict[tuple[Any, str], list[str]] = {}
    for (shape, name, rows, theirs), seconds in least.items():
        if theirs and (shape, name, rows, False) in least:
            ratio = seconds / least[shape, name, rows, False]
            lines.setdefault((shape, name), []).append(f"{rows}: {ratio:.2f}")
    return [f"{list(shape)} {name}  " + "  ".join(cells) for (shape, name), cells in lines.items()]
