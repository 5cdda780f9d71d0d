"""Where a kernel finds the blocks of 64 rows that panels consist of (`pipo_ray/quant/panels.py`)."""

from __future__ import annotations

from pipo_ray.compiled.ir import Function

BLOCK = 64
"""Rows."""


def block_places(f: Function, block: str, code_bytes: str, scale_bytes: int) -> tuple[str, str]:
    """Addresses of the codes and scales of block number `block`, of which each has so many bytes in a panel. Among the
    context's fields are the addresses of the first panel's "codes" and "scales"; bytes of a panel, "panel_bytes", and
    its blocks, "panel_blocks".
    """
    panel = f.value(f"udiv i64 {block}, {f.field('panel_blocks')}")
    inside = f.value(f"urem i64 {block}, {f.field('panel_blocks')}")
    offset = f.multiply(panel, f.field("panel_bytes"))
    codes = f.at(f.at(f.field("codes", "ptr"), offset), f.multiply(inside, code_bytes))
    return codes, f.at(f.at(f.field("scales", "ptr"), offset), f.multiply(inside, scale_bytes))
