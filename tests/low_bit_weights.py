"""Random low-bit weights as panels, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipo_ray.model.kernel_profile import KERNELS, Kernel
from pipo_ray.quant.codec import read_rows, views_of, write_rows
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import Panels, divide
from pipo_ray.quant.rounding import round_to_nearest, values_of

ROUNDING: tuple[Kernel, ...] = ("tiles", "native")
"""Kernels of CUDA devices that round weights to bf16."""


def kernels_of(name: str) -> tuple[Kernel, ...]:
    """What multiplies with weights in the format called `name` on a CUDA device."""
    return KERNELS["cuda-int8" if name == "int8" else "cuda-int4"]


@dataclass(frozen=True)
class RandomWeight:
    """`memory` uint8 [panels, panel_bytes], and float64 `values` [rows, columns]."""

    panels: Panels
    memory: torch.Tensor
    values: torch.Tensor

    @classmethod
    def make(
        cls, name: str, layout: str, rows: int, columns: int, panel_bytes: int, generator: torch.Generator
    ) -> RandomWeight:
        """In the format called `name`."""
        panels = divide(rows, columns, LowBitFormat.parse(name), layout, panel_bytes)
        weight = torch.randn(rows, columns, generator=generator) / 8 + 0.05
        memory = torch.zeros(panels.shape, dtype=torch.uint8)
        values = []
        for index, panel in enumerate(memory):
            start, stop = panels.rows_of(index, index + 1)
            views = views_of(panel, panels)
            write_rows(views, panels, 0, round_to_nearest(weight[start:stop], panels.low_bit))
            values.append(values_of(read_rows(views, panels), panels.low_bit))
        return cls(panels, memory, torch.cat(values)[:rows].double())

    def require_product(
        self,
        got: torch.Tensor,
        inputs: torch.Tensor,
        *,
        rounded: bool,
        step: float,
        sums: float = 1e-5,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Fail if `got` is not `inputs` times the weight, and `bias`. The result may be off by `step` of itself, as
        bf16 is, once for the product and once for the sum with a bias, and if `rounded` each weight as well; sums by
        `sums` of what they would be without signs.
        """
        wanted = inputs.double() @ self.values.T
        terms = inputs.double().abs() @ self.values.abs().T
        allowed = step * wanted.abs() + (step * rounded + sums) * terms + 1e-30
        if bias is not None:
            wanted = wanted + bias.double()
            allowed += step * wanted.abs()
        assert (got.dtype, got.shape) == (torch.bfloat16, wanted.shape)
        excess = ((got.cpu().double() - wanted).abs() / allowed).max()
        assert bool(excess <= 1), f"{self.panels}: off by {float(excess):.2f} times what rounding explains"


def with_strides(inputs: torch.Tensor, strides: str) -> torch.Tensor:
    """`inputs` [n, columns], as another view of memory: "plain" as they are, "transposed" with the columns outermost,
    "strided" every second number and every second row of what has others between, "expanded" the first row n times.
    """
    if strides == "transposed":
        return inputs.T.contiguous().T
    if strides == "strided":
        between = torch.full(
            (2 * inputs.shape[0], 2 * inputs.shape[1]), torch.nan, dtype=inputs.dtype, device=inputs.device
        )
        view = between[::2, 1::2]
        return view.copy_(inputs)
    if strides == "expanded":
        return inputs[:1].expand_as(inputs)
    return inputs


def at_place(inputs: torch.Tensor, start: int) -> torch.Tensor:
    """`inputs`, as a view of memory of which they begin `start` numbers after the allocator's 64-byte boundary."""
    memory = torch.full((start + inputs.numel(),), torch.nan, dtype=inputs.dtype, device=inputs.device)
    return memory[start:].view(inputs.shape).copy_(inputs)


def rounding_of_inputs(rows: torch.Tensor, weight: torch.Tensor, group: int) -> torch.Tensor:
    """What rounding inputs to 16 bits, each group of columns by its largest, makes of products at most: half a step
    times the weight. `rows` [n, columns], `weight` float64 [out, columns]; [n, out].
    """
    steps = rows.double().abs().unflatten(-1, (-1, group)).amax(-1) / 32767
    return 0.51 * steps @ weight.abs().unflatten(1, (-1, group)).sum(-1).T
