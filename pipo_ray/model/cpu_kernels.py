"""The kernels of our own that multiply 16-bit weights on this machine's processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipo_ray.compiled.amx_products import CompiledAmx
from pipo_ray.compiled.bf16_products import CompiledBf16
from pipo_ray.compiled.float_products import LEAST_COLUMNS, CompiledFloats
from pipo_ray.compiled.support import amx_obstacle, floats_obstacle, obstacle
from pipo_ray.model.kernel_profile import KERNELS, Kernel, Layout


@dataclass(frozen=True)
class OwnKernels:
    """`compiled` for few inputs and `amx` for many, both bf16; `floats` for either where neither is the best."""

    compiled: CompiledBf16 | None = None
    amx: CompiledAmx | None = None
    floats: CompiledFloats | None = None

    @classmethod
    def of(cls, dtype: torch.dtype, code_folder: Path | None = None) -> OwnKernels:
        """Those for weights of `dtype`, as far as this machine can have them; their code is kept in `code_folder`."""
        compiled = amx = None
        if dtype is torch.bfloat16:
            compiled = None if obstacle() else CompiledBf16(code_folder)
            amx = None if amx_obstacle() else CompiledAmx(code_folder)
        floats = None if compiled is not None or floats_obstacle() else CompiledFloats(dtype, code_folder)
        return cls(compiled, amx, floats)

    def of_layout(self, layout: Layout) -> list[Kernel]:
        """Torch's kernels for it, and those of ours that are here."""
        missing = self._missing()
        return [kernel for kernel in KERNELS[layout] if not missing.get(kernel)]

    def without(self, weight: torch.Tensor) -> list[Kernel]:
        """Those that cannot multiply `weight`, 16-bit [out, in]."""
        in_rows, is_bf16 = weight.stride(1) == 1, weight.dtype is torch.bfloat16
        floats = self.floats is not None and self.floats.dtype is weight.dtype and weight.shape[1] >= LEAST_COLUMNS
        cannot = {"dots": not floats, "outer": not floats, "compiled": not is_bf16, "amx": not is_bf16}
        return [kernel for kernel, missing in self._missing().items() if missing or cannot[kernel] or not in_rows]

    def stay_awake(self, on: bool) -> None:
        """See `CompiledBf16.stay_awake`."""
        for own in (self.compiled, self.floats):
            if own is not None:
                own.stay_awake(on)

    def _missing(self) -> dict[Kernel, bool]:
        floats = self.floats is None
        return {"dots": floats, "outer": floats, "compiled": self.compiled is None, "amx": self.amx is None}
