"""Panels, written and read: codes, scales and zeros in the order that the kernels take (see `panels.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipo_ray.quant.panels import INT4_LAYOUTS, CodeOrder, Panels
from pipo_ray.quant.rounding import Rounded


@dataclass(frozen=True)
class PanelViews:
    """Views of a panel's memory. int4: `codes` uint8 [panel_rows, columns / 2], `scales` bf16 [groups, panel_rows, 2]
    with scale and zero. int8: `codes` int8 [panel_rows, columns], `scales` bf16 [panel_rows].
    """

    codes: torch.Tensor
    scales: torch.Tensor


def views_of(panel: torch.Tensor, panels: Panels) -> PanelViews:
    """The parts of `panel`, uint8 [panel_bytes], over the same memory."""
    codes, scales = panel.split((panels.code_bytes, panels.panel_bytes - panels.code_bytes))
    codes, scales = codes.view(panels.panel_rows, -1), scales.view(torch.bfloat16)
    if panels.low_bit.bits == 8:
        return PanelViews(codes.view(torch.int8), scales)
    return PanelViews(codes, scales.view(-1, panels.panel_rows, 2))


def write_rows(views: PanelViews, panels: Panels, start: int, rounded: Rounded) -> None:
    """Write rows from `start` (in the panel, a multiple of BLOCK_ROWS) on; what is missing to a whole block of rows
    becomes zeros.
    """
    rows = len(rounded.codes)
    if panels.low_bit.bits == 8:
        views.codes[start : start + rows] = rounded.codes
        views.scales[start : start + rows] = rounded.scales[:, 0]
        return
    order = INT4_LAYOUTS[panels.layout]
    codes = rounded.codes
    if missing := -rows % order.block:
        codes = torch.cat([codes, codes.new_zeros(missing, codes.shape[1])])
    first = start * panels.columns // 2
    views.codes.view(-1)[first : first + codes.numel() // 2] = interleave(codes, order)
    views.scales[:, start : start + rows, 0] = rounded.scales.T
    views.scales[:, start : start + rows, 1] = rounded.zeros.T


def read_rows(views: PanelViews, panels: Panels) -> Rounded:
    """Every row of a panel, padding included: what was written, exactly."""
    if panels.low_bit.bits == 8:
        return Rounded(views.codes, views.scales[:, None], torch.zeros_like(views.scales[:, None]))
    codes = separate(views.codes, panels.panel_rows, INT4_LAYOUTS[panels.layout])
    return Rounded(codes, views.scales[..., 0].T, views.scales[..., 1].T)


def interleave(codes: torch.Tensor, order: CodeOrder) -> torch.Tensor:
    """int4 codes, uint8 [rows, columns] with rows a multiple of the order's block, as bytes [rows * columns / 2]."""
    rows, columns = codes.shape
    low, high = halves(codes.view(rows // order.block, order.block, columns), order, dim=1)
    # One block at a time: torch transposes matrices fast, and stacks of them slowly.
    return torch.cat([block.t().contiguous().view(-1) for block in low | high << 4])


def separate(packed: torch.Tensor, rows: int, order: CodeOrder) -> torch.Tensor:
    """The inverse of `interleave`: uint8 [rows, columns]."""
    blocks = packed.view(rows // order.block, -1, order.block // 2).transpose(1, 2)
    codes = packed.new_empty(blocks.shape[0], order.block, blocks.shape[2])
    low, high = halves(codes, order, dim=1)
    low.copy_(blocks & 15)
    high.copy_(blocks >> 4)
    return codes.view(rows, -1)


def halves(blocks: torch.Tensor, order: CodeOrder, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the rows in the low and in the high halves of the bytes; dim `dim` are the rows of a block."""
    half = order.block // 2
    if order.stride == 1:
        return blocks.narrow(dim, 0, half), blocks.narrow(dim, order.offset, half)
    pairs = blocks.unflatten(dim, (half, 2))
    return pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)
