"""Weights as torch's int4 kernel for CUDA takes them, for a benchmark: the values are the same."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from scripts import load_script

from pipo_ray.quant.codec import read_rows, views_of, write_rows
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, Panels, machine_layout
from pipo_ray.quant.rounding import round_to_nearest, values_of

NAMES = ("int4-g32", "int4-g64", "int4-g128", "int4-g64-sym")


@pytest.fixture(scope="module")
def torch_int4() -> ModuleType:
    return load_script("torch_int4.py")


def packed(name: str, layout: str, rows: int) -> tuple[torch.Tensor, Panels, torch.Tensor]:
    """A random weight of 256 columns in panels of 128 rows, and its values, float32."""
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
    panels = Panels(LowBitFormat.parse(name).name, layout, rows, 256, 128)
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    for start in range(0, rows, BLOCK_ROWS):
        panel, place = divmod(start, panels.panel_rows)
        part = round_to_nearest(weight[start : start + BLOCK_ROWS], panels.low_bit)
        write_rows(views_of(memory[panel], panels), panels, place, part)
    rounded = [values_of(read_rows(views_of(panel, panels), panels), panels.low_bit) for panel in memory]
    return memory, panels, torch.cat(rounded)[:rows]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", sorted(INT4_LAYOUTS))
@pytest.mark.parametrize("rows", [64, 200])
def test_values_by_its_formula_are_the_codecs(torch_int4: ModuleType, name: str, layout: str, rows: int) -> None:
    memory, panels, wanted = packed(name, layout, rows)
    pairs, scales = torch_int4.code_pairs(memory, panels), torch_int4.scales_and_zeros(memory, panels)
    assert pairs.dtype == torch.uint8
    assert pairs.is_contiguous()
    assert scales.is_contiguous()
    group = panels.low_bit.group
    assert scales.shape == (panels.columns // group, rows, 2)
    codes = torch.stack([pairs >> 4, pairs & 15], 2).view(rows, panels.columns).float()  # the even column's is high
    scale, zero = (part.t().repeat_interleave(group, 1).float() for part in scales.unbind(2))
    assert torch.equal(torch.addcmul(zero, codes - 8, scale), wanted)


def test_scales_and_zeros_are_those_that_torchs_own_product_takes(torch_int4: ModuleType) -> None:
    """torch documents one convention for all devices, so its CPU kernel shows what the CUDA one does with them."""
    memory, panels, wanted = packed("int4-g64", machine_layout(), 128)
    pairs, scales = torch_int4.code_pairs(memory, panels), torch_int4.scales_and_zeros(memory, panels)
    codes = torch.stack([pairs >> 4, pairs & 15], 2).view(panels.rows, panels.columns)
    for_cpu = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(256).bfloat16(), for_cpu, 64, scales)
    assert torch.equal(product.t(), wanted.bfloat16())


def test_what_torch_refuses_is_a_line_with_its_reason(torch_int4: ModuleType) -> None:
    memory, panels, _ = packed("int4-g64", machine_layout(), 64)
    found, refused = torch_int4.timed(memory[None], panels, (1,), lambda product: None, lambda calls, inputs: 1.0)
    assert found == {}  # on a CPU, where there is no such kernel
    assert [line.split(":")[0] for line in refused] == [
        f"[64, 256] int4-g64 torch int4, {tiles} inner tiles" for tiles in (8, 4, 2)
    ]
    assert all("_convert_weight_to_int4pack" in line for line in refused)


def test_the_fastest_width_counts_and_none_that_is_wrong(
    torch_int4: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, panels, wanted = packed("int4-g64", machine_layout(), 64)
    seconds = {(8, 1): 3.0, (8, 4): 1.0, (4, 1): 2.0, (4, 4): 5.0, (2, 1): 0.1, (2, 4): 0.1}

    class Weight:
        def __init__(self, _: torch.Tensor, __: Panels, tiles: int) -> None:
            self.tiles = tiles

        def product(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.float() @ wanted.t() * (0.9 if self.tiles == 2 else 1.0)

    def require_right(product: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not torch.allclose(product(torch.eye(256)), wanted.t()):
            raise ArithmeticError("off by 0.1")

    monkeypatch.setattr(torch_int4, "converted", Weight)
    found, refused = torch_int4.timed(
        memory[None], panels, (1, 4), require_right,
        lambda calls, inputs: seconds[calls[0].__self__.tiles, len(inputs)],
    )  # fmt: skip
    assert found == {1: (2.0, 4), 4: (1.0, 8)}
    assert refused == ["[64, 256] int4-g64 torch int4, 2 inner tiles: off by 0.1"]


def test_the_kernel_is_compared_with_the_fastest_of_ours(torch_int4: ModuleType) -> None:
    def entry(kernel: str, rows: int, seconds: float) -> dict[str, object]:
        return {"shape": (64, 32), "format": "int4-g32", "kernel": kernel, "rows": rows, "seconds": seconds}

    entries = [entry("vector", 1, 4.0), entry("tiles", 1, 2.0), entry("torch int4", 1, 3.0), entry("torch", 1, 1.0)]
    entries += [entry("tiles", 4, 2.0), entry("torch int4", 4, 1.0), entry("torch int4", 32, 1.0)]
    assert torch_int4.comparisons(entries, ("vector", "tiles")) == ["[64, 32] int4-g32  1: 1.50  4: 0.50"]
    assert torch_int4.comparisons(entries[:2], ("vector", "tiles")) == []
