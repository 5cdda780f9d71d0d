"""The KV cache of ragged rows: each sequence's keys and values, apart from everybody else's.

With one tier of memory (the CPU computes, or transformers' probe asks) a sequence has one range of addresses per layer,
heads outermost, and the operating system is the page pool: an untouched page takes no memory, and attention reads
neighbours (`kv_memory.py`); `kv_host.py` lets a GPU's sequences be there, too. A GPU's pool is in `kv_pool.py`, its two
tiers in `kv_tiers.py`; pages on the drive are in `kv_disk.py`, fewer bits in `kv_low_bit.py`. What a sequence has in
common with others it reads in their caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import Cache

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.disk_cache import DiskCache
from pipo_ray.model.fused_rows import RowLayout
from pipo_ray.model.kv_disk import KVDisk
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_memory import SequenceMemory
from pipo_ray.model.kv_pool import KVPool, PooledCache
from pipo_ray.model.kv_spans import AttentionRule, DenseSpan, attend_spans
from pipo_ray.model.kv_tiers import KVTiers, TieredCache
from pipo_ray.model.packed_rows import PackedRows


class SequenceKV(Protocol):
    """The KV cache of one sequence, which decides where it lies, in how many bits, and so how it attends. `capacity`
    and `length` are of its own tokens, which come behind `start` others in other sequences' caches.
    """

    capacity: int
    length: int

    @property
    def start(self) -> int:
        """Tokens of the prefix; 0 where sequences share nothing."""
        ...

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: AttentionRule
    ) -> torch.Tensor:
        """See `SequenceCache.attend`."""
        ...

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        ...

    def drop(self) -> None:
        """Give the memory back."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        ...


class KVStore(Protocol):
    """Where sequences' caches lie: a `KVPool`, `KVTiers` or a `LowBitStore`."""

    def open(self, capacity: int) -> SequenceKV:
        """A new sequence's cache, of at most `capacity` tokens."""
        ...


def at_16_bits(cache: SequenceKV) -> SequenceKV:
    """Of a cache of few bits the one of its layers at 16, which moves pages."""
    wide: SequenceKV = getattr(cache, "wide", cache)
    return wide


