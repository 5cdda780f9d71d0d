"""Round to nearest: a weight's codes, scales and zeros."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipo_ray.quant.formats import LowBitFormat


class Rounded(NamedTuple):
    """Of a weight [rows, columns]: `codes` [rows, columns], uint8 from 0 to 15 for int4, int8 for int8; `scales` bf16
    [rows, columns / group] (int8: [rows, 1]); `zeros` likewise, for int8 not used.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def round_to_nearest(weight: torch.Tensor, low_bit: LowBitFormat) -> Rounded:
    """Round `weight` (float32 [rows, columns], finite) in `low_bit`.

    Codes are those nearest with scale and zero as they are kept, in bf16: their own rounding costs nothing more.
    """
    if low_bit.bits == 8:
        scales = weight.abs().amax(1, keepdim=True).div_(127).bfloat16()
        codes = weight.div(_divisor(scales)).round_().clamp_(-127, 127)
        return Rounded(codes.to(torch.int8), scales, torch.zeros_like(scales))
    groups = weight.view(len(weight), -1, low_bit.group)
    low, high = groups.amin(2), groups.amax(2)  # ten times as fast as aminmax
    if low_bit.symmetric:
        # Codes reach from -8 to 7: the largest magnitude gets the -8, so the scale has the other sign than it.
        scales = torch.where(high > -low, high, low).div_(-8).bfloat16()
        zeros = torch.zeros_like(scales)
    else:
        scales = high.sub(low).div_(15).bfloat16()
        zeros = low.add(scales.float(), alpha=8).bfloat16()
    inverses = _divisor(scales).reciprocal_()
    # 8 more, so that codes begin at 0, and a half, because conversion to integers cuts off: few passes make it fast.
    offsets = zeros.float().mul_(inverses).neg_().add_(8.5)
    codes = groups.mul(inverses.unsqueeze(2)).add_(offsets.unsqueeze(2)).clamp_(0, 15.5)
    # By way of int16: torch has no vectorised conversion from float32 to uint8.
    return Rounded(codes.to(torch.int16).to(torch.uint8).view(weight.shape), scales, zeros)


def values_of(rounded: Rounded, low_bit: LowBitFormat) -> torch.Tensor:
    """The float32 values that the codes stand for, [rows, columns]."""
    codes = rounded.codes.float()
    if low_bit.bits == 8:
        return codes * rounded.scales.float()
    groups = (codes - 8).reshape(len(codes), -1, low_bit.group)
    values = torch.addcmul(rounded.zeros.float().unsqueeze(2), groups, rounded.scales.float().unsqueeze(2))
    return values.reshape(codes.shape)


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """A group of equal values has scale 0, and its zero is the value: any divisor gives code 8 then."""
    return torch.where(scales == 0, torch.ones_like(scales), scales).float()
