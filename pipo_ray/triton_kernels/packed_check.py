"""Whether the kernels for packed pages are right on this device. Needs triton."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.attention_parts import SeenTokens, share_out
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, PageLayout
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of
from pipo_ray.triton_kernels.packed_kernels import PackedKernels

_PAGES = 5
_TOLERANCE = 0.02


def check(
    kernels: PackedKernels, layouts: Collection[PageLayout], num_heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ArithmeticError if a kernel is wrong for pages of these layouts and `num_heads` heads that ask; a kernel
    that does not compile raises what Triton raises. Layouts that the kernels do not take are left out.
    """
    for layout in layouts:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(num_heads, 1, layout.key_dim, generator=generator).to(dtype)
        new = [_random(layout.heads, 1, dim, generator).to(dtype) for dim in (layout.key_dim, layout.value_dim)]
        if not kernels.takes(layout, *(x.to(device) for x in (query, *new))):
            continue
        packed = _PAGES * PAGE_TOKENS
        keys, values = (_random(layout.heads, packed, dim, generator) for dim in (layout.key_dim, layout.value_dim))
        window = [_random(layout.heads, SHORT_TOKENS, x.shape[2], generator).to(dtype) for x in (keys, values)]
        # The page behind the last one is for what leaves the window.
        pages = torch.zeros(_PAGES + 1, layout.page_bytes, dtype=torch.uint8)
        pack_pages(keys, values, views_of(pages[:_PAGES], layout), layout)
        for old, one in zip(window, new, strict=True):
            old[:, -1:] = one
        wanted = _wanted(query, pages[:_PAGES], window, layout)
        first_keys, first_values = (x[:, :PAGE_TOKENS] for x in window)
        pack_pages(first_keys, first_values, views_of(pages[_PAGES:], layout), layout)
        got, got_pages, got_window = _by_kernels(kernels, query, new, pages, window, layout, device)
        error = float((got.double() - wanted).norm() / wanted.norm())
        if not error < _TOLERANCE:
            raise ArithmeticError(f"attention to packed pages of {layout.bits} bits is off by {error:.1%}")
        rest = SHORT_TOKENS - PAGE_TOKENS
        moved = all(torch.equal(a[:, :rest], b[:, PAGE_TOKENS:]) for a, b in zip(got_window, window, strict=True))
        if not moved or not torch.equal(got_pages, pages):
            raise ArithmeticError(f"a page is packed to {layout.bits} bits in another way than on a processor")


def _random(heads: int, tokens: int, dim: int, generator: torch.Generator) -> Tensor:
    """Numbers about another mean in each channel."""
    return torch.randn(heads, tokens, dim, generator=generator) + torch.randn(heads, 1, dim, generator=generator)


def _wanted(query: Tensor, pages: Tensor, window: list[Tensor], layout: PageLayout) -> Tensor:
    """Attention [heads, value_dim] in float64."""
    tokens = len(pages) * PAGE_TOKENS
    keys = torch.empty(layout.heads, tokens, layout.key_dim)
    values = torch.empty(layout.heads, tokens, layout.value_dim)
    codes = torch.empty(max(keys.numel(), values.numel()), dtype=torch.uint8)
    unpack_pages(views_of(pages, layout), layout, keys, values, codes)
    keys, values = (torch.cat([a, b.float()], dim=1).double() for a, b in zip((keys, values), window, strict=True))
    group = query.shape[0] // layout.heads
    scores = query.double() @ keys.repeat_interleave(group, 0).mT * layout.key_dim**-0.5
    result: Tensor = scores.softmax(-1) @ values.repeat_interleave(group, 0)
    return result[:, 0]


def _by_kernels(
    kernels: PackedKernels, query: Tensor, new: list[Tensor], pages: Tensor, window: list[Tensor], layout: PageLayout,
    device: torch.device,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Attention [heads, value_dim], and pages and window as they are then."""
    there, windows = pages.to(device), [x.to(device, copy=True) for x in window]
    there[_PAGES:].zero_()
    for one in windows:
        one[:, -1] = 0.0
    seen = SeenTokens(0, _PAGES, SHORT_TOKENS, SHORT_TOKENS, 0, (2, _PAGES), True)
    work = share_out([seen], layout.heads, 2 * layout.heads)
    address = there.data_ptr()
    addresses = torch.tensor([*(x.data_ptr() for x in windows), address, address, address], device=device)
    numbers = torch.tensor(work.numbers, dtype=torch.int32, device=device)
    output = torch.full((1, query.shape[0], layout.value_dim), float("nan"), dtype=query.dtype, device=device)
    rule = AttentionRule(layout.key_dim**-0.5)
    asked, keys, values = (x.to(device) for x in (query, *new))
    kernels.attend(asked, keys, values, output, rule, layout, addresses, numbers, work)
    kernels.pack(layout, query.dtype, addresses, numbers, work)
    return output[0].cpu(), there.cpu(), [x.cpu() for x in windows]
