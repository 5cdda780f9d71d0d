"""Layers that compute the same take the same memory: one of them is measured, the others are replayed.

A deep model on meta is thousands of operations, each of which costs as much as on a device; of its layers most differ
in their weights only, which nobody has there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipo_ray.model.live_bytes import LiveBytes
from pipo_ray.model.trace import layer_prefixes

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NUMBERS = ("layer_idx",)
"""What tells a layer its place: transformers looks up caches by it, and lists in the configuration."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size)


def layer_kinds(model: PreTrainedModel) -> dict[nn.Module, Hashable]:
    """The decoder layers of `model`, each with what it has in common with those that compute the same on meta."""
    layers = [model.get_submodule(name) for name in layer_prefixes(model)]
    options = vars(model.config.get_text_config()).values()
    lists = [value for value in options if isinstance(value, (list, tuple)) and len(value) == len(layers)]
    return {
        layer: (tuple(_plain(one[number]) for one in lists), *map(_kind, *zip(*layer.named_modules(), strict=True)))
        for number, layer in enumerate(layers)
    }


@contextmanager
def replayed_layers(kinds: dict[nn.Module, Hashable], live: LiveBytes) -> Iterator[None]:
    """In this context a layer of `kinds`, all on meta, does not compute where one of its kind has computed with such
    inputs: it gives such a result, and `live` reaches the peak that it reached then. Outside layers everything runs.

    That is exact: a layer that keeps something, or gives back what was there before it, is never replayed.
    """
    seen: dict[Hashable, _Run] = {}
    wrapped = [layer for layer in kinds if "forward" not in vars(layer)]
    for layer in wrapped:
        layer.forward = partial(_forward, layer.forward, kinds[layer], seen, live)
    try:
        yield
    finally:
        for layer in wrapped:
            del layer.forward


@dataclass(frozen=True)
class _Run:
    """`peak` is in bytes above what there was before; `made` are shape, strides and dtype of the tensors of a result,
    which is one of them, or a tuple."""

    peak: int
    made: tuple[tuple[Any, ...], ...]
    single: bool

    def again(self) -> Any:
        tensors = [
            torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in self.made
        ]
        return tensors[0] if self.single else tuple(tensors)


def _forward(
    forward: Callable[..., Any], kind: Hashable, seen: dict[Hashable, _Run], live: LiveBytes, *args: Any, **kwargs: Any
) -> Any:
    key = kind, _inputs((args, kwargs), {})
    if (known := seen.get(key)) is not None:
        live.reach(live.now + known.peak)
        return known.again()
    before, held, peak = live.now, live.held(), live.peak
    live.peak = before
    result = forward(*args, **kwargs)
    above = live.peak - before
    live.reach(peak)
    tensors = result if type(result) is tuple else (result,)
    if all(type(tensor) is torch.Tensor and _is_whole(tensor) for tensor in tensors):
        made = {id(tensor.untyped_storage()): tensor.nbytes for tensor in tensors}
        if len(made) == len(tensors) and not made.keys() & held.keys() and live.held() == held | made:
            shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
            seen[key] = _Run(above, shapes, tensors is not result)
    return result


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.is_meta and tensor.untyped_storage().nbytes() == tensor.nbytes


def _inputs(value: Any, storages: dict[int, int]) -> Hashable:
    """Equal for inputs that differ in their numbers only. Something unknown is equal to nothing."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            return object()
        storage = value.untyped_storage()
        number = storages.setdefault(id(storage), len(storages))
        return type(value), value.dtype, value.shape, value.stride(), value.storage_offset(), storage.nbytes(), number
    if isinstance(value, (list, tuple)):
        return type(value), *(_inputs(part, storages) for part in value)
    if isinstance(value, dict):
        return dict, *((name, _inputs(part, storages)) for name, part in value.items())
    return (type(value), value) if isinstance(value, _PLAIN) else object()


def _kind(name: str, module: nn.Module) -> Hashable:
    own = ((key, _plain(value)) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE)
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return (
        name,
        type(module),
        tuple(item for item in own if item[0] not in _NUMBERS),
        tuple((key, type(tensor), tensor.shape, tensor.stride(), tensor.dtype) for key, tensor in tensors),
    )


def _plain(value: Any) -> Hashable:
    """Something unknown is equal to itself: layers may share it, say their configuration."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, partial):
        return (
            partial,
            id(value.func),
            _plain(value.args),
            tuple((key, _plain(one)) for key, one in value.keywords.items()),
        )
    return (type(value), value) if isinstance(value, _PLAIN) else id(value)
