"""Norms and gates of many rows on several threads: the bits of one row by itself."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.compiled import row_steps
from pipo_ray.compiled.between_rows import BetweenRows
from pipo_ray.compiled.machine import MachineCode, context_of, run_here
from pipo_ray.compiled.support import floats_obstacle, row_instructions

pytestmark = pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))


@pytest.fixture(scope="module")
def rows() -> BetweenRows:
    return BetweenRows()


@pytest.fixture(scope="module")
def one_by_one() -> MachineCode:
    return MachineCode(row_steps.module(row_instructions()))


@pytest.fixture(scope="module", params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def call(code: MachineCode, name: str, *words: int | torch.Tensor) -> None:
    context = context_of([word.data_ptr() if isinstance(word, torch.Tensor) else word for word in words])
    run_here(code.address(name), ctypes.addressof(context))


COUNTS, SIZES = st.integers(1, 70), st.integers(1, 12).map(lambda n: 16 * n)


@settings(max_examples=30, deadline=None)
@given(COUNTS, SIZES, st.integers(0, 99))
def test_norms(rows: BetweenRows, one_by_one: MachineCode, threads: int, count: int, size: int, seed: int) -> None:
    inputs, weight = normal(1, count, size, seed=seed), normal(size, seed=seed + 1)
    epsilon = struct.unpack("<i", struct.pack("<f", 1e-5))[0]
    got = rows.norm(inputs, weight, 1e-5)
    assert got.shape == inputs.shape
    for row, out in zip(inputs[0], got[0], strict=True):
        expected = torch.empty_like(row)
        call(one_by_one, row_steps.NORM, row, weight, expected, 1, size, epsilon)
        assert torch.equal(out, expected)


@settings(max_examples=30, deadline=None)
@given(COUNTS, SIZES, st.integers(0, 99))
def test_gates(rows: BetweenRows, one_by_one: MachineCode, threads: int, count: int, size: int, seed: int) -> None:
    gate, up = normal(count, size, seed=seed), normal(count, size, seed=seed + 1)
    before = gate.clone(), up.clone()
    got = rows.gate(gate, up)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    for row in range(count):
        expected = torch.empty(size, dtype=torch.bfloat16)
        call(one_by_one, row_steps.GATE, gate[row], up[row], expected, size)
        assert torch.equal(got[row], expected)
