"""Sweeps without a model: random keys and values through the tiers, each compared with all that was ever written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from pipo_ray.model.kv_cache import RaggedCache, Segment, SequenceKV
from pipo_ray.model.kv_tiers import KVTiers, TieredCache

HEADS, DIM, VALUE_DIM = 2, 4, 2


@dataclass
class Written:
    """A sequence and all that was ever appended to it, per layer."""

    cache: TieredCache
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


def segments_of(batch: Sequence[tuple[SequenceKV, int]]) -> tuple[Segment, ...]:
    """A row of so many tokens of each of these caches."""
    stops = list(itertools.accumulate(count for _, count in batch))
    return tuple(Segment(cache, stop - count, stop) for (cache, count), stop in zip(batch, stops, strict=True))


def append_random(
    tiers: KVTiers,
    batch: list[tuple[Written, int]],
    layers: int,
    computing: Callable[[], AbstractContextManager[None]] = nullcontext,
    shape: tuple[int, int, int] = (HEADS, DIM, VALUE_DIM),
) -> None:
    """One sweep in bfloat16, so many tokens to each of `batch`. What comes back must be bit-identical."""
    heads, dim, value_dim = shape
    device = tiers.gpu.device
    segments = segments_of([(one.cache, count) for one, count in batch])
    column = segments[-1].stop
    row = RaggedCache(segments, tiers)
    row.begin_sweep()
    for layer in range(layers):
        keys = torch.randn(heads, column, dim, device=device).bfloat16()
        values = torch.randn(heads, column, value_dim, device=device).bfloat16()
        row.update(keys[None], values[None], layer)
        row.begin_layer()
        for (one, _), segment in zip(batch, segments, strict=True):
            new = keys[:, segment.start : segment.stop], values[:, segment.start : segment.stop]
            one.keys[layer] = torch.cat([one.keys.get(layer, new[0][:, :0]), new[0]], dim=1)
            one.values[layer] = torch.cat([one.values.get(layer, new[1][:, :0]), new[1]], dim=1)
            with computing():
                got_keys, got_values = segment.cache.append(layer, *new)
                got = got_keys.clone(), got_values.clone()
            assert torch.equal(got[0], one.keys[layer])
            assert torch.equal(got[1], one.values[layer])
        row.end_layer()
    row.advance()
