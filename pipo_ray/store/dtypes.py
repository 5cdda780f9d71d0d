"""The dtypes of the safetensors format, and how many bytes a tensor of them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Bits per element, by the name the format uses. Source: `Dtype` in safetensors/src/tensor.rs (safetensors 0.8).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor.

    Raises KeyError for an unknown dtype, ValueError where the bits do not fill whole bytes.
    """
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    if bits % 8:
        raise ValueError(f"{math.prod(shape)} elements of {dtype} do not fill whole bytes")
    return bits // 8
