from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.rounding import Rounded, round_to_nearest, values_of

NAMES = ("int4-g32", "int4", "int4-g128", "int4-g32-sym", "int4-sym", "int8")


@given(
    st.sampled_from(NAMES), st.integers(1, 9), st.integers(1, 3), st.integers(0, 1 << 30),
    st.sampled_from(["normal", "shifted", "positive", "outlier", "tiny", "constant", "zero"]),
)  # fmt: skip
def test_every_code_is_the_nearest(name: str, rows: int, groups: int, seed: int, kind: str) -> None:
    low_bit = LowBitFormat.parse(name)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * 128, generator=generator)
    weight = {
        "normal": weight, "shifted": weight + 3, "positive": weight.abs(), "tiny": weight * 1e-30,
        "outlier": torch.where(weight > 2.5, 100 * weight, weight), "constant": torch.full_like(weight, -1.25),
        "zero": torch.zeros_like(weight),
    }[kind]  # fmt: skip
    rounded = round_to_nearest(weight, low_bit)
    values = values_of(rounded, low_bit).double()
    columns = low_bit.group or weight.shape[1]
    scale = rounded.scales.double().repeat_interleave(columns, 1)
    low, high = (-127, 127) if low_bit.bits == 8 else (0, 15)
    assert low <= int(rounded.codes.min()) <= int(rounded.codes.max()) <= high
    codes = rounded.codes.double()
    error = (values - weight.double()).abs()
    # No other code is nearer, but for float32's rounding.
    slack = 1e-5 * (weight.double().abs() + scale.abs())
    for step in (-1, 1):
        allowed = (codes + step).clamp(low, high)
        other = values + (allowed - codes) * scale
        assert bool((error <= (other - weight.double()).abs() + slack).all())
    # And the range reaches as far as the weights: symmetric int4 has no code 8, the rest is rounding of scale and zero.
    reach = 1.0 if low_bit.symmetric else 0.5
    assert bool((error <= (reach + 1 / 16) * scale.abs() + 0.01 * values.abs() + slack).all())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_representable_stays(name: str) -> None:
    low_bit = LowBitFormat.parse(name)
    generator = torch.Generator().manual_seed(0)
    if low_bit.bits == 8:
        codes = torch.randint(-127, 128, (7, 256), generator=generator).to(torch.int8)
        codes[:, 0] = 127
        scales = torch.rand(7, 1, generator=generator).bfloat16()
        zeros = torch.zeros_like(scales)
    else:
        codes = torch.randint(0, 16, (7, 256), generator=generator).to(torch.uint8)
        codes[:, :: low_bit.group] = 0
        codes[:, 1 :: low_bit.group] = 14 if low_bit.symmetric else 15
        scales = 2.0 ** torch.randint(-9, 3, (7, 256 // low_bit.group), generator=generator).bfloat16()
        zeros = torch.zeros_like(scales) if low_bit.symmetric else 2 * scales
    wanted = Rounded(codes, scales, zeros)
    got = round_to_nearest(values_of(wanted, low_bit), low_bit)
    for part, expected in zip(got, wanted, strict=True):
        assert torch.equal(part, expected)
