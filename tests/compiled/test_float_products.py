"""Float32 products with 16-bit weights against float64: any shape, and the same bits in any company."""

from __future__ import annotations

import ctypes
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.compiled import float_outer, float_products, outer_rows, row_products, steps
from pipo_ray.compiled.crew import run_steps
from pipo_ray.compiled.float_inputs import PaddedInputs, vectors_for
from pipo_ray.compiled.float_products import LEAST_COLUMNS, CompiledFloats
from pipo_ray.compiled.machine import MachineCode
from pipo_ray.compiled.outer_rows import shares
from pipo_ray.compiled.steps import Steps
from pipo_ray.compiled.support import floats_obstacle

pytestmark = pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))
DTYPES = (torch.bfloat16, torch.float16)
WEIGHTS = (*DTYPES, torch.int8)
KERNELS = ("dots", "outer")


SHARES = st.tuples(st.integers(1, 2), st.integers(1, 5))
"""Of rows, in smallest ones, and of groups."""


@cache
def kernels(dtype: torch.dtype) -> CompiledFloats:
    """Compiled once for all tests."""
    return CompiledFloats(dtype)


def shared_out(patch: pytest.MonkeyPatch, share: tuple[int, int]) -> None:
    """So many rows and groups are taken at once, however many there are."""

    def chosen(rows: int, groups: int, vectors: int, num_threads: int) -> tuple[int, int]:
        return share[0] * outer_rows.row_multiple(vectors), min(share[1], groups)

    patch.setattr(outer_rows, "shares", chosen)


def product(
    kernel: str, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None, num_rows: int | None = None,
) -> torch.Tensor:  # fmt: skip
    output = torch.full((len(rows), num_rows or len(weight)), torch.nan, dtype=rows.dtype)
    own = kernels(weight.dtype)
    if kernel == "dots":
        own.dots_into(PaddedInputs.of(rows), weight, bias, output, scales)
    else:
        own.outer_into(own.group(rows), weight, bias, output, scales)
    return output


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES), st.integers(1, 40) | st.integers(120, 300), st.integers(LEAST_COLUMNS, 600),
    st.integers(1, 120), st.booleans(), st.integers(0, 20), st.booleans(), st.sampled_from([200, 1 << 20]),
    st.sampled_from([1 << 10, 256 << 10]), SHARES,
)  # fmt: skip
def test_any_shape(
    kernel: str, dtype: torch.dtype, num_inputs: int, columns: int, num_rows: int, with_bias: bool, gap: int,
    transposed: bool, most_sums: int, task_bytes: int, share: tuple[int, int],
) -> None:  # fmt: skip
    """Within a rounding of the exact result; nothing is read between the rows of a weight, nor behind it."""
    rows = (torch.randn(columns, num_inputs).T if transposed else torch.randn(num_inputs, columns)).to(dtype)
    weight = torch.full((num_rows, columns + gap), torch.nan, dtype=dtype)[:, :columns]
    weight[:] = torch.randn(num_rows, columns)
    bias = torch.randn(num_rows).to(dtype) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_products, "MOST_SUMS", most_sums)
        patch.setattr(row_products, "TASK_BYTES", task_bytes)
        shared_out(patch, share)
        got = product(kernel, rows, weight, bias)
    exact = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    terms = rows.double().abs() @ weight.double().abs().T
    allowed = 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6 * terms + 1e-7
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40) | st.integers(120, 140), st.integers(LEAST_COLUMNS, 600), st.integers(1, 5), st.integers(1, 20),
    st.integers(0, 19), st.sampled_from([200, 1 << 20]), st.sampled_from(WEIGHTS), SHARES,
)  # fmt: skip
def test_panels_and_scales(
    kernel: str, num_inputs: int, columns: int, panels: int, panel_rows: int, missing: int, most_sums: int,
    dtype: torch.dtype, share: tuple[int, int],
) -> None:  # fmt: skip
    """Of the last panel some rows are not wanted. Behind each panel's codes is something else."""
    weight = torch.full((panels, panel_rows * columns + 77), 99, dtype=dtype)[:, : panel_rows * columns]
    weight[:] = 20 * torch.randn(panels, panel_rows * columns)
    weight = weight.unflatten(1, (panel_rows, columns))
    num_rows = panels * panel_rows - missing % panel_rows
    rows = torch.randn(num_inputs, columns).to(torch.bfloat16 if dtype is torch.int8 else dtype)
    scales = torch.rand(panels * panel_rows).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_products, "MOST_SUMS", most_sums)
        shared_out(patch, share)
        got = product(kernel, rows, weight, scales=scales, num_rows=num_rows)
    scaled = (weight.double().flatten(0, 1) * scales.double()[:, None])[:num_rows]
    exact, terms = rows.double() @ scaled.T, rows.double().abs() @ scaled.abs().T
    allowed = 0.501 * torch.finfo(rows.dtype).eps * exact.abs() + 1e-6 * terms + 1e-7
    assert ((got.double() - exact).abs() <= allowed).all()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 100).map(lambda vectors: 8 * vectors), st.integers(1, 90), st.booleans(), st.booleans(),
    st.sampled_from([1 << 10, 256 << 10]),
)  # fmt: skip
def test_steps_give_the_same_bits(
    columns: int, num_rows: int, with_bias: bool, with_scales: bool, task_bytes: int
) -> None:
    own, code, listed = kernels(torch.bfloat16), MachineCode(steps.module()), Steps()
    weight, row = torch.randn(num_rows, columns).bfloat16(), torch.empty(columns, dtype=torch.bfloat16)
    bias = torch.randn(num_rows).bfloat16() if with_bias else None
    scales = torch.rand(num_rows).bfloat16() if with_scales else None
    behind = torch.full((num_rows + 8,), 7.0, dtype=torch.bfloat16)
    output = behind[:num_rows]
    assert own.takes_row(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_products, "TASK_BYTES", task_bytes)
        own.add_product(listed, own.add_inputs(listed, row), weight, bias, output, scales)
        context = listed.context()
        for _ in range(2):
            row.copy_(torch.randn(columns))
            run_steps(code.address(steps.RUN), ctypes.addressof(context))
            assert torch.equal(output, product("dots", row[None], weight, bias, scales)[0])
            assert (behind[num_rows:] == 7).all()


