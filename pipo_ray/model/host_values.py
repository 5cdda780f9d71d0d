"""Whole numbers that the host knows and the device needs: so that nobody has to ask the device for them.

Reading a number back from a GPU waits for everything that was asked of it before, the copies of weights included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_ATTRIBUTE = "_pipo_host_values"
_PINNED_BYTES = 1 << 20  # torch keeps pinned memory for good: not for whole prompts' embeddings


def known(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """`values` as int64 [len(values)] on `device`, whose `host_values` cost nothing."""
    host = torch.tensor(values, dtype=torch.int64)
    return _remember(to_device(host, device), host.numpy())


def row_of(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with a first dimension of 1."""
    return _remember(tensor[None], getattr(tensor, _ATTRIBUTE, None))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in one dimension."""
    return _remember(tensor.reshape(-1), getattr(tensor, _ATTRIBUTE, None))


def host_values(tensor: torch.Tensor) -> npt.NDArray[np.int64]:
    """The values of whole-numbered `tensor`, flat; waits for the device where they are not known."""
    found = getattr(tensor, _ATTRIBUTE, None)
    if found is None:
        found = tensor.reshape(-1).cpu().numpy().astype(np.int64, copy=False)
    return found


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, which is in RAM, on `device`; to a GPU without waiting for it unless the tensor is large."""
    if device.type == "cuda" and tensor.nbytes <= _PINNED_BYTES:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _remember(tensor: torch.Tensor, values: npt.NDArray[np.int64] | None) -> torch.Tensor:
    if values is not None:
        setattr(tensor, _ATTRIBUTE, values)
    return tensor
