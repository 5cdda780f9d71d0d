"""The weights of a GGUF file: blocks that hold codes and their scales together.

Of the types, int4-g32 holds the codes of three exactly:

    Q4_0   d float16, 32 codes                               value = (q - 8) d
    Q4_1   d, m float16, 32 codes                            value = q d + m
    Q4_K   d, dmin float16, 8 groups of 32 with a scale s    value = q (d s) - dmin m
           and a minimum m of 6 bits each

Others (Q8_0, Q6_K, Q5_K and what else the `gguf` library reads) are dequantized by that library. Source: the structs
`block_q4_0` and so on in ggml/src/ggml-common.h of llama.cpp, and gguf.quants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pipo_ray.errors import CheckpointError
from pipo_ray.quant.foreign.reading import TensorFiles
from pipo_ray.quant.foreign.weight import EncodedRows, ForeignWeight, Survey
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.rounding import Rounded

Array = NDArray[Any]
_GROUP = 32

FORMATS = {
    GGMLQuantizationType.Q4_0: LowBitFormat(4, _GROUP, True),
    GGMLQuantizationType.Q4_1: LowBitFormat(4, _GROUP),
    GGMLQuantizationType.Q4_K: LowBitFormat(4, _GROUP),
}
"""The types whose codes one of our formats holds, and which."""

FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def can_read(kind: GGMLQuantizationType) -> bool:
    """Whether the library dequantizes tensors of this type."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


@dataclass(frozen=True)
class GgufWeight(ForeignWeight):
    """A tensor of a GGUF file, called `key` there. Row r of the weight is row `order[r]` of the file's; `mend` undoes
    what a converter did to the values of a small tensor, which is then read whole.
    """

    files: TensorFiles
    key: str
    kind: GGMLQuantizationType
    order: Array | None = field(default=None, compare=False)
    mend: Callable[[Array], Array] | None = field(default=None, compare=False)

    @property
    def is_quantized(self) -> bool:
        """Whether it is more than plain numbers."""
        return self.kind not in FLOATS

    def rows(self, start: int, stop: int) -> EncodedRows:
        """As in ForeignWeight."""
        if self.mend is not None:
            values = torch.from_numpy(self.mend(dequantized(self.files.whole(self.key), self.kind)))
            return _MendedRows(values.float().reshape(-1, self.shape[-1])[start:stop])
        if self.order is None:
            return _BlockRows(self, self.files.rows(self.key, start, stop))
        wanted = self.order[start:stop]
        first = int(wanted.min())
        return _BlockRows(
            self, self.files.rows(self.key, first, int(wanted.max()) + 1)[torch.from_numpy(wanted - first)]
        )

    def survey(self) -> Survey:
        """Nothing: scales lie between the codes, and are looked at when they are used. A block of zeros has scale 0."""
        return Survey(0, 0)


def dequantized(blocks: torch.Tensor, kind: GGMLQuantizationType) -> Array:
    """float32 values of uint8 blocks [rows, bytes]."""
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale: who asks for the values looks at them
        values: Array = gguf.dequantize(blocks.numpy(), kind).astype(np.float32, copy=False)
    return values


@dataclass(frozen=True)
class _MendedRows:
    mended: torch.Tensor

    def values(self) -> torch.Tensor:
        return self.mended

    def rounded(self, low_bit: LowBitFormat) -> Rounded:
        raise ValueError(f"these are no codes, {low_bit.name} or other")


@dataclass(frozen=True)
class _BlockRows:
    weight: GgufWeight
    blocks: torch.Tensor

    def values(self) -> torch.Tensor:
        values = torch.from_numpy(dequantized(self.blocks, self.weight.kind))
        if self.weight.is_quantized and not bool(values.isfinite().all()):  # no code but a scale is not finite
            raise self._damaged()
        return values

    def rounded(self, low_bit: LowBitFormat) -> Rounded:
        rows = len(self.blocks)
        blocks = self.blocks.view(-1, gguf.GGML_QUANT_SIZES[self.weight.kind][1])
        codes, scales, zeros = _CODES[self.weight.kind](blocks)
        if not bool(scales.isfinite().all() and zeros.isfinite().all()):
            raise self._damaged()
        parts = (scales.view(rows, -1).bfloat16(), zeros.view(rows, -1).bfloat16())
        return Rounded(codes.view(rows, -1), *parts)

    def _damaged(self) -> CheckpointError:
        return CheckpointError(
            f"tensor {self.weight.key!r} in {self.weight.file} holds a scale that is not finite; the file is "
            "damaged: download it again"
        )


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """Codes of bytes [n, groups, bytes]: all low halves, then all high ones: [n, groups, 2 bytes]."""
    return torch.cat((blocks & 15, blocks >> 4), 2)


def _float16(blocks: torch.Tensor, start: int) -> torch.Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = _float16(blocks, 0)
    return _halves(blocks[:, None, 2:]), scales, torch.zeros_like(scales)


def _q4_1(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = _float16(blocks, 0)
    return _halves(blocks[:, None, 4:]), scales, 8 * scales + _float16(blocks, 2)


def _q4_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = blocks[:, 4:16].numpy()
    six_bits, minima = (torch.from_numpy(part) for part in gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(packed)))
    scales = _float16(blocks, 0) * six_bits.float()
    # 64 codes lie in 32 bytes: a group in the low halves, the next in the high ones.
    codes = _halves(blocks[:, 16:].view(len(blocks), 4, _GROUP))
    return codes, scales, 8 * scales - _float16(blocks, 2) * minima.float()


_CODES: dict[GGMLQuantizationType, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
}


@dataclass(frozen=True)
class StackedWeight(ForeignWeight):
    """Fused experts [experts, rows, columns] whose rows are those of `parts` one after the other (gate, then up)."""

    parts: tuple[GgufWeight, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether one of them is."""
        return any(part.is_quantized for part in self.parts)

    def rows(self, start: int, stop: int) -> EncodedRows:
        """As in ForeignWeight."""
        found: list[EncodedRows] = []
        while start < stop:
            expert, row = divmod(start, self.shape[1])
            for part in self.parts:
                if row < part.shape[1]:
                    break
                row -= part.shape[1]
            count = min(stop - start, part.shape[1] - row)
            first = expert * part.shape[1] + row
            found.append(part.rows(first, first + count))
            start += count
        return _JoinedRows(found)

    def survey(self) -> Survey:
        """As the parts'."""
        return Survey(0, 0)


@dataclass(frozen=True)
class _JoinedRows:
    parts: list[EncodedRows]

    def values(self) -> torch.Tensor:
        return torch.cat([part.values() for part in self.parts])

    def rounded(self, low_bit: LowBitFormat) -> Rounded:
        found = [part.rounded(low_bit) for part in self.parts]
        return Rounded(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))
