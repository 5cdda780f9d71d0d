"""Which products a device gets for low-bit weights, as far as that can be seen without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from low_bit_weights import RandomWeight

from pipo_ray.model import low_bit_choice
from pipo_ray.model.kept_profiles import ProfilePlaces
from pipo_ray.model.kernel_profile import KERNELS, Cost, KernelProfile, Layout
from pipo_ray.model.low_bit_choice import cuda_products, most_used
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import Panels, divide


def test_the_most_used_format_of_each_width_is_measured() -> None:
    names = ("int8", "int4-g32", "int4", "int4", "int4-g128")
    panels = [divide(64, 128, LowBitFormat.parse(name), "avx2") for name in names]
    assert [one.format for one in most_used(panels)] == ["int4-g64", "int8"]
    assert [one.format for one in most_used(panels[:1])] == ["int8"]


@pytest.mark.parametrize("capability", [(7, 0), (9, 0)])
def test_without_kernels_torch_unpacks_and_says_why(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nSecond line.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(low_bit_choice, "_triton_products", fails)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    generator = torch.Generator().manual_seed(1)
    weight = RandomWeight.make("int4", "avx2", 100, 128, 1 << 20, generator)
    products = cuda_products([weight.panels], ProfilePlaces(), torch.device("cpu"), None)
    assert (
        products.obstacle
        == {
            (7, 0): "the GPU has compute capability 7.0, and Triton's bf16 needs 8.0",
            (9, 0): "its kernels do not work here (RuntimeError: Failed to find C compiler.)",
        }[capability]
    )


def test_kernels_of_a_gpu_are_measured_once_for_a_format_and_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure(products: object, kinds: Sequence[Panels], device: torch.device) -> KernelProfile:
        asked.extend(one.format for one in kinds)
        cost = Cost(float(len(asked)), (1,), (1.0,), 1.0)
        layouts = map(layout_of, kinds)
        return KernelProfile("bfloat16", 1, {layout: dict.fromkeys(KERNELS[layout], cost) for layout in layouts})

    def layout_of(panels: Panels) -> Layout:
        return "cuda-int4" if panels.low_bit.bits == 4 else "cuda-int8"

    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=1 << 37, multi_processor_count=132)
    parts = {
        "measure": {"check": lambda *_: None, "measure": measure},
        "products": {"TritonProducts": lambda device: None, "layout_of": layout_of},
    }
    for name, members in parts.items():
        monkeypatch.setitem(sys.modules, f"pipo_ray.triton_kernels.{name}", SimpleNamespace(**members))
    monkeypatch.setattr(low_bit_choice, "obstacle", lambda capability: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

    def run(session: str, *formats: str) -> KernelProfile:
        kinds = [divide(64, 128, LowBitFormat.parse(name), "avx512") for name in formats]
        products = cuda_products(kinds, ProfilePlaces(tmp_path / session, tmp_path / "kept"), torch.device("cpu"), None)
        assert products.obstacle is None
        return products._profile

    first = run("1", "int4", "int8")
    assert run("2", "int4", "int8") == first
    assert asked == ["int4-g64", "int8"]
    assert run("3", "int4-g32", "int8").costs["cuda-int8"] == first.costs["cuda-int8"]
    assert asked == ["int4-g64", "int8", "int4-g32"]
    gpu.name = "NVIDIA H100 80GB HBM3"
    assert run("4", "int8") != first
    assert asked == ["int4-g64", "int8", "int4-g32", "int8"]
