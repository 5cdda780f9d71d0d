"""Products by the processor's matrix unit: against float64, and what a model may rely on beyond that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from bf16_matrices import at_the_end, check_no_numbers, matrix
from emulated_tiles import matrix_unit
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.compiled import amx, amx_products
from pipo_ray.compiled.amx_products import CompiledAmx
from pipo_ray.compiled.amx_shares import shares
from pipo_ray.compiled.support import amx_obstacle

pytest.importorskip("llvmlite")


@pytest.fixture(scope="module")
def products() -> Iterator[CompiledAmx]:
    with matrix_unit():
        yield CompiledAmx()


def linear(
    products: CompiledAmx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Into columns of a larger matrix, of which no other may change."""
    whole = torch.full((len(inputs) + 2, len(weight) + 9), 7.0, dtype=torch.bfloat16)
    output = whole[1:-1, 4 : 4 + len(weight)]
    products.linear_into(products.pack(inputs), weight, bias, output)
    for edge in (whole[0], whole[-1], whole[:, :4], whole[:, 4 + len(weight) :]):
        assert edge.eq(7).all()
    return output


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(st.integers(1, 40), st.integers(41, 1100)), st.integers(1, 300),
    st.one_of(st.integers(1, 200), st.integers(250, 1100)), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3),
    st.booleans(),
)  # fmt: skip
def test_every_product_is_rounded_once(
    products: CompiledAmx, inputs: int, rows: int, columns: int, input_gap: int, gap: int, offset: int, biased: bool
) -> None:
    x, weight = matrix(inputs, columns, input_gap, offset), matrix(rows, columns, gap, offset)
    bias = matrix(rows, 1, gap, offset)[:, 0] if biased else None
    got = linear(products, x, weight, bias)
    of_bias = torch.zeros(1) if bias is None else bias
    exact = x.double() @ weight.double().T + of_bias.double()
    terms = x.double().abs() @ weight.double().abs().T + of_bias.double().abs()
    step = 2.0**-7 * torch.exp2(torch.frexp(exact).exponent.double() - 1)
    assert ((got.double() - exact).abs() <= 0.501 * step + 1e-6 * terms).all()


def test_a_row_comes_out_the_same_in_every_batch_in_every_part_and_on_any_number_of_threads(
    products: CompiledAmx,
) -> None:
    weight, inputs, before = matrix(300, 1100), matrix(700, 1100), torch.get_num_threads()
    whole = linear(products, inputs, weight)
    assert torch.equal(linear(products, inputs[650:651], weight), whole[650:651])
    try:
        for num_threads, count, start in ((1, 700, 0), (2, 17, 290), (3, 33, 1), (3, 513, 128)):
            torch.set_num_threads(num_threads)
            assert torch.equal(linear(products, inputs[:count], weight[start:]), whole[:count, start:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("share", [(32, 32), (64, 96), (96, 32), (320, 160)])
def test_a_row_comes_out_the_same_however_threads_share_a_product(
    products: CompiledAmx, share: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = matrix(300, 600), matrix(157, 600)
    whole = linear(products, inputs, weight)
    monkeypatch.setattr(amx_products, "shares", lambda *_: share)
    assert torch.equal(linear(products, inputs, weight), whole)


@given(st.integers(1, 2000), st.integers(1, amx.MOST_INPUTS), st.sampled_from([32, 64]), st.integers(1, 64))
def test_shares_are_whole_blocks_whose_sums_have_room(
    num_rows: int, num_inputs: int, block_rows: int, num_threads: int
) -> None:
    rows_at_once, inputs_at_once = shares(num_rows, num_inputs, block_rows, num_threads)
    assert rows_at_once in range(block_rows, 4096, block_rows)
    assert inputs_at_once in range(amx.INPUTS, amx.MOST_INPUTS + 1, amx.INPUTS)
    assert rows_at_once * inputs_at_once <= amx.MOST_SUMS


def test_threads_have_equal_shares() -> None:
    """By rows where these are blocks for all of them; by inputs where they are not."""
    assert shares(64, 256, 32, 2) == (32, 256)
    assert shares(256, 256, 32, 2) == (128, 256)
    assert shares(288, 256, 32, 2) == (160, 256)
    assert shares(72, 256, 32, 2) == (96, 128)
    assert shares(72, 256, 32, 1) == (96, 256)
    assert shares(1000, 33, 32, 2) == (32, 64)  # few inputs


def test_packed_inputs_serve_several_weights(products: CompiledAmx) -> None:
    inputs = matrix(530, 70)
    packed = products.pack(inputs)
    for weight in (matrix(5, 70), matrix(64, 70)):
        output = torch.empty(530, len(weight), dtype=torch.bfloat16)
        products.linear_into(packed, weight, None, output)
        assert torch.equal(output, linear(products, inputs, weight))


def test_columns_of_inputs_that_do_not_lie_by_rows(products: CompiledAmx) -> None:
    inputs, weight = matrix(40, 33).T, matrix(20, 40)
    assert torch.equal(linear(products, inputs, weight), linear(products, inputs.contiguous(), weight))


@pytest.mark.parametrize("columns", [37, 64])
def test_nothing_is_read_behind_the_last_row(products: CompiledAmx, columns: int) -> None:
    with at_the_end(2, 5, columns) as (x, weight):
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(linear(products, x, weight).double(), exact, rtol=0.008, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 70, 581])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_stay_so_in_their_row_and_nowhere_else(
    products: CompiledAmx, columns: int, value: float
) -> None:
    """Of rows that do not fill a tile the last one is taken again."""
    check_no_numbers(partial(linear, products), 18, 40, columns, value)


def test_an_unusable_processor_is_named() -> None:
    assert amx_obstacle({"amx_tile"}) == "this processor has no AMX_BF16"
    assert amx_obstacle({"amx_bf16"}) == "this processor has no AMX_TILE"


def test_after_torchs_own_products_and_before_them(products: CompiledAmx) -> None:
    """oneDNN uses the same registers, and configures them for itself."""
    x, weight = matrix(64, 256), matrix(64, 256)
    exact = x.double() @ weight.double().T
    for _ in range(3):
        for got in (linear(products, x, weight), torch.nn.functional.linear(x, weight)):
            torch.testing.assert_close(got.double(), exact, rtol=0.008, atol=1e-3)
