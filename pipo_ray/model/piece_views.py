"""Tensors over the bytes of pieces."""

from __future__ import annotations

import torch

from pipo_ray.model.layout import TORCH_DTYPES
from pipo_ray.plan.pieces import PieceTensor


def view_of(memory: torch.Tensor, tensor: PieceTensor) -> torch.Tensor:
    """`tensor` as a view of the piece's bytes."""
    part = memory[tensor.offset : tensor.offset + tensor.nbytes]
    return part.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