@dataclass
class SequenceCache:
    """Keys and values of one sequence: per layer a pair of tensors [num_key_value_heads, capacity, head_dim], of which
    `length` are filled. They come behind those of `prefix`: so many of the first of each of these caches. What
    `compiled` takes it does: a token that comes alone.
    """

    capacity: int
    length: int = 0
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    prefix: tuple[tuple[SequenceCache, int], ...] = ()
    compiled: CompiledAttention | None = None
    _memory: SequenceMemory = field(default_factory=SequenceMemory, repr=False, compare=False)

    @property
    def start(self) -> int:
        """Tokens of the prefix."""
        return sum(count for _, count in self.prefix)

    @property
    def memory(self) -> SequenceMemory:
        """What all layers lie in: another one when they have moved."""
        return self._memory

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `keys`, `values` [heads, tokens, head_dim] behind the `length` tokens there are; views over all of
        its own.

        `length` itself moves on only when the sweep is over (`advance`): each layer appends at the same place.
        """
        stop = self.length + keys.shape[1]
        all_keys, all_values = self.memory_for(layer, keys, values)
        all_keys[:, self.length : stop] = keys
        all_values[:, self.length : stop] = values
        return all_keys[:, :stop], all_values[:, :stop]

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: AttentionRule
    ) -> torch.Tensor:
        """Append `keys`, `values` [kv_heads, n, head_dim] and let `query` [heads, n, head_dim], the same n tokens,
        attend to all there are; see `dense_attention.attend`.
        """
        if not self.prefix and rule.is_plain and self.compiled is not None and self.compiled.takes(query, keys, values):
            memory, stop = self.memory_for(layer, keys, values), self.length + 1
            return self.compiled.attend(query, (keys, values), memory, rule.first_visible(stop), stop, rule.scale)
        own = self.append(layer, keys, values)
        if not self.prefix:
            return attend(query, *own, rule)
        spans = [cache.span(layer, count) for cache, count in self.prefix]
        return attend_spans(query, [*spans, DenseSpan(*own)], rule)

    def memory_for(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All memory of a layer, with room for these new ones."""
        stop = self.length + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} tokens cannot hold {stop}")
        if layer not in self.layers:
            self.layers[layer] = self._memory.pair(layer, keys, values, self.capacity)
        return self.layers[layer]

    def span(self, layer: int, num_tokens: int) -> DenseSpan:
        """Its own first tokens in `layer`, those included that a running sweep has appended."""
        keys, values = self.layers[layer]
        return DenseSpan(keys[:, :num_tokens], values[:, :num_tokens])

    def resize(self, capacity: int, length: int) -> None:
        """Keep its own first `length` tokens alone, in memory for `capacity`. Moves them, a layer at a time."""
        if capacity != self.capacity:
            old, self._memory = self._memory, SequenceMemory()
            for layer, pair in self.layers.items():
                self.layers[layer] = self._memory.pair(layer, *pair, capacity)
                for target, source in zip(self.layers[layer], pair, strict=True):
                    target[:, :length] = source[:, :length]
                old.give_back(layer)
        self.capacity, self.length = capacity, length

    def copy_from(self, parts: Sequence[tuple[SequenceCache, int]]) -> None:
        """Begin with so many of the first own tokens of each of these caches."""
        for cache, count in parts:
            for layer in cache.layers:
                self.append(layer, cache.layers[layer][0][:, :count], cache.layers[layer][1][:, :count])
            self.advance(count)

    def put(self, layer: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Its own tokens from number `first` on in `layer`, which count by `length` alone."""
        if layer not in self.layers:
            self.layers[layer] = self._memory.pair(layer, keys, values, self.capacity)
        for memory, tensor in zip(self.layers[layer], (keys, values), strict=True):
            memory[:, first : first + tensor.shape[1]] = tensor

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        self.length += num_tokens

    def drop(self) -> None:
        """Give the memory back."""
        self.layers.clear()
        self._memory = SequenceMemory()

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers.values())


@dataclass(frozen=True)
class Segment:
    """Where one sequence's tokens lie in the ragged row: columns `start:stop`."""

    cache: SequenceKV
    start: int
    stop: int


class RaggedCache(Cache):
    """What transformers' attention modules see as `past_key_values` while one ragged row runs.

    `update` keeps the row's new keys and values for the attention function, which is called next by the same layer and
    appends them to each sequence's own cache.
    """

    def __init__(self, segments: tuple[Segment, ...], store: KVStore | HostKV | None = None) -> None:
        super().__init__(layers=[])
        self.segments = segments
        self.host = store if isinstance(store, HostKV) else None
        self._pool = store if isinstance(store, KVPool) else None
        paged = getattr(store, "paged", store)  # of few bits it is what holds their pages
        self._tiers = paged if isinstance(paged, KVTiers) else None
        self._disk = paged if isinstance(paged, KVDisk) else None
        self.packed_rows: PackedRows | None = getattr(store, "rows", None)
        self.layer = -1
        self.rule: AttentionRule | None = None  # that a layer has attended by last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Remember the layer; the row's keys and values [1, heads, tokens, head_dim] go on unchanged."""
        self.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions are always passed in."""
        return 0

    def begin_sweep(self) -> None:
        """The row's sweep begins: the first layers' pages come within reach."""
        if self._tiers is not None:
            caches = [(at_16_bits(s.cache), s.stop - s.start) for s in self.segments]
            self._tiers.begin_sweep([(cache, count) for cache, count in caches if isinstance(cache, TieredCache)])
        if self._pool is not None:
            self._pool.begin_sweep(
                [(s.cache, s.stop - s.start) for s in self.segments if isinstance(s.cache, PooledCache)]
            )
        if self._disk is not None:
            paged = [at_16_bits(s.cache) for s in self.segments]
            self._disk.begin_sweep([cache for cache in paged if isinstance(cache, DiskCache)])

    @property
    def fused_row(self) -> RowLayout | None:
        """How the row lies in a pool, if one call is to attend for all: of several sequences, or several tokens.

        A single token of a single sequence is left to the kernel that splits its keys over the whole GPU, unless they
        lie in several places.
        """
        row = None if self._pool is None else self._pool.row
        return None if row is None or (row.is_single_token and row.prefixes is None) else row

    def append_row(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the row's `key`, `value` [1, heads, tokens, head_dim] behind each sequence's tokens; the layer's pools,
        [pool tokens, heads, head_dim].
        """
        assert self._pool is not None
        assert self._pool.row is not None
        pools = self._pool.layer(self.layer, key[0], value[0])
        for pool, new in zip(pools, (key, value), strict=True):
            pool.index_copy_(0, self._pool.row.places, new[0].transpose(0, 1))
        return pools

    def begin_layer(self) -> None:
        """Attention of `layer` begins: its pages come within reach."""
        if self._tiers is not None:
            self._tiers.begin_layer(self.layer)

    def end_layer(self) -> None:
        """Attention of `layer` is over: its pages may go."""
        if self._tiers is not None:
            self._tiers.end_layer(self.layer)

    def advance(self) -> None:
        """The sweep is complete."""
        for segment in self.segments:
            segment.cache.advance(segment.stop - segment.start)
        if self._disk is not None:
            self._disk.end_sweep()
