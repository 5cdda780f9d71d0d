"""The compiled rounding gives the bits that torch's gives, for every format, layout and weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipo_ray.compiled import rounding as kernels
from pipo_ray.compiled.quantizer import CompiledRounding
from pipo_ray.quant.codec import views_of, write_rows
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, PANEL_BYTES, Panels, divide
from pipo_ray.quant.rounding import round_to_nearest

pytest.importorskip("llvmlite")

ROUNDING = CompiledRounding()
FORMATS = ("int4-g32", "int4", "int4-g128", "int4-g32-sym", "int4-sym", "int4-g128-sym", "int8")
FINITE_BITS = st.integers(0, 0x7F7F) | st.integers(0x8000, 0xFF7F)
# What weights look like, what is equal in a group, what is nearly nothing, and the largest there are.
BITS = st.integers(0x3B00, 0x3E00) | FINITE_BITS | st.sampled_from([0, 0x8000, 1, 0x8001, 0x7F7F, 0xFF7F, 0x0080])


def weights(rows: int, columns: int) -> st.SearchStrategy[torch.Tensor]:
    random = st.integers(0, 2**32 - 1).map(
        lambda seed: torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    )
    odd = arrays(np.uint16, (rows, columns), elements=BITS, fill=st.sampled_from([0, 0x3F80, 0xBD00]))
    return random | odd.map(lambda bits: torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16))


def rounded_by_torch(weight: torch.Tensor, panels: Panels, start: int) -> torch.Tensor:
    panel = torch.zeros(panels.panel_bytes, dtype=torch.uint8)
    write_rows(views_of(panel, panels), panels, start, round_to_nearest(weight.float(), panels.low_bit))
    return panel


def rounded_by_kernel(weight: torch.Tensor, panels: Panels, start: int) -> tuple[torch.Tensor, int]:
    panel = torch.zeros(panels.panel_bytes, dtype=torch.uint8)
    rows = ROUNDING.round(weight.view(torch.uint8).numpy().reshape(-1), panels, panel.numpy(), start)
    return panel, rows


@settings(deadline=None, max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", FORMATS)
def test_codes_scales_and_zeros_are_those_of_torch(name: str, data: st.DataObject) -> None:
    low_bit = LowBitFormat.parse(name)
    layout = data.draw(st.sampled_from(sorted(INT4_LAYOUTS)))
    columns = low_bit.columns_multiple * data.draw(st.integers(1, 3))
    start = data.draw(st.sampled_from([0, BLOCK_ROWS]))
    weight = data.draw(weights(data.draw(st.sampled_from([64, 128])), columns))
    panels = divide(192, columns, low_bit, layout, PANEL_BYTES)
    wanted = rounded_by_torch(weight, panels, start)
    found, rows = rounded_by_kernel(weight, panels, start)
    scales = round_to_nearest(weight.float(), low_bit).scales.float().abs()
    normal = scales.eq(0) | (scales.ge(torch.finfo(torch.bfloat16).tiny) | (low_bit.bits == 8)) & scales.isfinite()
    assert rows == (len(weight) if normal.all() else 0)
    if rows:
        for got, expected in zip(
            vars(views_of(found, panels)).values(), vars(views_of(wanted, panels)).values(), strict=True
        ):
            assert torch.equal(got, expected)  # a zero's sign is nobody's business


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 40, 63])
def test_a_value_that_is_no_number_is_left_to_torch(name: str, value: float, row: int) -> None:
    weight = torch.randn(64, 256).bfloat16()
    weight[row, 255] = value
    assert rounded_by_kernel(weight, divide(64, 256, LowBitFormat.parse(name), "avx512"), 0)[1] == 0


@pytest.mark.parametrize(("layout", "most"), [("avx512", 64), ("avx2", 96), ("plain", 96)])
def test_rows_that_fill_no_block_are_left(layout: str, most: int) -> None:
    low_bit = LowBitFormat.parse("int4")
    panels = divide(101, 64, low_bit, layout)
    weight = torch.randn(101, 64).bfloat16()
    found, rows = rounded_by_kernel(weight, panels, 0)
    assert rows == most
    assert torch.equal(found, rounded_by_torch(weight[:most], panels, 0))
    assert rounded_by_kernel(weight[:5], panels, 0)[1] == 0


def test_nothing_is_written_beside_the_rows() -> None:
    for name in FORMATS:
        low_bit = LowBitFormat.parse(name)
        panels = divide(192, 256, low_bit, "avx512")
        panel = torch.full((panels.panel_bytes,), 0x5A, dtype=torch.uint8)
        weight = torch.randn(64, 256).bfloat16()
        ROUNDING.round(weight.view(torch.uint8).numpy().reshape(-1), panels, panel.numpy(), 64)
        views = views_of(panel, panels)
        codes = views.codes.view(torch.uint8).view(3, -1)
        scales = views.scales.view(-1, 3, 64, 2) if low_bit.group else views.scales.view(1, 3, 64, 1)
        assert codes[[0, 2]].eq(0x5A).all()
        assert scales[:, [0, 2]].contiguous().view(torch.uint8).eq(0x5A).all()


def test_the_code_is_of_no_instruction_set() -> None:
    """So that LLVM makes it for every processor."""
    for name in FORMATS:
        assert "x86" not in kernels.module(LowBitFormat.parse(name), "avx2")
