"""The way between RAM and a device for keys, values and packed pages that are at home in RAM: pinned buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipo_ray.pipeline.host_functions import as_device_sees

BUFFER_BYTES = 32 << 20
"""A buffer is no larger, unless one token, or one page, is."""


class HostLink:
    """Copies between RAM and `device`, in parts that two pinned buffers hold. One thread uses it, and in all copies a
    tensor is [heads, n, dim], or as a function says.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: tuple[Tensor, Tensor] | None = None  # the buffer "output", in RAM and on the device
        self.buffers: dict[str, Tensor] = {}

    def to_host(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors [n, heads, dim] of the device as [heads, n, dim] in RAM, in a buffer until this is called again."""
        on_host = self.copy_to_host(parts)
        self.synchronize()
        return on_host

    def copy_to_host(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The same, there once the device's stream gets here."""
        n = parts[0].shape[0]
        together = torch.cat([part.flatten(1) for part in parts], dim=1)
        buffer = self.buffer("row", tuple(together.shape), together.dtype)
        buffer.copy_(together, non_blocking=True)
        columns = buffer.split([part.shape[1] * part.shape[2] for part in parts], dim=1)
        return [column.view(n, *part.shape[1:]).transpose(0, 1) for column, part in zip(columns, parts, strict=True)]

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy tensors of the device to those of the same shapes in RAM. They are there when this returns."""
        at_once = tokens_at_once(*sources)
        for first in range(0, sources[0].shape[1], at_once):
            part = slice(first, first + at_once)
            on_host = self.to_host([source.transpose(0, 1)[part] for source in sources])
            for target, rows in zip(targets, on_host, strict=True):
                target[:, part] = rows

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy a tensor in RAM to one of the same shape on the device. It may change when this returns."""
        at_once = tokens_at_once(source)
        for first in range(0, source.shape[1], at_once):
            part = source[:, first : first + at_once]
            buffer = self.buffer("row", tuple(part.shape), part.dtype)
            buffer.copy_(part)
            target[:, first : first + at_once].copy_(buffer, non_blocking=True)
            self.synchronize()

    def put_before(self, new: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """`earlier`, in RAM, and `new` behind them, on the device."""
        tokens = sum(part.shape[1] for part in earlier)
        whole = new.new_empty(new.shape[0], tokens + new.shape[1], new.shape[2])
        at = 0
        for part in earlier:
            self.send(part, whole[:, at : at + part.shape[1]])
            at += part.shape[1]
        whole[:, at:] = new
        return whole

    def on_device(self, attended: Tensor) -> Tensor:
        """The buffer "output", filled as `attended`, where the device reads it."""
        if self._device.type != "cuda":
            return attended
        buffer = self.buffers["output"]
        if self._seen is None or self._seen[0] is not buffer:
            self._seen = buffer, as_device_sees(buffer, self._device)
        return self._seen[1][: attended.nbytes].view(attended.dtype).view(attended.shape)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned memory that is there until it is asked for again under this name."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self.buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self.synchronize()  # a deferred call may use the one that there is
            # By powers of two: torch keeps pinned memory that is given back, for blocks of such sizes.
            size = 1 << max(20, (nbytes - 1).bit_length())
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self.buffers[name] = buffer
        return buffer[:nbytes].view(dtype).view(shape)

    def synchronize(self) -> None:
        """Wait for the device's stream."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def tokens_at_once(*tensors: Tensor) -> int:
    """So many tokens of all these [heads, _, dim] together does a buffer hold."""
    return max(1, BUFFER_BYTES // sum(x.itemsize * x.shape[0] * x.shape[2] for x in tensors))
