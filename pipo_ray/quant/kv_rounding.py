"""Keys and values in 8 or 4 bits, in pages of PAGE_TOKENS tokens.

Keys have outliers in a few channels, so a key's channel has a scale and a zero of its own over a page's tokens; values
have none that last, and each token has them for up to 128 of its channels ("KIVI: a tuning-free asymmetric 2bit
quantization for KV cache", arXiv 2402.02750); of several heads where one has fewer, or scales would take a tenth of
the memory with heads of 32.

A code c stands for zero + scale * c. Scale and zero are float16, codes are those nearest with scale and zero as they
are kept, and a scale is at least the distance between two float16 numbers at its zero. So the least value has code 0,
and what was rounded once is rounded to itself again, bit by bit. What lies beyond 65,504 is held as 65,504.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout

_LARGEST = 65504.0
_MANTISSA_BITS = 10
# A smaller float16 has too few digits for a scale: the largest value would miss the largest code.
_LEAST_SCALE = 2.0**-15


class Rounded(NamedTuple):
    """`codes` uint8, in the shape of the values; `scales`, `zeros` float16, of size 1 where they are common."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def round_along(values: Tensor, dim: int | tuple[int, ...], bits: int) -> Rounded:
    """Round `values` (float32) to 2**bits levels from the least to the largest along `dim`."""
    levels = float((1 << bits) - 1)
    # On a GPU torch would multiply by 1 / levels, which it has rounded: as a tensor it divides by them, as a CPU does.
    levels_there = torch.full((), levels, device=values.device)
    values = values.clamp(-_LARGEST, _LARGEST)
    zeros = values.amin(dim, keepdim=True).half().add_(0.0)  # there is no -0.0
    zero = zeros.float()
    spacing = torch.exp2(torch.floor(torch.log2(zero.abs().clamp_(min=_LEAST_SCALE))) - _MANTISSA_BITS)
    scale = (values.amax(dim, keepdim=True) - zero).div_(levels_there).half().float()
    scale = torch.maximum(scale, spacing).clamp_(min=_LEAST_SCALE)
    codes = ((values - zero) / scale).round_().clamp_(0.0, levels)
    # By way of int16: torch has no vectorised conversion from float32 to uint8.
    return Rounded(codes.to(torch.int16).to(torch.uint8), scale.half(), zeros)


class PageViews(NamedTuple):
    """Views of pages' memory, in the order of `PageLayout.parts`: codes uint8 [pages, heads, rows, dim], where 4 bits
    have the first half of a page's tokens in a row's low bits and the second half in its high bits; float16 scales and
    zeros of keys [pages, heads, 1, key_dim], and of values [pages, groups of heads, tokens, groups of channels].
    """

    key_codes: Tensor
    value_codes: Tensor
    key_scales: Tensor
    key_zeros: Tensor
    value_scales: Tensor
    value_zeros: Tensor


def views_of(pages: Tensor, layout: PageLayout) -> PageViews:
    """The parts of `pages`, uint8 [pages, page_bytes], over the same memory."""
    codes, scales, at = [], [], 0
    dims, of_scales = (layout.key_dim, layout.value_dim), (layout.key_dim, layout.value_groups)
    heads = layout.heads, layout.heads // layout.heads_per_group
    for part, nbytes in enumerate(layout.parts):
        view = pages[:, at : at + nbytes]
        at += nbytes
        if part < 2:
            codes.append(view.unflatten(1, (layout.heads, -1, dims[part])))
        else:
            of = 0 if part < 4 else 1
            scales.append(view.view(torch.float16).unflatten(1, (heads[of], -1, of_scales[of])))
    return PageViews(*codes, *scales)


def pack_pages(keys: Tensor, values: Tensor, views: PageViews, layout: PageLayout) -> None:
    """Round `keys`, `values` [heads, pages * PAGE_TOKENS, dim] and write them to `views`, one page after the other."""
    of_keys = round_along(_paged(keys.float()), -2, layout.bits)
    of_values = round_along(_grouped(_paged(values.float()), layout), (2, -1), layout.bits)
    _write_codes(of_keys.codes, views.key_codes, layout.bits)
    _write_codes(of_values.codes.flatten(1, 2).flatten(-2), views.value_codes, layout.bits)
    views.key_scales.copy_(of_keys.scales)
    views.key_zeros.copy_(of_keys.zeros)
    views.value_scales.copy_(of_values.scales.squeeze(-1).squeeze(2))
    views.value_zeros.copy_(of_values.zeros.squeeze(-1).squeeze(2))


def unpack_pages(views: PageViews, layout: PageLayout, keys: Tensor, values: Tensor, codes: Tensor) -> None:
    """Write what the pages stand for to `keys`, `values` [heads, pages * PAGE_TOKENS, dim]. `codes` is scratch: uint8,
    at least as many elements as the larger of the two.
    """
    _read(views.key_codes, layout.bits, views.key_scales, views.key_zeros, _paged(keys), codes)
    scales, zeros = (tensor.unsqueeze(2).unsqueeze(-1) for tensor in (views.value_scales, views.value_zeros))
    _read(views.value_codes, layout.bits, scales, zeros, _grouped(_paged(values), layout), codes)


def _paged(tensor: Tensor) -> Tensor:
    """[heads, pages * PAGE_TOKENS, dim] as [pages, heads, PAGE_TOKENS, dim]."""
    pages: Tensor = tensor.unflatten(1, (-1, PAGE_TOKENS))
    return pages.transpose(0, 1)


def _grouped(values: Tensor, layout: PageLayout) -> Tensor:
    """[pages, heads, tokens, dim] as [pages, groups of heads, heads, tokens, groups of channels, channels]."""
    grouped: Tensor = values.unflatten(-1, (layout.value_groups, -1)).unflatten(1, (-1, layout.heads_per_group))
    return grouped


def _write_codes(codes: Tensor, rows: Tensor, bits: int) -> None:
    if bits == 4:
        low, high = codes.split(PAGE_TOKENS // 2, dim=2)
        codes = low | high << 4
    rows.copy_(codes)


def _read(rows: Tensor, bits: int, scales: Tensor, zeros: Tensor, output: Tensor, scratch: Tensor) -> None:
    """`output` [pages, heads, PAGE_TOKENS, ...] is zero + scale * code."""
    if bits == 4:
        pages, heads, half, dim = rows.shape
        both = scratch[: 2 * rows.numel()].view(heads, pages, 2, half, dim).transpose(0, 1)
        torch.bitwise_and(rows, 15, out=both[:, :, 0])
        torch.bitwise_right_shift(rows, 4, out=both[:, :, 1])
        rows = both.flatten(2, 3)
    wide = output if output.dtype == torch.float32 else torch.empty_like(output, dtype=torch.float32)
    wide.copy_(rows.view(output.shape))
    torch.addcmul(zeros.float(), wide, scales.float(), out=wide)
    if wide is not output:
        output.copy_(wide)
