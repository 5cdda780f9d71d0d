"""Triton's kernels on the CPU, by its interpreter, against float64. Needs triton, which torch's CPU build has not.

tests/gpu/test_low_bit_products.py has them compiled.
"""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_bit_weights import ROUNDING, RandomWeight, kernels_of
from triton_interpreter import STEP

from pipo_ray.model.kernel_profile import KERNELS, Cost, Kernel, KernelProfile
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import INT4_LAYOUTS, divide
from pipo_ray.triton_kernels import measure
from pipo_ray.triton_kernels.measure import check
from pipo_ray.triton_kernels.products import MOST_INPUTS, RowsProduct, TritonProducts

NAMES = ("int4-g32", "int4", "int4-g128", "int4-sym", "int8")
CPU = torch.device("cpu")


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.sampled_from([(name, kernel) for name in NAMES for kernel in kernels_of(name)]),
    st.sampled_from(sorted(INT4_LAYOUTS)), st.integers(1, 300), st.integers(1, 12), st.integers(1, 70),
    st.sampled_from([1, 20_000, 1 << 20]), st.sampled_from([1, 3, 40]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_products_are_those_of_the_unpacked_weight(
    kind: tuple[str, Kernel], layout: str, rows: int, groups: int, num_inputs: int, panel_bytes: int, processors: int,
    seed: int,
) -> None:  # fmt: skip
    name, kernel = kind
    generator = torch.Generator().manual_seed(seed)
    columns = groups * 128 if name != "int8" else groups * 112  # in part no multiple of what a loop takes at once
    weight = RandomWeight.make(name, layout, rows, columns, panel_bytes, generator)
    if kernel in MOST_INPUTS:
        num_inputs = 1 + num_inputs % MOST_INPUTS[kernel]
    inputs = torch.randn(num_inputs, columns, generator=generator).bfloat16()
    products = TritonProducts(CPU, scratch_bytes=1 << 20)
    products._processors = processors  # decides into how many parts a product is cut
    product = products.product(weight.memory, weight.panels, rows, num_inputs, kernel)
    bias = torch.randn(rows, generator=generator).bfloat16()
    around = torch.full((num_inputs, rows + 5), 7.0, dtype=torch.bfloat16)
    part = around[:, 2 : 2 + rows]
    for added, output in ((None, None), (bias, part)):  # what the first one leaves behind must not disturb the second
        products._scratch.fill_(0x7F)
        got = product(inputs, added, output)
        weight.require_product(got, inputs, rounded=kernel in ROUNDING, step=STEP, bias=added)
        assert not products._arrivals.any()
    assert got is part
    assert bool((around[:, :2] == 7).all() and (around[:, 2 + rows :] == 7).all()), "written beside the output"


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_weight_larger_than_the_scratch_memory_is_unpacked_in_pieces(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = RandomWeight.make(name, "avx512", 200, 128, 20_000, generator)
    inputs = torch.randn(3, 128, generator=generator).bfloat16()
    products = TritonProducts(CPU, scratch_bytes=64 * 128 * 2)
    got = products.product(weight.memory, weight.panels, 200, 3, "native")(inputs)
    weight.require_product(got, inputs, rounded=True, step=STEP)


@pytest.mark.parametrize("kernel", KERNELS["cuda-int4"])
def test_some_of_the_panels_are_some_of_the_rows(kernel: Kernel) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = RandomWeight.make("int4", "plain", 200, 128, 1, generator)
    inputs = torch.randn(2, 128, generator=generator).bfloat16()
    products = TritonProducts(CPU, scratch_bytes=1 << 20)
    got = products.product(weight.memory[2:], weight.panels, 72, 2, kernel)(inputs)
    some = RandomWeight(weight.panels, weight.memory[2:], weight.values[128:])
    some.require_product(got, inputs, rounded=kernel in ROUNDING, step=STEP)


@pytest.mark.parametrize("name", ["int4-g32", "int4-sym", "int8"])
def test_a_kernel_that_multiplies_wrongly_is_found_out(name: str) -> None:
    weight = RandomWeight.make(name, "avx2", 64, 128, 1 << 20, torch.Generator().manual_seed(7))
    products = TritonProducts(CPU, scratch_bytes=1 << 20)
    check(products, weight.panels, CPU)
    original = products.product
    products.product = lambda *arguments: lambda rows: 1.03 * original(*arguments)(rows)  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError, match="is off by"):
        check(products, weight.panels, CPU)


def test_the_profile_chooses_and_the_vector_kernel_only_for_few() -> None:
    panels = RandomWeight.make("int8", "avx512", 64, 128, 1 << 20, torch.Generator().manual_seed(8)).panels
    fast, slow = Cost(0.0, (1, 2), (0.0, 0.0)), Cost(0.0, (1, 2), (1.0, 1.0))
    profile = KernelProfile("bfloat16", 1, {"cuda-int8": {"vector": fast, "tiles": slow, "native": slow}})
    products = TritonProducts(CPU, scratch_bytes=1 << 20)
    assert products.choose(profile, MOST_INPUTS["vector"], panels, 64) == "vector"
    assert products.choose(profile, MOST_INPUTS["vector"] + 1, panels, 64) == "tiles"
    assert products.product(torch.empty(0), panels, 64, 0, "native")(torch.empty(0, 128).bfloat16()).shape == (0, 64)


def test_columns_are_cut_as_far_as_scratch_memory_and_counters_go() -> None:
    """For 1000 outputs, whose sums take 4,000 bytes a part."""
    products = TritonProducts(CPU, scratch_bytes=16_000)
    assert products._divide(1024, 64, 8, 1000, 5) == (4, 256)  # of 8 that were wanted
    assert products._divide(1024, 64, 2, 1000, 5) == (2, 512)
    assert products._divide(1024, 64, 8, 4001, 5) == (1, 1024)
    assert products._divide(1024, 64, 8, 1, (1 << 16) + 1) == (1, 1024)
    assert products._divide(192, 64, 8, 1, 5) == (3, 64)


def test_each_chunk_that_is_unpacked_is_launched() -> None:
    """512 rows of 1024 columns at a time."""
    panels = divide(4096, 1024, LowBitFormat.parse("int4"), "avx512")
    codes, native = Cost(0.0, (1, 64), (0.0, 0.0), 30e-6), Cost(0.0, (1, 64), (0.0, 0.0), 9e-6)
    profile = KernelProfile("bfloat16", 1, {"cuda-int4": {"codes": codes, "native": native}})
    products = TritonProducts(CPU, scratch_bytes=1 << 20)
    chosen = [products.choose(profile, 16, panels, rows) for rows in (512, 3 * 512 - 64, 4 * 512)]
    assert chosen == ["native", "native", "codes"]


def test_what_is_measured_is_the_devices_time_and_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def device_seconds(calls: Collection[RowsProduct], inputs: torch.Tensor) -> float:
        assert len(calls) >= 2, "one weight stays in the cache"
        if len(inputs) <= 4:  # interpreted, more take seconds
            for call in calls:
                call(inputs)
        return 1e-6 * len(inputs)

    kinds = [RandomWeight.make(name, "avx2", 64, 128, 1 << 20, torch.Generator()).panels for name in ("int4", "int8")]
    monkeypatch.setattr(measure, "device_seconds", device_seconds)
    monkeypatch.setattr(measure, "_MEASURED_SHAPE", (64, 128))
    monkeypatch.setattr(measure, "_ROTATING_BYTES", 1)
    monkeypatch.setattr(measure, "_TIMES", 1)
    monkeypatch.setattr(measure, "_LAUNCHES", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    profile = measure.measure(TritonProducts(CPU, scratch_bytes=1 << 20), kinds, CPU)
    for layout in ("cuda-int4", "cuda-int8"):
        costs = profile.costs[layout]  # type: ignore[index]
        assert list(costs) == list(KERNELS[layout])  # type: ignore[index]
        assert {cost.fixed_s for cost in costs.values()} == {1e-6}
        assert {cost.rows for kernel, cost in costs.items() if kernel != "vector"} == {(1, 4, 16, 64, 256)}
        assert costs["native"].launch_s > 0.0
    costs = profile.costs["cuda-int8"]
    assert costs["vector"].rows == (1, 4)
    assert costs["vector"].launch_s == costs["tiles"].launch_s > 0.0
