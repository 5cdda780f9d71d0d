"""Pages of keys and values in few bits: error, layout, and that rounding again changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, PageLayout, packed_pages
from pipo_ray.quant.kv_rounding import PageViews, pack_pages, round_along, unpack_pages, views_of


@st.composite
def keys_and_values(draw: st.DrawFn) -> tuple[PageLayout, torch.Tensor, torch.Tensor]:
    """Channels of very different size and far from zero, constant ones, and what 16 bits leave of it."""
    layout = PageLayout(
        draw(st.sampled_from([1, 2, 3, 6])), draw(st.sampled_from([2, 16, 24])),
        draw(st.sampled_from([3, 16, 136, 256])), draw(st.sampled_from([8, 4])),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensors = []
    for dim in (layout.key_dim, layout.value_dim):
        size = 10.0 ** torch.randint(-7, 5, (layout.heads, 1, dim), generator=generator)
        offset = draw(st.sampled_from([0.0, 1.0, -300.0])) * torch.randn(layout.heads, 1, dim, generator=generator)
        tokens = torch.randn(layout.heads, draw(st.just(2)) * PAGE_TOKENS, dim, generator=generator)
        tokens[:, 3] = 0.0
        tokens[:, :, 0] = draw(st.sampled_from([0.0, -0.0, 7.3, 1e-9, -9e4]))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        tensors.append((tokens * size + offset).to(dtype))
    return layout, tensors[0], tensors[1]


def packed(layout: PageLayout, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    pages = torch.zeros(keys.shape[1] // PAGE_TOKENS, layout.page_bytes, dtype=torch.uint8)
    pack_pages(keys, values, views_of(pages, layout), layout)
    return pages


def unpacked(layout: PageLayout, views: PageViews, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.full((layout.heads, tokens, dim), math.nan) for dim in (layout.key_dim, layout.value_dim))
    unpack_pages(views, layout, keys, values, torch.empty(max(keys.numel(), values.numel()), dtype=torch.uint8))
    return keys, values


@settings(max_examples=60, deadline=None)
@given(keys_and_values())
def test_pages_that_are_rounded_again_are_identical(case: tuple[PageLayout, torch.Tensor, torch.Tensor]) -> None:
    layout, keys, values = case
    pages = packed(layout, keys, values)
    again = packed(layout, *unpacked(layout, views_of(pages, layout), keys.shape[1]))
    assert torch.equal(again, pages)


@settings(max_examples=60, deadline=None)
@given(keys_and_values())
def test_each_value_is_off_by_half_a_step(case: tuple[PageLayout, torch.Tensor, torch.Tensor]) -> None:
    """Of its channel in its page (keys), of its group of channels and heads in its token (values); and by what float16
    can tell apart at that distance from zero."""
    layout, keys, values = case
    got = unpacked(layout, views_of(packed(layout, keys, values), layout), keys.shape[1])
    levels = (1 << layout.bits) - 1
    groups = values.float().clamp(-65504, 65504).unflatten(2, (layout.value_groups, -1))
    groups = groups.unflatten(0, (-1, layout.heads_per_group))
    pages = keys.float().clamp(-65504, 65504).unflatten(1, (-1, PAGE_TOKENS))
    for exact, ours, dim in ((pages, got[0], 2), (groups, got[1], (1, 4))):
        step = (exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True)) / levels
        resolution = exact.abs().amax(dim, keepdim=True) * 2**-10 + 2**-15
        assert bool(((ours.view(exact.shape) - exact).abs() <= 0.66 * step + resolution).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_channel_with_an_offset_does_not_spoil_its_neighbours(bits: int) -> None:
    layout = PageLayout(1, 4, 4, bits)
    keys = torch.rand(1, PAGE_TOKENS, 4)
    keys[..., 1] += 100
    got, _ = unpacked(layout, views_of(packed(layout, keys, keys), layout), PAGE_TOKENS)
    assert float((got - keys)[..., [0, 2, 3]].abs().max()) <= 0.51 / ((1 << bits) - 1)


def test_four_bits_hold_two_tokens_in_a_byte() -> None:
    """The layout is part of what other processes and files may hold one day."""
    layout = PageLayout(1, 2, 2, 4)
    keys = torch.arange(PAGE_TOKENS).remainder(16)[None, :, None].expand(1, PAGE_TOKENS, 2).float()
    keys = torch.stack([keys[..., 0], 15 - keys[..., 1]], dim=-1)
    pages = packed(layout, keys, keys)
    views = views_of(pages, layout)
    assert layout.parts == (64, 64, 4, 4, 128, 128)
    assert layout.page_bytes == len(pages[0]) == 448
    tokens = torch.arange(32, dtype=torch.uint8) % 16
    assert torch.equal(views.key_codes[0, 0, :, 0], tokens | tokens << 4)
    assert torch.equal(views.key_codes[0, 0, :, 1], (15 - tokens) | (15 - tokens) << 4)
    assert views.key_scales.flatten().tolist() == [1, 1]
    assert views.key_zeros.flatten().tolist() == [0, 0]


def test_values_have_groups_of_at_most_128_channels() -> None:
    assert [PageLayout(1, 8, dim, 4).value_groups for dim in (8, 128, 129, 136, 192, 256, 131)] == [
        1,
        1,
        3,
        2,
        2,
        2,
        131,
    ]


def test_heads_share_a_scale_up_to_128_channels() -> None:
    assert [PageLayout(8, 128, dim, 4).heads_per_group for dim in (8, 32, 48, 64, 65, 128, 256)] == [
        8,
        4,
        2,
        2,
        1,
        1,
        1,
    ]
    assert [PageLayout(heads, 32, 32, 4).heads_per_group for heads in (1, 2, 3, 5, 6, 7)] == [1, 2, 3, 1, 3, 1]


@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (8, 64), (2, 32), (4, 256)])
def test_a_page_is_within_what_is_promised_of_memory(heads: int, dim: int) -> None:
    """1.85 and 3.5 times less than 16 bits at 32,768 tokens, the window included, for heads of any usual size."""
    wide = 4 * heads * dim
    for bits, times in ((8, 1.85), (4, 3.5)):
        layout = PageLayout(heads, dim, dim, bits)
        nbytes = packed_pages(32767) * layout.page_bytes + SHORT_TOKENS * wide
        assert 32768 * wide / nbytes >= times


def test_what_is_no_number_stays_none() -> None:
    values = torch.zeros(1, 8)
    values[0, 3] = math.nan
    assert bool(round_along(values, -1, 4).zeros.isnan().all())
