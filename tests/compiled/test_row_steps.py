"""What lies between the products of a layer, against torch."""

from __future__ import annotations

import ctypes
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_params import INSTRUCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pipo_ray.compiled import row_steps
from pipo_ray.compiled.machine import MachineCode, context_of, run_here
from pipo_ray.compiled.support import floats_obstacle


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def code(request: pytest.FixtureRequest) -> MachineCode:
    return MachineCode(row_steps.module(request.param))


def call(code: MachineCode, name: str, *words: int | torch.Tensor) -> None:
    numbers = [word.data_ptr() if isinstance(word, torch.Tensor) else word for word in words]
    context = context_of(numbers)
    run_here(code.address(name), ctypes.addressof(context))


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def steps_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """The most by which numbers differ, in steps of bf16."""
    ordered = [torch.where(x < 0, -32768 - x, x) for x in (t.view(torch.int16).int() for t in (one, other))]
    return int((ordered[0] - ordered[1]).abs().max())


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 40).map(lambda n: 16 * n))
SCALES = st.sampled_from([1e-4, 0.1, 1.0, 300.0])


@settings(max_examples=40, deadline=None)
@given(SHAPES, SCALES, st.integers(0, 99))
def test_norm(code: MachineCode, shape: tuple[int, int], scale: float, seed: int) -> None:
    norm = LlamaRMSNorm(shape[1], 1e-5)
    norm.weight.data = normal(shape[1], seed=seed + 1)
    row, output = normal(*shape, seed=seed, scale=scale), torch.empty(shape, dtype=torch.bfloat16)
    epsilon = struct.unpack("<i", struct.pack("<f", 1e-5))[0]
    call(code, row_steps.NORM, row, norm.weight.data, output, *shape, epsilon)
    expected = norm(row).detach()
    assert steps_apart(output, expected) <= 1  # the mean is summed in another order
    assert float((output != expected).float().mean()) < 0.1  # equal numbers at a tie go together


@settings(max_examples=30, deadline=None)
@given(SHAPES, SCALES, st.integers(0, 99))
def test_sum(code: MachineCode, shape: tuple[int, int], scale: float, seed: int) -> None:
    left, right = normal(shape[1], seed=seed), normal(shape[1], seed=seed + 1, scale=scale)
    output = torch.empty_like(left)
    call(code, row_steps.ADD, left, right, output, shape[1])
    assert torch.equal(output, left + right)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_rotary_embedding(code: MachineCode, shape: tuple[int, int], seed: int) -> None:
    heads, half = shape
    row = normal(1, heads, 1, 2 * half, seed=seed)
    cosine, sine = (normal(1, 1, 2 * half, seed=seed + n) for n in (1, 2))
    expected, _ = apply_rotary_pos_emb(row, row, cosine, sine)
    call(code, row_steps.TURN, row, cosine, sine, heads, half)
    assert torch.equal(row, expected)


@settings(max_examples=30, deadline=None)
@given(SHAPES, SCALES, st.integers(0, 99))
def test_gate(code: MachineCode, shape: tuple[int, int], scale: float, seed: int) -> None:
    gate, up = normal(shape[1], seed=seed, scale=scale), normal(shape[1], seed=seed + 1)
    output = torch.empty_like(gate)
    call(code, row_steps.GATE, gate, up, output, shape[1])
    exact = (torch.nn.functional.silu(gate.double()).bfloat16().double() * up.double()).bfloat16()
    assert torch.allclose(output.float(), exact.float(), rtol=2**-7, atol=1e-34)  # e^-88 and less is 1e-38
    expected = torch.nn.functional.silu(gate) * up
    differs = (output != expected) & (expected.abs() > 1e-30)
    assert float(differs.float().mean()) < 0.1  # e^x is another polynomial


def test_what_is_no_number_stays_so(code: MachineCode) -> None:
    row = normal(64, seed=0)
    row[3] = float("nan")
    output = torch.empty_like(row)
    call(code, row_steps.GATE, row, normal(64, seed=1), output, 64)
    assert output.isnan().tolist() == row.isnan().tolist()
    call(code, row_steps.ADD, row, row, output, 64)
    assert output.isnan().tolist() == row.isnan().tolist()
    call(code, row_steps.NORM, row, torch.ones_like(row), output, 1, 64, 0)
    assert output.isnan().all()


@pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))
def test_without_instructions_for_bf16_all_numbers_are_rounded_as_torch_rounds_them() -> None:
    """Ties, overflow, subnormal numbers and whatever is none included."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    code = MachineCode(row_steps.module("avx2"))
    for other in (shuffled, numbers, numbers.flip(0), (numbers.float() * 2.0**-9).bfloat16()):
        output = torch.empty_like(numbers)
        call(code, row_steps.ADD, numbers, other, output, len(numbers))
        expected = numbers + other
        assert torch.equal(output.isnan(), expected.isnan())
        there = ~expected.isnan()
        assert torch.equal(output[there].view(torch.int16), expected[there].view(torch.int16))
