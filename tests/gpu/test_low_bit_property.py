"""Every product with low-bit weights on the device against float64, at random shapes, strides, groups and batches."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from low_bit_weights import ROUNDING, RandomWeight, kernels_of, with_strides

from pipo_ray.model.kernel_profile import KERNELS, Cost, Kernel, KernelProfile, Layout
from pipo_ray.model.low_bit import LowBitProducts
from pipo_ray.quant.panels import INT4_LAYOUTS, machine_layout

pytestmark = pytest.mark.gpu

NAMES = ("int4-g32", "int4", "int4-g128", "int4-sym", "int8")
STEP = 2.0**-8
# Compiling is what takes long: rows and inputs are free, and a kernel is compiled for each format, layout and batch.
_EXAMPLES = 60


def _products(kernel: Kernel | Literal["torch"], device: torch.device) -> LowBitProducts:
    """What multiplies by this kernel of Triton's alone, or by torch's operations."""
    empty = KernelProfile("bfloat16", 1, {})
    if kernel == "torch":
        return LowBitProducts(empty, machine_layout(), device)
    pytest.importorskip("triton")
    from pipo_ray.triton_kernels.products import TritonProducts

    chosen, others = Cost(0.0, (1, 2), (0.0, 0.0)), Cost(0.0, (1, 2), (1.0, 1.0))
    layouts: tuple[Layout, ...] = ("cuda-int4", "cuda-int8")
    costs = {layout: {one: chosen if one == kernel else others for one in KERNELS[layout]} for layout in layouts}
    profile = KernelProfile("bfloat16", 1, costs)
    return LowBitProducts(profile, machine_layout(), device, triton=TritonProducts(device, scratch_bytes=4 << 20))


@pytest.mark.parametrize("kernel", [*dict.fromkeys((*kernels_of("int4"), *kernels_of("int8"))), "torch"])
@settings(max_examples=_EXAMPLES)
@given(
    st.sampled_from(NAMES), st.sampled_from(sorted(INT4_LAYOUTS)), st.integers(1, 3000), st.integers(1, 24),
    st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33, 64, 70, 257]), st.sampled_from([1, 20_000, 1 << 20]),
    st.integers(0, 3), st.sampled_from(["plain", "transposed", "strided", "expanded"]), st.booleans(),
    st.integers(0, 1 << 30),
)  # fmt: skip
def test_products_are_those_of_the_unpacked_weight(
    kernel: Kernel | Literal["torch"], name: str, layout: str, rows: int, groups: int, num_inputs: int,
    panel_bytes: int, offset: int, strides: str, with_bias: bool, seed: int,
) -> None:  # fmt: skip
    device = torch.device("cuda", 0)
    generator = torch.Generator().manual_seed(seed)
    if kernel != "torch" and kernel not in kernels_of(name):
        name = "int8" if kernel in kernels_of("int8") else "int4"
    if kernel == "vector":
        num_inputs = 1 + num_inputs % 4
    weight = RandomWeight.make(name, layout, rows, groups * (112 if name == "int8" else 128), panel_bytes, generator)
    behind = torch.full((64 * offset + weight.memory.numel(),), 0x7F, dtype=torch.uint8, device=device)
    memory = behind[64 * offset :].view(weight.memory.shape).copy_(weight.memory)
    inputs = torch.randn(num_inputs, weight.panels.columns, generator=generator).bfloat16()
    bias = torch.randn(rows, generator=generator).bfloat16() if with_bias else None
    bound = _products(kernel, device).bind(memory, weight.panels, 0)
    on_device = with_strides(inputs.to(device), strides)
    got = torch.nn.functional.linear(on_device, bound, None if bias is None else bias.to(device))
    weight.require_product(
        got, on_device.cpu(), rounded=kernel == "torch" or kernel in ROUNDING,
        step=STEP if kernel != "torch" else 2 * STEP, sums=1e-4,
        bias=bias,
    )  # fmt: skip