def test_which_weights_can_be_a_step() -> None:
    own, weight = kernels(torch.bfloat16), torch.zeros(3, 32, dtype=torch.bfloat16)
    assert own.takes_row(weight)
    assert not own.takes_row(weight[:, :31])
    assert not own.takes_row(weight.half())
    assert not kernels(torch.float16).takes_row(weight.half())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("columns", [2051, 4096])
def test_a_row_s_bits_do_not_depend_on_the_others(kernel: str, columns: int) -> None:
    rows, weight = torch.randn(40, columns).bfloat16(), torch.randn(29, columns).bfloat16()
    together = product(kernel, rows, weight)
    for count in (1, 2, 3, 5, 9, 17, 33):
        assert torch.equal(product(kernel, rows[:count], weight), together[:count])
    assert torch.equal(product(kernel, rows[7:8], weight[11:]), together[7:8, 11:])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_where_it_is(kernel: str, dtype: torch.dtype) -> None:
    rows, weight = torch.ones(11, 75, dtype=dtype), torch.ones(9, 75, dtype=dtype)
    weight[4, 74], rows[3, 0], rows[6, 70] = torch.inf, torch.nan, -torch.inf
    got, expected = product(kernel, rows, weight), rows.double() @ weight.double().T
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num().double(), expected.to(dtype).nan_to_num().double())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_numbers_are_widened_exactly(kernel: str, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = patterns[patterns.isfinite()].view(-1, 8)
    rows = torch.zeros(1, 8, dtype=dtype)
    for column in (0, 7):
        rows.zero_()[0, column] = 1
        assert torch.equal(product(kernel, rows, numbers)[0], numbers[:, column])


def test_how_many_inputs_lie_side_by_side() -> None:
    """Few are computed for nothing."""
    assert [vectors_for(count) for count in (1, 16, 17, 24, 25, 32, 33, 48, 96)] == [2, 2, 3, 3, 2, 2, 3, 3, 3]
    for count in range(1, 200):
        width = float_outer.width(vectors_for(count))
        assert -(-count // width) * width < count + 24


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 90), st.integers(0, 20), st.integers(0, 20), st.sampled_from(DTYPES))
def test_only_its_columns_of_the_output_are_written(
    num_inputs: int, num_rows: int, before: int, behind: int, dtype: torch.dtype
) -> None:
    own, rows, weight = kernels(dtype), torch.randn(num_inputs, 33).to(dtype), torch.randn(num_rows, 33).to(dtype)
    around = torch.full((num_inputs + 1, before + num_rows + behind), 7.0, dtype=dtype)
    own.outer_into(own.group(rows), weight, None, around[:-1, before : before + num_rows])
    assert torch.equal(around[:-1, before : before + num_rows], product("outer", rows, weight))
    around[:-1, before : before + num_rows] = 7
    assert (around == 7).all()


@given(st.integers(1, 40000), st.integers(1, 700), st.sampled_from(float_outer.VECTORS), st.integers(1, 64))
def test_shares_are_such_as_the_kernel_takes(rows: int, groups: int, vectors: int, num_threads: int) -> None:
    at_once, some = shares(rows, groups, vectors, num_threads)
    assert at_once % float_outer.rows_side_by_side(vectors) == at_once % 8 == 0
    assert 0 < at_once <= float_outer.MOST_ROWS
    assert 0 < some <= min(groups, float_outer.MOST_GROUPS)


def test_small_parts_are_shared_out_evenly() -> None:
    """A part of 2 MiB has 72 rows of 14,336 columns: of those, 40 for one thread and 32 for the other were a tenth
    too many.
    """
    for rows, groups in ((72, 11), (72, 6), (256, 11), (96, 22)):
        at_once, some = shares(rows, groups, 3, 2)
        loads = [0, 0]
        for first in range(0, rows, at_once):
            for start in range(0, groups, some):
                loads.sort()
                loads[0] += min(at_once, rows - first) * min(some, groups - start)
        assert max(loads) <= 1.05 * rows * groups / 2


def test_a_thread_alone_takes_all_groups_of_a_row() -> None:
    """Rows are widened once."""
    assert shares(4096, 22, 3, 1) == (48, 22)
