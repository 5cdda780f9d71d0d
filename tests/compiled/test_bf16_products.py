"""Products of bf16 weights by the compiled kernel: against float64, and what a model may rely on beyond that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bf16_matrices import at_the_end, check_no_numbers, matrix
from hypothesis import given, settings
from hypothesis import strategies as st

import pipo_ray.compiled.bf16_products as module
from pipo_ray.compiled import bf16
from pipo_ray.compiled.bf16_products import CompiledBf16
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.support import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


@pytest.fixture(scope="module")
def products() -> CompiledBf16:
    return CompiledBf16()


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(st.integers(1, 16), st.integers(17, 130)), st.integers(1, 70),
    st.one_of(st.integers(1, 200), st.integers(1000, 3300)), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3),
    st.booleans(),
)  # fmt: skip
def test_every_product_is_rounded_once(
    products: CompiledBf16, inputs: int, rows: int, columns: int, input_gap: int, gap: int, offset: int, biased: bool
) -> None:
    x, weight = matrix(inputs, columns, input_gap, offset), matrix(rows, columns, gap, offset)
    bias = matrix(rows, 1, gap, offset)[:, 0] if biased else None
    got = products.linear(x, weight, bias)
    of_bias = torch.zeros(1) if bias is None else bias
    exact = x.double() @ weight.double().T + of_bias.double()
    terms = x.double().abs() @ weight.double().abs().T + of_bias.double().abs()
    assert (got.dtype, got.shape) == (torch.bfloat16, (inputs, rows))
    step = 2.0**-7 * torch.exp2(torch.frexp(exact).exponent.double() - 1)
    assert ((got.double() - exact).abs() <= 0.501 * step + 1e-6 * terms).all()


@pytest.mark.parametrize("columns", [1024, 1100, 3333])
def test_a_row_comes_out_the_same_in_every_batch_and_on_any_number_of_threads(
    products: CompiledBf16, columns: int
) -> None:
    weight, inputs, before = matrix(300, columns, 0, 0), matrix(130, columns, 0, 0), torch.get_num_threads()
    alone = torch.cat([products.linear(row[None], weight, None) for row in inputs])
    try:
        for num_threads, count in ((1, 130), (2, 2), (3, 3), (3, 4), (2, 5), (2, 7), (2, 64), (2, 65), (3, 130)):
            torch.set_num_threads(num_threads)
            assert torch.equal(products.linear(inputs[:count], weight, None), alone[:count])
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_beside_the_output(products: CompiledBf16, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[torch.Tensor] = []

    def new_empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
        places.append(torch.full((shape[0] * shape[1] + 128,), 7.0, dtype=like.dtype))
        return places[-1][64:-64].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    for inputs, rows, columns in ((1, 1, 1), (1, 5, 40), (3, 63, 33), (6, 66, 1057), (70, 31, 64)):
        output = products.linear(torch.ones(inputs, columns).bfloat16(), torch.ones(rows, columns).bfloat16(), None)
        assert output.eq(torch.tensor(columns).bfloat16()).all()
        assert places[-1][:64].eq(7).all()
        assert places[-1][-64:].eq(7).all()


def test_nothing_is_read_behind_the_last_row(products: CompiledBf16) -> None:
    with at_the_end(2, 5, 37) as (x, weight):
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(products.linear(x, weight, None).double(), exact, rtol=0.008, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 70, 2081])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_stay_so_in_their_row_and_nowhere_else(
    products: CompiledBf16, columns: int, value: float
) -> None:
    check_no_numbers(lambda x, weight: products.linear(x, weight, None), 6, 9, columns, value)


def test_threads_stay_awake_where_few_inputs_are_multiplied_with_weights_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def run(function: int, context: int, awake: bool, folder: Any) -> None:
        seen.append(awake)
        run_on_threads(function, context, awake, folder)

    monkeypatch.setattr(module, "run_on_threads", run)
    products = CompiledBf16()
    for count in (1, bf16.MOST_INPUTS + 1):
        for awake in (False, True, False):
            products.stay_awake(awake)
            products.linear(torch.ones(count, 64).bfloat16(), torch.ones(64, 64).bfloat16(), None)
    assert seen == [False, True, False, False, False, False]
