"""Fine-grained FP8 checkpoints (`quant_method` "fp8": DeepSeek-V3, Qwen3-FP8 and others), dequantized.

A weight is float8_e4m3 [rows, columns], `weight_scale_inv` float32, bf16 or a power of two (float8_e8m0) for each
block of `weight_block_size`, by default 128 x 128; blocks at the edges are smaller. A value is code times scale.
Source: `Fp8Dequantize` in transformers/integrations/finegrained_fp8.py, which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipo_ray.errors import CheckpointError, UnsupportedModelError
from pipo_ray.quant.foreign.detect import SourceFormat
from pipo_ray.quant.foreign.reading import FLOATS, TensorFiles
from pipo_ray.quant.foreign.weight import ForeignWeight, Survey
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.rounding import Rounded

PARTS = ("_scale_inv", ".activation_scale", ".input_scale")
"""How the names end of the tensors that a weight is made of, or that belong to activations."""


def find_weights(files: TensorFiles, source: SourceFormat) -> dict[str, ForeignWeight]:
    """The quantized weights by plain name. Raises CheckpointError for one whose parts do not fit together."""
    size = source.settings.get("weight_block_size")
    block = None if size is None else (int(size[0]), int(size[1]))
    return {
        key: fp8_weight(files, key, f"{key}_scale_inv", block)
        for key, header in files.checkpoint.tensors.items()
        if header.dtype == "F8_E4M3"
    }


def fp8_weight(files: TensorFiles, key: str, scales: str, block: tuple[int, int] | None) -> ForeignWeight:
    """The weight `key` with its scales: one for each `block`, or without one for each row or for all of it."""
    shape = files.checkpoint.tensors[key].shape
    if len(shape) != 2:
        raise UnsupportedModelError(f"tensor {key!r} has shape {list(shape)}: only matrices of FP8 can be read")
    found = files.header(key, scales, (*FLOATS, "F8_E8M0")).shape
    grid = (1, 1) if found in ((), (1,)) else found
    if block is None:
        block = (1 if grid[0] == shape[0] else shape[0], shape[1])
    if grid != (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
        raise CheckpointError(
            f"tensor {scales!r} in {files.checkpoint.files[scales]} has shape {list(found)}, blocks of "
            f"{block[0]} x {block[1]} of a weight {list(shape)} need another; use the config.json that belongs to "
            "these weights"
        )
    return _Fp8Weight(key, shape, files.checkpoint.files[key], None, files, scales, block)


@dataclass(frozen=True)
class _Fp8Weight(ForeignWeight):
    files: TensorFiles
    scales: str
    block: tuple[int, int]

    def rows(self, start: int, stop: int) -> _Fp8Rows:
        height, width = self.block
        scales = self.files.whole(self.scales).view(-1, -(-self.shape[1] // width))
        of_row = torch.arange(start, stop) // height
        return _Fp8Rows(self.files.rows(self.name, start, stop), scales.float()[of_row], width)

    def survey(self) -> Survey:
        self.check_scales(self.files.whole(self.scales), self.scales)
        return Survey(0, 0)


@dataclass(frozen=True)
class _Fp8Rows:
    codes: torch.Tensor
    scales: torch.Tensor
    width: int

    def values(self) -> torch.Tensor:
        columns = self.codes.shape[1]
        return self.codes.float().mul_(self.scales.repeat_interleave(self.width, 1)[:, :columns])

    def rounded(self, low_bit: LowBitFormat) -> Rounded:
        raise ValueError(f"FP8 codes are not {low_bit.name}")
