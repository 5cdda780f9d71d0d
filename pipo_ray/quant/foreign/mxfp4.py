"""MXFP4 checkpoints, as gpt-oss has them, dequantized: exact in bf16.

Of a fused expert tensor [experts, inputs, outputs], which the file has the other way round:

    *_blocks  uint8 [experts, outputs, inputs / 32, 16]    two e2m1 numbers in a byte, the first in its low half
    *_scales  uint8 [experts, outputs, inputs / 32]        a power of two for 32 of them, plus 127

Source: OCP Microscaling Formats specification 1.0, sections 5.3.3 and 5.4.1, and `convert_moe_packed_tensors` in
transformers/integrations/mxfp4.py, which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipo_ray.errors import CheckpointError
from pipo_ray.quant.foreign.detect import SourceFormat
from pipo_ray.quant.foreign.reading import TensorFiles
from pipo_ray.quant.foreign.weight import ForeignWeight, Survey
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.rounding import Rounded

PARTS = ("_blocks", "_scales")
"""How the names end of the tensors that a weight is made of."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP = 32
_BIAS = 127
_MOST = 252
"""The largest scale with which 6 is still a float32; 255 stands for NaN."""


def find_weights(files: TensorFiles, source: SourceFormat) -> dict[str, ForeignWeight]:
    """The quantized weights by plain name. Raises CheckpointError for one whose parts do not fit together."""
    found: dict[str, ForeignWeight] = {}
    for key, header in files.checkpoint.tensors.items():
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        if header.dtype != "U8" or len(header.shape) != 4 or header.shape[3] != GROUP // 2:
            raise CheckpointError(
                f"tensor {key!r} in {files.checkpoint.files[key]} is {header.dtype} of shape {list(header.shape)}, "
                "MXFP4 blocks are U8 [experts, outputs, inputs / 32, 16]; download the checkpoint again"
            )
        experts, outputs, groups, _ = header.shape
        files.header(name, f"{name}_scales", ("U8",), (experts, outputs, groups))
        found[name] = _Mxfp4Weight(name, (experts, groups * GROUP, outputs), files.checkpoint.files[key], None, files)
    return found


@dataclass(frozen=True)
class _Mxfp4Weight(ForeignWeight):
    files: TensorFiles

    def rows(self, start: int, stop: int) -> _Mxfp4Rows:
        inputs = self.shape[1]
        parts = []
        for expert in range(start // inputs, -(-stop // inputs)):
            first, last = max(start - expert * inputs, 0), min(stop - expert * inputs, inputs)
            groups = slice(first // GROUP, -(-last // GROUP))
            blocks = self.files.kept_row(f"{self.name}_blocks", expert)[:, groups]
            scales = self.files.kept_row(f"{self.name}_scales", expert)[:, groups]
            self._check(scales)
            offset = groups.start * GROUP
            parts.append((blocks, scales, slice(first - offset, last - offset)))
        return _Mxfp4Rows(parts)

    def survey(self) -> Survey:
        # They are a 16th of the file: looked at when they are used.
        return Survey(0, 0)

    def _check(self, scales: torch.Tensor) -> None:
        if int(scales.max()) > _MOST:
            raise CheckpointError(
                f"tensor '{self.name}_scales' in {self.file} holds the scale {int(scales.max())}, MXFP4's go up to "
                f"{_MOST}, and 255 is NaN; the checkpoint is damaged: download it again"
            )


@dataclass(frozen=True)
class _Mxfp4Rows:
    parts: list[tuple[torch.Tensor, torch.Tensor, slice]]

    def values(self) -> torch.Tensor:
        """As in `EncodedRows`."""
        numbers = torch.tensor(E2M1)
        result = []
        for blocks, scales, inputs in self.parts:
            codes = torch.stack((blocks & 15, blocks >> 4), 3).flatten(2)
            values = torch.ldexp(numbers[codes.int()], scales.int().sub_(_BIAS).unsqueeze(2))
            result.append(values.flatten(1)[:, inputs].T)
        return torch.cat(result)

    def rounded(self, low_bit: LowBitFormat) -> Rounded:
        """Never asked for."""
        raise ValueError(f"MXFP4 codes are not {low_bit.name}")
