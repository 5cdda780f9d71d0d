"""A page that leaves its window, packed by machine code: byte for byte what `quant/kv_rounding.py` makes of it."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_params import INSTRUCTIONS

from pipo_ray.compiled import packed_attention
from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.machine import run_here
from pipo_ray.compiled.pack import CompiledPacking, LeavingPage
from pipo_ray.plan.low_bit_pages import PageLayout
from pipo_ray.quant.kv_rounding import pack_pages, views_of

SHAPES = st.sampled_from([(1, 64), (4, 64), (3, 128), (2, 256)])


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def packing(request: pytest.FixtureRequest) -> CompiledPacking:
    return CompiledPacking(instructions=request.param)


def windows(heads: int, dim: int, generator: torch.Generator, scale: float, offset: float) -> list[torch.Tensor]:
    """Channels of different sizes, some far off; some tokens that are all alike."""
    made = []
    for _ in range(2):
        numbers = torch.randn(heads, 192, dim, generator=generator) * torch.exp(
            2 * torch.randn(dim, generator=generator)
        )
        numbers = scale * numbers + offset * torch.randn(dim, generator=generator)
        numbers[:, ::17] = offset
        made.append(numbers.bfloat16())
    return made


@settings(max_examples=60, deadline=None)
@given(
    SHAPES, st.sampled_from([8, 4]), st.sampled_from([1e-8, 1e-3, 1.0, 300.0, 3e4, 1e6]),
    st.sampled_from([0.0, -0.0, 1.0, 40.0, 7e4]), st.integers(0, 1000),
)  # fmt: skip
def test_it_is_that_of_torch(
    packing: CompiledPacking, shape: tuple[int, int], bits: int, scale: float, offset: float, seed: int
) -> None:
    heads, dim = shape
    layout = PageLayout(heads, dim, dim, bits)
    assert packed_attention.takes(layout)
    keys, values = windows(heads, dim, torch.Generator().manual_seed(seed), scale, offset)
    wanted, got = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    pack_pages(keys[:, :64], values[:, :64], views_of(wanted[None], layout), layout)
    moved = [tensor[:, 64:].clone() for tensor in (keys, values)]
    call = packing.each(layout, [LeavingPage(got, (keys, values), 192)])
    run_here(call.function, ctypes.addressof(call.context))
    assert torch.equal(got, wanted)
    for tensor, rest in zip((keys, values), moved, strict=True):
        assert torch.equal(tensor[:, :128], rest)


@pytest.mark.parametrize("bits", [8, 4])
def test_several_windows_on_several_threads(
    packing: CompiledPacking, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    generator = torch.Generator().manual_seed(1)
    layout = PageLayout(8, 128, 128, bits)
    pairs = [windows(8, 128, generator, 1.0, 3.0) for _ in range(5)]
    wanted, got = (torch.zeros(5, layout.page_bytes, dtype=torch.uint8) for _ in range(2))
    for number, (keys, values) in enumerate(pairs):
        pack_pages(keys[:, :64], values[:, :64], views_of(wanted[number : number + 1], layout), layout)
    moved = [keys[:, 64:].clone() for keys, _ in pairs]
    attention = CompiledAttention()
    pages = [LeavingPage(got[number], (keys, values), 192) for number, (keys, values) in enumerate(pairs)]
    call = attention.deferred(packing.each(layout, pages))
    assert not got.any()
    run_here(call.function, ctypes.addressof(call.context))
    assert torch.equal(got, wanted)
    assert all(torch.equal(keys[:, :128], rest) for (keys, _), rest in zip(pairs, moved, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_number_that_is_none_stays_so(packing: CompiledPacking, bits: int) -> None:
    layout = PageLayout(2, 64, 64, bits)  # which share the scales of values
    keys, values = (torch.randn(2, 192, 64).bfloat16() for _ in range(2))
    keys[0, 5, 7] = values[1, 9, 3] = math.nan
    page = torch.zeros(layout.page_bytes, dtype=torch.uint8)
    call = packing.each(layout, [LeavingPage(page, (keys, values), 192)])
    run_here(call.function, ctypes.addressof(call.context))
    views = views_of(page[None], layout)
    for scales in (views.key_scales, views.key_zeros):
        assert scales.isnan().nonzero().tolist() == [[0, 0, 0, 7]]
    for scales in (views.value_scales, views.value_zeros):
        assert scales.isnan().nonzero().tolist() == [[0, 0, 9, 0]]
