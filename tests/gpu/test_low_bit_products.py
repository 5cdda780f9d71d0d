"""Triton's kernels compiled for the device, against float64; measured, chosen, and without what they need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors
from low_bit_weights import ROUNDING, RandomWeight, kernels_of

from pipo_ray.model import low_bit_choice
from pipo_ray.model.kept_profiles import ProfilePlaces
from pipo_ray.model.kernel_profile import Kernel, KernelProfile
from pipo_ray.model.low_bit_choice import cuda_products, most_used
from pipo_ray.quant.policy import Precision

pytestmark = pytest.mark.gpu

NAMES = ("int4-g32", "int4", "int4-g128", "int4-sym", "int8")
KINDS = [*((name, "avx512") for name in NAMES), ("int4", "avx2"), ("int4-g32", "plain")]
STEP = 2.0**-8


def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.parametrize("name, layout, kernel", [(*kind, kernel) for kind in KINDS for kernel in kernels_of(kind[0])])
def test_products_are_those_of_the_unpacked_weight(name: str, layout: str, kernel: Kernel) -> None:
    """Shapes in which the last panel is not full, a part of the columns shorter than the others, and a result wider
    than the processors; without the parts of sums, and with them, twice.
    """
    pytest.importorskip("triton")
    from pipo_ray.triton_kernels.products import MOST_INPUTS, TritonProducts

    generator = torch.Generator().manual_seed(len(name) + len(layout))
    products = TritonProducts(device())
    counts = [n for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 64, 130, 512) if n <= MOST_INPUTS.get(kernel, n)]
    for rows, columns, panel_bytes in ((1, 128, 1), (200, 640, 1), (1000, 4096 + 128, 1 << 20), (20_000, 384, 1 << 22)):
        weight = RandomWeight.make(name, layout, rows, columns, panel_bytes, generator)
        memory = weight.memory.to(device())
        for num_inputs in counts:
            inputs = torch.randn(num_inputs, columns, generator=generator).bfloat16()
            product = products.product(memory, weight.panels, rows, num_inputs, kernel)
            on_device = inputs.to(device())
            first, second = product(on_device), product(on_device)
            rounded = kernel in ROUNDING
            weight.require_product(first, inputs, rounded=rounded, step=STEP, sums=1e-4 if rounded else 1e-5)
            assert torch.equal(first, second), "the order in which parts arrive shows"
            bias = torch.randn(rows, generator=generator).bfloat16()
            around = torch.full((num_inputs, rows + 48), 7.0, dtype=torch.bfloat16, device=device())
            for first_column in (16, 3):  # a column that begins on a multiple of 16 bytes, and another one
                part = around[:, first_column : first_column + rows]
                assert product(on_device, bias.to(device()), part) is part
                weight.require_product(
                    part, inputs, rounded=rounded, step=STEP, sums=1e-4 if rounded else 1e-5, bias=bias
                )
            assert bool((around[:, :3] == 7).all() and (around[:, 16 + rows :] == 7).all()), "written beside the output"
            assert not products._arrivals.any()


def test_products_on_another_stream_are_in_its_order() -> None:
    pytest.importorskip("triton")
    from pipo_ray.triton_kernels.products import TritonProducts

    generator = torch.Generator().manual_seed(1)
    weight = RandomWeight.make("int4", "avx512", 4096, 4096, 1 << 22, generator)
    inputs = torch.randn(1, 4096, generator=generator).bfloat16()
    memory, on_device = weight.memory.to(device()), torch.zeros_like(inputs, device=device())
    product = TritonProducts(device()).product(memory, weight.panels, 4096, 1, "codes")
    product(on_device)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        on_device.copy_(inputs.to(device(), non_blocking=True))
        got = product(on_device)
    stream.synchronize()
    weight.require_product(got, inputs, rounded=False, step=STEP)


def test_crossovers_are_measured_once_and_what_is_chosen_is_right(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(2)
    weights = [RandomWeight.make(name, "avx512", 3000, 1024, 1 << 20, generator) for name in ("int4-g32", "int8")]
    kinds = [weight.panels for weight in weights]
    places = ProfilePlaces(tmp_path / "profile.json", tmp_path / "profiles")
    products = cuda_products(kinds, places, device(), tmp_path / "code")
    assert products.obstacle is None
    profile = KernelProfile.load(tmp_path / "profile.json")
    assert profile is not None
    assert set(profile.costs) == {"cuda-int4", "cuda-int8"}
    for weight in weights:
        memory = weight.memory.to(device())
        for num_inputs in (1, 3, 7, 33, 500):
            inputs = torch.randn(num_inputs, 1024, generator=generator).bfloat16()
            got = products.linear(inputs.to(device()), memory, weight.panels, 3000, None)
            weight.require_product(got, inputs, rounded=True, step=STEP, sums=1e-4)
    next_session = ProfilePlaces(tmp_path / "next.json", tmp_path / "profiles")
    assert cuda_products(kinds, next_session, device(), tmp_path / "code")._profile == profile


@pytest.mark.parametrize("precision", ["int4-g32", "int8"])
def test_a_model_through_the_stream(precision: str, tmp_path: Path) -> None:
    """Of two panels in a matrix, from slots and from memory of its own, against the same store on the processor."""
    pytest.importorskip("triton")
    architecture = next(one for one in ARCHITECTURES if one.slug == "llama")
    architecture.save(tmp_path / "checkpoint")
    packed = pack_checkpoint(
        tmp_path / "checkpoint", tmp_path / "store", torch.bfloat16, Precision.parse(precision), panel_bytes=1
    )
    prompts = random_prompts(packed.facts.vocab_size, (5, 23, 11))
    with Pipeline(packed) as pipeline:
        wanted = pipeline.follow(prompts, [3, 20, 8])
    panels = [one.panels for block in packed.manifest.blocks for one in block.tensors if one.panels is not None]
    products = cuda_products(most_used(panels), ProfilePlaces(), device(), None)
    assert products.obstacle is None
    with Pipeline(packed, device=device(), gpu_resident_pieces=2, low_bit=products) as pipeline:
        followed = pipeline.follow(prompts, [3, 20, 8])
    for ours, theirs in zip(followed, wanted, strict=True):
        assert max(relative_errors(ours.logits.cpu(), theirs.logits)) <= 0.05


def test_without_triton_torch_unpacks_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = RandomWeight.make("int4", "avx512", 300, 256, 1 << 20, generator)
    inputs = torch.randn(3, 256, generator=generator).bfloat16()

    def fails(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    for reason in ("triton is not installed", None):
        monkeypatch.setattr(low_bit_choice, "obstacle", lambda capability, reason=reason: reason)
        monkeypatch.setattr(low_bit_choice, "_triton_products", fails)
        products = cuda_products([weight.panels], ProfilePlaces(), device(), None)
        assert products.obstacle == (
            reason or "its kernels do not work here (RuntimeError: Failed to find C compiler.)"
        )
        got = products.linear(inputs.to(device()), weight.memory.to(device()), weight.panels, 300, None)
        weight.require_product(got, inputs, rounded=True, step=2 * STEP)
