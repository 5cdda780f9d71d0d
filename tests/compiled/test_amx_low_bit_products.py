"""Products of low-bit weights by the processor's matrix unit: against float64, and what a model may rely on beyond."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bf16_matrices import matrix
from emulated_tiles import matrix_unit
from hypothesis import given, settings
from hypothesis import strategies as st
from low_bit_weights import RandomWeight, with_strides

from pipo_ray.compiled.amx_low_bit_products import CompiledAmxLowBit
from pipo_ray.compiled.amx_products import CompiledAmx
from pipo_ray.compiled.support import LAYOUT
from pipo_ray.quant.codec import views_of, write_rows
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import Panels, divide
from pipo_ray.quant.rounding import Rounded

NAMES = ("int4-g32", "int4", "int4-g128", "int4-sym", "int8")

pytest.importorskip("llvmlite")


@pytest.fixture(scope="module")
def products() -> Iterator[CompiledAmxLowBit]:
    with matrix_unit():
        yield CompiledAmxLowBit()


def linear(
    products: CompiledAmxLowBit, inputs: torch.Tensor, memory: torch.Tensor, panels: Panels, rows: int
) -> torch.Tensor:
    """Into columns of a larger matrix, of which no other may change."""
    whole = torch.full((len(inputs) + 2, rows + 9), 7.0, dtype=torch.bfloat16)
    output = whole[1:-1, 4 : 4 + rows]
    products.linear_into(products.pack(inputs), memory, panels, rows, output)
    for edge in (whole[0], whole[-1], whole[:, :4], whole[:, 4 + rows :]):
        assert edge.eq(7).all()
    return output


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(NAMES), st.one_of(st.integers(1, 70), st.integers(500, 1030)), st.integers(1, 300),
    st.integers(1, 12), st.sampled_from([1, 20_000, 1 << 20]), st.integers(0, 3), st.integers(0, 33),
    st.sampled_from(["plain", "transposed", "strided", "expanded"]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_products_are_those_of_the_unpacked_weight(
    products: CompiledAmxLowBit, name: str, inputs: int, rows: int, groups: int, panel_bytes: int, gap: int,
    left_out: int, strides: str, seed: int,
) -> None:  # fmt: skip
    """int4's weights are rounded to bf16 once, int8's never. Panels need not lie side by side, nor all rows be used."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * LowBitFormat.parse(name).columns_multiple
    weight = RandomWeight.make(name, LAYOUT, rows, columns, panel_bytes, generator)
    memory = torch.full((len(weight.memory), weight.panels.panel_bytes + 64 * gap), 255, dtype=torch.uint8)
    memory = memory[:, : weight.panels.panel_bytes].copy_(weight.memory)
    x = with_strides(torch.randn(inputs, columns, generator=generator).bfloat16(), strides)
    used = max(1, rows - left_out)
    got = linear(products, x, memory, weight.panels, used)
    values = weight.values[:used] if name == "int8" else weight.values[:used].float().bfloat16().double()
    exact, terms = x.double() @ values.T, x.double().abs() @ values.abs().T
    step = 2.0**-7 * torch.exp2(torch.frexp(exact).exponent.double() - 1)
    assert ((got.double() - exact).abs() <= 0.501 * step + 1e-6 * terms + 1e-30).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_value_of_int4_is_that_of_float32_rounded_to_bf16(products: CompiledAmxLowBit, group: int) -> None:
    """With rows of the identity as inputs: code by code, in every row of a block and column of a tile."""
    low_bit = LowBitFormat.parse(f"int4-g{group}")
    panels = divide(192, 2 * group, low_bit, LAYOUT)
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (192, 2 * group), generator=generator, dtype=torch.uint8)
    scales = torch.randn(192, 2, generator=generator).bfloat16()
    zeros = (8 * torch.randn(192, 2, generator=generator)).bfloat16()
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    for index, panel in enumerate(memory):
        start, stop = panels.rows_of(index, index + 1)
        part = Rounded(codes[start:stop], scales[start:stop], zeros[start:stop])
        write_rows(views_of(panel, panels), panels, 0, part)
    exact = (codes.double() - 8).view(192, 2, group) * scales.double()[..., None] + zeros.double()[..., None]
    got = linear(products, torch.eye(2 * group, dtype=torch.bfloat16), memory, panels, 192)
    assert torch.equal(got, exact.float().bfloat16().view(192, -1).T)


