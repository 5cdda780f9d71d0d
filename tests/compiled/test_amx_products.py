"""Products by the processor's matrix unit: against float64, and what a model may rely on beyond that."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.compiled.amx_products import CompiledAmx, amx_obstacle
from pipo_ray.quant.panels import processor_flags

pytestmark = pytest.mark.skipif(amx_obstacle() is not None, reason=str(amx_obstacle()))

_PROT_NONE, _PROT_BOTH = 0, mmap.PROT_READ | mmap.PROT_WRITE


@pytest.fixture(scope="module")
def products() -> CompiledAmx:
    return CompiledAmx()


def matrix(rows: int, columns: int, gap: int = 0, offset: int = 0) -> torch.Tensor:
    """bf16, `gap` numbers between two rows, `offset` in front."""
    memory = torch.randn(rows * (columns + gap) + offset).bfloat16()
    return memory[offset:].view(rows, columns + gap)[:, :columns]


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
    """The page behind both matrices cannot be read."""
    page, rows = mmap.PAGESIZE, 5
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    ends = []
    for _ in range(2):
        memory = torch.frombuffer(mmap.mmap(-1, 2 * page), dtype=torch.bfloat16)
        assert protect(memory.data_ptr() + page, page, _PROT_NONE) == 0
        ends.append((memory, memory[page // 2 - rows * columns : page // 2].view(rows, columns)))
    x, weight = (end.copy_(torch.randn(rows, columns)) for _, end in ends)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(linear(products, x, weight).double(), exact, rtol=0.008, atol=1e-4)
    for memory, _ in ends:
        assert protect(memory.data_ptr() + page, page, _PROT_BOTH) == 0


@pytest.mark.parametrize("columns", [64, 70, 581])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_stay_so_in_their_row_and_nowhere_else(
    products: CompiledAmx, columns: int, value: float
) -> None:
    x, weight = torch.ones(18, columns).bfloat16(), torch.ones(40, columns).bfloat16()
    sums = torch.full((18, 40), columns).bfloat16()
    for at in (0, columns - 1):
        x[17, at] = weight[39, at] = value  # the last ones, which are taken again past the end
        expected = sums.clone()
        expected[17] = expected[:, 39] = value
        expected[17, 39] = value * value
        assert torch.equal(linear(products, x, weight).nan_to_num(nan=5.0), expected.nan_to_num(nan=5.0))
        x[17, at] = weight[39, at] = 1.0


def test_an_unusable_processor_is_named() -> None:
    assert amx_obstacle(processor_flags() - {"amx_bf16"}) == "this processor has no AMX_BF16"
    assert amx_obstacle({"amx_bf16"}) == "this processor has no AMX_TILE"


def test_after_torchs_own_products_and_before_them(products: CompiledAmx) -> None:
    """oneDNN uses the same registers, and configures them for itself."""
    x, weight = matrix(64, 256), matrix(64, 256)
    exact = x.double() @ weight.double().T
    for _ in range(3):
        for got in (linear(products, x, weight), torch.nn.functional.linear(x, weight)):
            torch.testing.assert_close(got.double(), exact, rtol=0.008, atol=1e-3)
