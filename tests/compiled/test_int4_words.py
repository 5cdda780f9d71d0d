"""Int4 products in whole numbers: how inputs are rounded, and what is no number."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.compiled import float_low_bit, int4_words
from pipo_ray.compiled.float_low_bit import FloatLowBit
from pipo_ray.compiled.support import floats_obstacle
from pipo_ray.quant.codec import read_rows, views_of, write_rows
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import Panels, divide
from pipo_ray.quant.rounding import Rounded, round_to_nearest, values_of

pytestmark = pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))
OWN = FloatLowBit()
NAMES = ("int4-g32", "int4", "int4-g128")


def packed(rows: int, columns: int, name: str, layout: str, panel_bytes: int) -> tuple[torch.Tensor, Panels]:
    panels = divide(rows, columns, LowBitFormat.parse(name), layout, panel_bytes)
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    weight = torch.randn(rows, columns)
    for index, panel in enumerate(memory):
        start, stop = panels.rows_of(index, index + 1)
        write_rows(views_of(panel, panels), panels, 0, round_to_nearest(weight[start:stop], panels.low_bit))
    return memory, panels


def product(rows: torch.Tensor, memory: torch.Tensor, panels: Panels) -> torch.Tensor:
    output = torch.full((len(rows), panels.rows), torch.nan, dtype=torch.bfloat16)
    multiply = OWN.int4_product(memory, panels, panels.rows, len(rows))
    multiply(OWN.words(rows, panels.low_bit.group), output)
    return output


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(NAMES), st.integers(-30, 30))
def test_inputs_are_rounded_to_16_bits_of_a_group_s_largest(count: int, groups: int, name: str, power: int) -> None:
    group = LowBitFormat.parse(name).group
    rows = (torch.randn(count, groups * group) * 2.0**power).bfloat16()
    rows[0, 0] = 0
    made = OWN.words(rows, group)
    grouped = rows.double().view(count, groups, group)
    steps = made.steps.double()[..., None]
    assert torch.allclose(steps[..., 0], grouped.abs().amax(-1) / 32767, rtol=1e-6)
    assert torch.allclose(made.sums.double(), grouped.sum(-1), rtol=1e-4, atol=1e-5 * float(grouped.abs().max()))
    words = made.words.view(count, groups, -1)
    if count <= int4_words.MOST_FEW:
        words = _gathered(words, group)
    assert ((words.double() * steps - grouped).abs() <= 0.51 * steps).all()


def _gathered(words: torch.Tensor, group: int) -> torch.Tensor:
    """What `spread` makes, as plain words; all its copies are the same."""
    count, groups, _ = words.shape
    copies = words.view(count, groups, group // 4, 2, 4, 2)
    assert (copies == copies[:, :, :, :, :1]).all()
    first, second = copies[:, :, :, 0, 0], copies[:, :, :, 1, 0]  # columns 0 and 2; 1 and 3
    return torch.stack([first, second], dim=-1).reshape(count, groups, group)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 300), st.integers(1, 6), st.sampled_from(NAMES), st.sampled_from(["avx2", "avx512"]),
    st.one_of(st.integers(1, 20), st.integers(120, 300)), st.sampled_from([1, 1 << 20]),
    st.sampled_from([300, 1 << 20]),
)  # fmt: skip
def test_products(
    num_rows: int, groups: int, name: str, layout: str, count: int, panel_bytes: int, most_sums: int
) -> None:
    """Against float64, however rows of inputs and panels are divided."""
    columns = groups * LowBitFormat.parse(name).columns_multiple
    memory, panels = packed(num_rows, columns, name, layout, panel_bytes)
    rows = torch.randn(count, columns).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_low_bit, "_MOST_SUMS", most_sums)
        got = product(rows, memory, panels)
    rounded = [read_rows(views_of(panel, panels), panels) for panel in memory]
    weight = torch.cat([values_of(one, panels.low_bit) for one in rounded])[:num_rows].double()
    exact, terms = rows.double() @ weight.T, rows.double().abs() @ weight.abs().T
    allowed = 2.0**-8 * exact.abs() + 1e-6 * terms + 1e-30 + rounding_of_inputs(rows, rounded, panels)
    assert ((got.double() - exact).abs() <= allowed).all()


def rounding_of_inputs(rows: torch.Tensor, rounded: Sequence[Rounded], panels: Panels) -> torch.Tensor:
    """The most that it can make: half a step times how far codes are from the middle, times their scales."""
    group = panels.low_bit.group
    codes = torch.cat([one.codes for one in rounded])[: panels.rows].double().unflatten(1, (-1, group))
    scales = torch.cat([one.scales for one in rounded])[: panels.rows].double()
    far = (codes - 8).abs().sum(-1) * scales.abs()
    steps = rows.double().abs().unflatten(1, (-1, group)).amax(-1) / 32767
    return 0.51 * steps @ far.T


@pytest.mark.parametrize("count", [1, 3, 9])
def test_what_is_no_number_does_not_become_one(count: int) -> None:
    memory, panels = packed(70, 256, "int4", "avx2", 1)
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows = torch.randn(count, 256).bfloat16()
        rows[-1, 77] = bad
        got = product(rows, memory, panels)
        assert not got[-1].isfinite().any()
        assert got[:-1].isfinite().all()


@pytest.mark.parametrize("count", [1, 9])
def test_zeros_and_the_smallest_numbers(count: int) -> None:
    memory, panels = packed(70, 256, "int4", "avx2", 1)
    for size in (0.0, 1e-40, 1e-36, 1e-30):
        rows = (size * torch.randn(count, 256)).bfloat16()
        got = product(rows, memory, panels)
        assert (got.abs() <= 256 * 10 * size).all()
