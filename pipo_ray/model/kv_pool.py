"""The KV cache of a GPU that has room for all of it: one pool of tokens per layer, in which a sequence is a range.

So the attention of a whole ragged row, prompts and single tokens of many sequences side by side, is one call of a
fused kernel per layer, and writing its keys and values one more: with a call per sequence, 32 sequences kept an H100
waiting for Python for longer than the weights of Llama-3-8B take to cross the link. What a sequence has in common with
others it reads in their ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipo_ray.errors import ResourceError
from pipo_ray.model.cascade import KeyRanges, RowPrefixes, Sharer
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.fused_rows import RowLayout
from pipo_ray.model.host_values import to_device
from pipo_ray.model.kv_spans import AttentionRule, DenseSpan, attend_spans

Prefix = tuple[tuple["PooledCache", int], ...]
"""So many of the first tokens of each of these caches."""


class PooledCache:
    """The KV cache of one sequence: behind the tokens of `prefix` at most `capacity` of its own, `length` of which are
    there in every layer, from `first` of the pool on. It may move between sweeps.
    """

    def __init__(self, pool: KVPool, capacity: int, first: int, prefix: Prefix = ()) -> None:
        self.capacity, self.first, self.length = capacity, first, 0
        self.prefix = prefix
        self._pool = pool

    @property
    def start(self) -> int:
        """Tokens of the prefix."""
        return sum(count for _, count in self.prefix)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SequenceCache.append`."""
        stop = self.length + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} tokens cannot hold {stop}")
        parts = []
        for pool, new in zip(self._pool.layer(layer, keys, values), (keys, values), strict=True):
            pool[self.first + self.length : self.first + stop] = new.transpose(0, 1)
            parts.append(pool[self.first : self.first + stop].transpose(0, 1))
        return parts[0], parts[1]

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: AttentionRule
    ) -> torch.Tensor:
        """See `SequenceCache.attend`."""
        own = self.append(layer, keys, values)
        if not self.prefix:
            return attend(query, *own, rule)
        pools = self._pool.layer(layer, keys, values)
        spans = []
        for first, count in self.prefix_ranges():
            spans.append(DenseSpan(*(pool[first : first + count].transpose(0, 1) for pool in pools)))
        return attend_spans(query, [*spans, DenseSpan(*own)], rule)

    def prefix_ranges(self) -> tuple[tuple[int, int], ...]:
        """Where its prefix lies in the pool: first token and number of each part. Raises ValueError if a part of it has
        been given back.
        """
        if any(count > cache.capacity for cache, count in self.prefix):
            raise ValueError("a sequence stands on a KV cache that is not there any more")
        return tuple((cache.first, count) for cache, count in self.prefix)

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        self.length += num_tokens

    def resize(self, capacity: int, length: int) -> None:
        """Keep the first `length` tokens alone, with room for `capacity`; see `KVPool.resize`."""
        self.length = length
        self._pool.resize(self, capacity)

    def copy_from(self, parts: Sequence[tuple[PooledCache, int]]) -> None:
        """Begin with so many of the first tokens of each of these caches."""
        for cache, count in parts:
            self._pool.copy(cache.first, self.first + self.length, count)
            self.length += count

    def drop(self) -> None:
        """Give the range back."""
        self._pool.drop(self)
        self.capacity = self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.capacity * self._pool.token_bytes


class KVPool:
    """Keys and values of `num_tokens` tokens per layer, [num_tokens, heads, head_dim] each; a layer's memory is taken
    when it first runs. All of it belongs to the thread that computes.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.num_tokens, self._device = num_tokens, device
        self.row: RowLayout | None = None
        """How the running sweep's row lies in the pool."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._live: list[PooledCache] = []  # in the order of their ranges

    def open(self, capacity: int, prefix: Prefix = ()) -> PooledCache:
        """The cache of a new sequence that has at most `capacity` tokens of its own, behind those of `prefix`. Raises
        ResourceError if fewer are free.
        """
        self._require(capacity)
        if (place := self._gap(capacity)) is None:
            self._close_up()
            place = self._gap(capacity)
        assert place is not None
        cache = PooledCache(self, capacity, place[1], prefix)
        self._live.insert(place[0], cache)
        return cache

    def resize(self, cache: PooledCache, capacity: int) -> None:
        """Let the sequence's range be `capacity` tokens. Raises ResourceError if there is no room for more."""
        more = capacity - cache.capacity
        if more > 0:
            self._require(more)
            behind = self._live[self._live.index(cache) + 1 :]
            if cache.first + capacity > (behind[0].first if behind else self.num_tokens):
                self._close_up()
                for other in reversed(behind):
                    self._move(other, other.first + more)
        cache.capacity = capacity

    def copy(self, source: int, destination: int, num_tokens: int) -> None:
        """Copy tokens from one place to another in every layer; the two may overlap."""
        for pools in self._layers.values():
            for pool in pools:
                pool[destination : destination + num_tokens] = pool[source : source + num_tokens].clone()

    def drop(self, cache: PooledCache) -> None:
        """Give the sequence's range back."""
        self._live.remove(cache)

    def layer(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pool of keys and that of values of `layer`, made for what is like `keys`, `values` [heads, _, dim]."""
        if layer not in self._layers:
            self._layers[layer] = (
                keys.new_empty(self.num_tokens, keys.shape[0], keys.shape[2]),
                values.new_empty(self.num_tokens, values.shape[0], values.shape[2]),
            )
        return self._layers[layer]

    def begin_sweep(self, batch: Sequence[tuple[PooledCache, int]]) -> None:
        """A sweep adds so many tokens to each of these caches."""
        places = [cache.first + cache.length + step for cache, count in batch for step in range(count)]
        counts = [count for _, count in batch]
        sharers, row = [], 0
        for cache, count in batch:
            if cache.prefix:
                sharers.append(Sharer(row, count, cache.start + cache.length, cache.prefix_ranges()))
            row += count
        self.row = RowLayout(
            places=to_device(torch.tensor(places), self._device),
            own=KeyRanges.of(
                counts, [(cache.first, cache.length + count) for cache, count in batch], self.num_tokens, self._device
            ),
            prefixes=RowPrefixes(sharers, self.num_tokens, self._device) if sharers else None,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all layers that have run."""
        return sum((k.nbytes + v.nbytes) // self.num_tokens for k, v in self._layers.values())

    def _gap(self, capacity: int) -> tuple[int, int] | None:
        """Where a range of `capacity` tokens fits first: its place among the live ones, and its first token."""
        first = 0
        for index, cache in enumerate(self._live):
            if cache.first - first >= capacity:
                return index, first
            first = cache.first + cache.capacity
        return (len(self._live), first) if self.num_tokens - first >= capacity else None

    def _close_up(self) -> None:
        """Move the ranges together, so that all that is free is in one place behind them."""
        first = 0
        for cache in self._live:
            if cache.first != first:
                self._move(cache, first)
            first += cache.capacity

    def _move(self, cache: PooledCache, first: int) -> None:
        self.copy(cache.first, first, cache.length)
        cache.first = first

    def _require(self, num_tokens: int) -> None:
        free = self.num_tokens - sum(cache.capacity for cache in self._live)
        if num_tokens > free:
            raise ResourceError(
                f"a sequence needs {num_tokens} tokens of KV cache, {free} of {self.num_tokens} are free; lower the "
                "number of requests or their length"
            )