def test_every_code_of_int8_is_taken_exactly(products: CompiledAmxLowBit) -> None:
    panels = divide(128, 256, LowBitFormat.parse("int8"), LAYOUT)
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    scales = torch.linspace(0.5, 2.0, 128).bfloat16()
    for panel in memory:
        views_of(panel, panels).codes[:] = torch.arange(-128, 128, dtype=torch.int8)
        views_of(panel, panels).scales.copy_(scales)
    for value in (1.0, 2.0**100, -(2.0**-110)):
        got = linear(products, torch.eye(256, dtype=torch.bfloat16) * value, memory, panels, 128)
        assert torch.equal(got, (torch.arange(-128.0, 128.0)[:, None] * value * scales.float()).bfloat16())


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_row_comes_out_the_same_in_every_batch_and_on_any_number_of_threads(
    products: CompiledAmxLowBit, name: str
) -> None:
    weight = RandomWeight.make(name, LAYOUT, 300, 1152, 100_000, torch.Generator().manual_seed(0))
    assert weight.panels.num_panels > 2
    inputs, before = matrix(700, 1152), torch.get_num_threads()
    whole = linear(products, inputs, weight.memory, weight.panels, 300)
    panel_rows = weight.panels.panel_rows
    last = linear(products, inputs[650:651], weight.memory[1:], weight.panels, 300 - panel_rows)
    assert torch.equal(last, whole[650:651, panel_rows:])
    try:
        for num_threads, count, rows in ((1, 700, 300), (2, 17, 290), (3, 33, 300), (3, 513, 10)):
            torch.set_num_threads(num_threads)
            got = linear(products, inputs[:count], weight.memory, weight.panels, rows)
            assert torch.equal(got, whole[:count, :rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_stay_so_in_their_row_and_nowhere_else(
    products: CompiledAmxLowBit, name: str, value: float
) -> None:
    panels = divide(70, 320, LowBitFormat.parse(name), LAYOUT)
    memory = torch.ones(panels.shape, dtype=torch.uint8)
    for panel in memory:
        views_of(panel, panels).scales.fill_(1.0)
    inputs = torch.ones(18, 320, dtype=torch.bfloat16)
    whole = linear(products, inputs, memory, panels, 70)
    inputs[-1, 319] = value
    got = linear(products, inputs, memory, panels, 70)
    assert torch.equal(got[:-1], whole[:-1])
    assert not got[-1].isfinite().any()


def test_what_the_stack_held_before_is_not_multiplied(products: CompiledAmxLowBit) -> None:
    """Of 16 columns, half a tile: that the inputs are zero behind them does not help where weights are no numbers."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    weight = RandomWeight.make("int8", LAYOUT, 64, 16, 1, generator)
    bad = RandomWeight.make("int4", LAYOUT, 64, 256, 1, generator)
    views_of(bad.memory[0], bad.panels).scales.fill_(torch.nan)
    try:
        torch.set_num_threads(1)
        assert linear(products, matrix(16, 256), bad.memory, bad.panels, 64).isnan().all()
        assert linear(products, matrix(16, 16), weight.memory, weight.panels, 64).isfinite().all()
    finally:
        torch.set_num_threads(before)


def test_packed_inputs_serve_weights_of_all_kinds(products: CompiledAmxLowBit) -> None:
    sixteen, weight = CompiledAmx(), RandomWeight.make("int8", LAYOUT, 40, 112, 1, torch.Generator().manual_seed(0))
    inputs = matrix(530, 112)
    of_sixteen = torch.empty(530, 40, dtype=torch.bfloat16)
    sixteen.linear_into(products.pack(inputs), weight.values.bfloat16(), None, of_sixteen)
    expected = torch.empty_like(of_sixteen)
    sixteen.linear_into(sixteen.pack(inputs), weight.values.bfloat16(), None, expected)
    assert torch.equal(of_sixteen, expected)
