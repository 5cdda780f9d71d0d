"""Int4 products in whole numbers: how inputs are rounded, and what is no number."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_bit_weights import RandomWeight, rounding_of_inputs

from pipo_ray.compiled import float_low_bit, int4_words, steps
from pipo_ray.compiled.crew import run_steps
from pipo_ray.compiled.float_inputs import PaddedInputs
from pipo_ray.compiled.float_low_bit import FloatLowBit
from pipo_ray.compiled.machine import MachineCode
from pipo_ray.compiled.steps import Steps
from pipo_ray.compiled.support import floats_obstacle
from pipo_ray.compiled.word_inputs import WordInputs
from pipo_ray.quant.formats import LowBitFormat

pytestmark = pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))
OWN = FloatLowBit()
NAMES = ("int4-g32", "int4", "int4-g128")


def packed(rows: int, columns: int, name: str, layout: str = "avx2", panel_bytes: int = 1) -> RandomWeight:
    return RandomWeight.make(name, layout, rows, columns, panel_bytes, torch.Generator().manual_seed(rows + columns))


def product(rows: torch.Tensor, weight: RandomWeight) -> torch.Tensor:
    panels = weight.panels
    output = torch.full((len(rows), panels.rows), torch.nan, dtype=torch.bfloat16)
    multiply = OWN.int4_product(weight.memory, panels, panels.rows, len(rows))
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
    words = made.words.view(count, groups, -1)
    if count <= int4_words.MOST_FEW:
        words = _gathered(words, group)
    assert ((words.double() * steps - grouped).abs() <= 0.51 * steps).all()
    assert torch.equal(made.middles, 8 * words.long().sum(-1).int())
    assert torch.allclose(made.sums.double(), words.double().sum(-1) * steps[..., 0], rtol=1e-6)


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
    weight = packed(num_rows, columns, name, layout, panel_bytes)
    rows = torch.randn(count, columns).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_low_bit, "MOST_SUMS", most_sums)
        got = product(rows, weight)
    values = weight.values
    exact, terms = rows.double() @ values.T, rows.double().abs() @ values.abs().T
    allowed = 2.0**-8 * exact.abs() + 1e-6 * terms + 1e-30
    allowed += rounding_of_inputs(rows, values, weight.panels.low_bit.group)
    assert ((got.double() - exact).abs() <= allowed).all()


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 12).map(lambda blocks: 32 * blocks), st.sampled_from([*NAMES, "int8"]),
    st.sampled_from(["avx2", "avx512"]), st.sampled_from([1, 1 << 20]),
)  # fmt: skip
def test_steps_give_the_same_bits(num_rows: int, name: str, layout: str, panel_bytes: int) -> None:
    """Also the second time, with other inputs in the same places."""
    columns = 2 * max(LowBitFormat.parse(name).columns_multiple, 32)
    weight = packed(num_rows, columns, name, layout, panel_bytes)
    panels = weight.panels
    taken = OWN.takes_row(panels, num_rows)
    assert taken == (name == "int8" or layout == "avx2" or num_rows % 64 == 0)
    if not taken:  # its last block is not computed
        return
    row, behind = torch.empty(columns, dtype=torch.bfloat16), torch.full((num_rows + 64,), 7.0, dtype=torch.bfloat16)
    output, listed, code = behind[:num_rows], Steps(), MachineCode(steps.module())
    inputs = OWN.add_inputs(listed, row, panels.low_bit)
    OWN.add_product(listed, weight.memory, panels, num_rows, row, inputs, output)
    context = listed.context()
    for _ in range(2):
        row.copy_(torch.randn(columns))
        run_steps(code.address(steps.RUN), ctypes.addressof(context))
        if name == "int8":
            expected = torch.empty(1, num_rows, dtype=torch.bfloat16)
            OWN.int8_dots_into(PaddedInputs.of(row[None]), weight.memory, panels, expected)
        else:
            expected = product(row[None], weight)
        assert torch.equal(output, expected[0])
        assert (behind[num_rows:] == 7).all()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_lists_of_many_layers_have_one_place_for_inputs(name: str) -> None:
    """Of each length and format."""
    listed, low_bit = Steps(), LowBitFormat.parse(name)
    rows = [torch.zeros(columns, dtype=torch.bfloat16) for columns in (256, 256, 512)]
    made = [OWN.add_inputs(listed, row, low_bit) for row in rows]
    places = [(one if isinstance(one, torch.Tensor) else one.words).data_ptr() for one in made]
    assert places[0] == places[1] != places[2]


def test_inputs_for_other_groups_have_places_of_their_own() -> None:
    row = torch.zeros(256, dtype=torch.bfloat16)
    made = [OWN.add_inputs(Steps(), row, LowBitFormat.parse(name)) for name in ("int4-g32", "int4", "int4-g128")]
    for which in range(4):
        assert len({one.tensors[which].data_ptr() for one in made if isinstance(one, WordInputs)}) == 3


@pytest.mark.parametrize("count", [1, 3, 9])
def test_what_is_no_number_does_not_become_one(count: int) -> None:
    weight = packed(70, 256, "int4")
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows = torch.randn(count, 256).bfloat16()
        rows[-1, 77] = bad
        got = product(rows, weight)
        assert not got[-1].isfinite().any()
        assert got[:-1].isfinite().all()


@pytest.mark.parametrize("count", [1, 9])
def test_zeros_and_the_smallest_numbers(count: int) -> None:
    weight = packed(70, 256, "int4")
    for size in (0.0, 1e-40, 1e-36, 1e-30):
        rows = (size * torch.randn(count, 256)).bfloat16()
        got = product(rows, weight)
        assert (got.abs() <= 256 * 10 * size).all()


def test_small_inputs_beside_a_large_one_cost_less_than_a_rounding_to_bf16() -> None:
    weight = packed(300, 128, "int4-g128")
    rows = torch.full((1, 128), 1.5e-5).bfloat16()
    rows[0, 0] = 1
    exact = rows.double() @ weight.values.T
    error = (product(rows, weight).double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + rounding_of_inputs(rows, weight.values, 128)).all()
    assert error.mean() < 2.0**-8 * exact.abs().mean()
