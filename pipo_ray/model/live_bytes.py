"""Adds up the bytes of tensors while torch computes: how much is there at a time, and the most of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within this context every operation's new memory counts from its making until nothing refers to it; views count
    nothing, nor does what was there before. Works on meta as well, where nothing is allocated.

    `now` and `peak` are in bytes. What a kernel takes and gives back within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {id(tensor.untyped_storage()) for tensor in _tensors((args, list(kwargs.values())))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in before and id(storage) not in self._live:
                self._add(storage)
        return result

    def held(self) -> dict[int, int]:
        """Bytes of what is there, by the id of its storage."""
        return {key: nbytes for key, (_, nbytes) in self._live.items()}

    def reach(self, nbytes: int) -> None:
        """As if so many bytes had been there."""
        self.peak = max(self.peak, nbytes)

    def _add(self, storage: Any) -> None:
        key, nbytes = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            del self._live[key]
            self.now -= nbytes

        self._live[key] = weakref.ref(storage, gone), nbytes
        self.now += nbytes
        self.reach(self.now)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
