"""Our own kernels for low-bit weights on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipo_ray.compiled.int8_products import CompiledInt8
from pipo_ray.compiled.products import CompiledInt4
from pipo_ray.quant.panels import Panels


class CompiledLowBit:
    """Those of each width. `folder` is where machine code is kept (see `MachineCode`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.int4, self.int8 = CompiledInt4(folder), CompiledInt8(folder)

    def product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `CompiledInt4.product`."""
        kernels = self.int8 if panels.low_bit.bits == 8 else self.int4
        return kernels.product(memory, panels, num_rows, num_inputs)

    def stay_awake(self, on: bool) -> None:
        """See `CompiledInt4.stay_awake`."""
        self.int4.stay_awake(on)
