"""Which products a device gets for low-bit weights, as far as that can be seen without a GPU."""

from __future__ import annotations

import pytest
import torch
from low_bit_weights import RandomWeight

from pipo_ray.model import low_bit_choice
from pipo_ray.model.low_bit_choice import cuda_products, most_used
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import divide


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
    products = cuda_products([weight.panels], None, torch.device("cpu"), None)
    assert (
        products.obstacle
        == {
            (7, 0): "the GPU has compute capability 7.0, and Triton's bf16 needs 8.0",
            (9, 0): "its kernels do not work here (RuntimeError: Failed to find C compiler.)",
        }[capability]
    )
