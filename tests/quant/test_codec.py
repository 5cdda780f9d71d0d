"""Panels: written and read again, in torch's order, and byte for byte as they always were."""

from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.quant.codec import interleave, read_rows, separate, views_of, write_rows
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, divide, machine_layout
from pipo_ray.quant.rounding import Rounded, round_to_nearest

NAMES = ("int4-g32", "int4", "int4-g128-sym", "int8")
layouts = st.sampled_from(sorted(INT4_LAYOUTS))


@given(st.integers(1, 4), st.integers(1, 40), layouts, st.integers(0, 1 << 30))
def test_separate_is_the_inverse_of_interleave(blocks: int, columns: int, layout: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (64 * blocks, columns), generator=generator).to(torch.uint8)
    packed = interleave(codes, INT4_LAYOUTS[layout])
    assert packed.numel() * 2 == codes.numel()
    assert torch.equal(separate(packed, len(codes), INT4_LAYOUTS[layout]), codes)


def test_the_order_is_what_torch_packs() -> None:
    codes = torch.randint(0, 16, (192, 96), generator=torch.Generator().manual_seed(1))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(interleave(codes.to(torch.uint8), INT4_LAYOUTS[machine_layout()]), packed.reshape(-1))


@given(st.sampled_from(NAMES), layouts, st.integers(1, 200), st.integers(1, 3), st.integers(0, 1 << 30))
def test_a_panel_is_read_as_it_was_written(name: str, layout: str, rows: int, groups: int, seed: int) -> None:
    low_bit = LowBitFormat.parse(name)
    panels = divide(rows, 128 * groups, low_bit, layout)
    weight = torch.randn(rows, panels.columns, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_nearest(weight, low_bit)
    panel = torch.zeros(panels.panel_bytes, dtype=torch.uint8)
    for start in range(0, rows, BLOCK_ROWS):
        part = round_to_nearest(weight[start : start + BLOCK_ROWS], low_bit)
        write_rows(views_of(panel, panels), panels, start, part)
    for got, expected in zip(read_rows(views_of(panel, panels), panels), rounded, strict=True):
        assert torch.equal(got[:rows], expected)
        assert not got[rows:].any()


@pytest.mark.parametrize(
    "name, layout, checksum",
    [
        ("int4-g32", "avx512", "489bb48fa1bd5b177f08d5ec671f2af1"),
        ("int4", "avx512", "022c22f67d231f770bef7ba234b840c6"),
        ("int4", "avx2", "16b0492c04655d9b365760be0446cb88"),
        ("int4", "plain", "60251d8adae2f2c6977b8569c3d3bc21"),
        ("int8", "avx512", "99449d961a5a3d59bf6f485190956ca6"),
    ],
)
def test_panels_are_what_stores_already_hold(name: str, layout: str, checksum: str) -> None:
    """A change here makes every packed store worthless: it needs another format name and a new version."""
    low_bit = LowBitFormat.parse(name)
    panels = divide(130, 256, low_bit, layout)
    assert panels.shape == (
        1,
        192 * 256 * low_bit.bits // 8 + (384 if low_bit.bits == 8 else 192 * 1024 // low_bit.group),
    )
    numbers = torch.arange(130 * 256).view(130, 256) * 2654435761 >> 7
    if low_bit.bits == 8:
        codes, columns = (numbers % 255 - 127).to(torch.int8), 1
    else:
        codes, columns = (numbers % 16).to(torch.uint8), 256 // low_bit.group
    scales = (torch.arange(130 * columns).view(130, columns) % 97 + 1).bfloat16() / 64
    panel = torch.zeros(panels.panel_bytes, dtype=torch.uint8)
    write_rows(views_of(panel, panels), panels, 0, Rounded(codes, scales, -scales / 2))
    assert xxhash.xxh3_128(panel.numpy().data).hexdigest() == checksum
