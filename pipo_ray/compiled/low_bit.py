"""Our own kernels for low-bit weights on the CPU, of each width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipo_ray.compiled.amx_low_bit_products import CompiledAmxLowBit
from pipo_ray.compiled.int8_products import CompiledInt8
from pipo_ray.compiled.products import CompiledInt4
from pipo_ray.compiled.steps import Steps
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import Panels


class CompiledLowBit:
    """Multiplies bf16 inputs with panels of int8, or of int4 in the layout `pipo_ray.compiled.support.LAYOUT`.

    One caller at a time. `folder` is where machine code is kept (see `MachineCode`); `amx` says whether the matrix unit
    can be used (see `amx_obstacle`).
    """

    def __init__(self, folder: Path | None = None, *, amx: bool = False) -> None:
        self._int4, self._int8 = CompiledInt4(folder), CompiledInt8(folder)
        self.amx = CompiledAmxLowBit(folder) if amx else None
        """Its products."""

    def product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int, *, blocks: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `CompiledInt8.product`; int4 has one kernel."""
        if panels.low_bit.bits == 8:
            return self._int8.product(memory, panels, num_rows, num_inputs, blocks=blocks)
        return self._int4.product(memory, panels, num_rows, num_inputs)

    def add_inputs(self, steps: Steps, row: torch.Tensor, low_bit: LowBitFormat) -> torch.Tensor | None:
        """What `add_product` wants to know of a row of inputs, bf16 [columns], filled by a step."""
        return self._int4.add_sums(steps, row, low_bit.group) if low_bit.bits == 4 else None

    def add_product(
        self, steps: Steps, memory: torch.Tensor, panels: Panels, num_rows: int, row: torch.Tensor,
        inputs: torch.Tensor | None, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """See `CompiledInt4.add_product`; `inputs` are what `add_inputs` gave."""
        if inputs is None:
            self._int8.add_product(steps, memory, panels, num_rows, row, output)
        else:
            self._int4.add_product(steps, memory, panels, num_rows, row, inputs, output)

    def stay_awake(self, on: bool) -> None:
        """Whether threads wait awake for a little after a product with few inputs. For weights that stay where they
        are: the next product comes soon.
        """
        self._int4.stay_awake(on)
        self._int8.stay_awake(on)
