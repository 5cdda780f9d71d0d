"""Tokens that come alone, one of each of several sequences, and what they attend to in RAM: at 16 bits, or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from pipo_ray.compiled import packed_attention
from pipo_ray.compiled.attend import Call, CompiledAttention
from pipo_ray.compiled.pack import CompiledPacking
from pipo_ray.model.kv_spans import AttentionRule

if TYPE_CHECKING:
    from pipo_ray.model.kv_cache import SequenceCache
    from pipo_ray.model.kv_low_bit import LowBitCache


class HostRow(Protocol):
    """One token each of several sequences, in one layer. Either `call` or `repeat` or `attend` appends it."""

    @property
    def memories(self) -> Sequence[object]:
        """What holds the sequences' keys and values: others, or in another order, if these lie elsewhere."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether every sequence has room for its token."""
        ...

    def compiles(
        self, compiled: CompiledAttention, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> bool:
        """Whether the kernel takes all of these, [heads, n, dim] each, given where they are or were."""
        ...

    def call(
        self, compiled: CompiledAttention, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        output: Tensor,
    ) -> Call:  # fmt: skip
        """The kernel's call for them, in RAM, into `output` [n, heads, dim]. Raises ValueError without room."""
        ...

    def packing(self, packing: CompiledPacking) -> Call | None:
        """A call that has to be over before: it packs what has left windows with the tokens before these."""
        ...

    def repeat(self, call: Call) -> None:
        """Have an earlier call for the same memories do it for the next tokens, in the same places as those before."""
        ...

    def attend(self, number: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """The attention of sequence `number` alone, without the kernel for all: see `SequenceCache.attend`."""
        ...


class WideRow:
    """Of sequences whose layer is at 16 bits."""

    def __init__(self, layer: int, caches: Sequence[SequenceCache]) -> None:
        self._layer, self._caches = layer, caches

    @property
    def memories(self) -> Sequence[object]:
        """See `HostRow`."""
        return [cache.memory for cache in self._caches]

    @property
    def has_room(self) -> bool:
        """See `HostRow`."""
        return all(cache.length < cache.capacity for cache in self._caches)

    def compiles(
        self, compiled: CompiledAttention, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> bool:
        """See `HostRow`."""
        if not rule.is_plain or any(cache.prefix for cache in self._caches):
            return False
        return compiled.takes_heads(query, keys, values)

    def call(
        self, compiled: CompiledAttention, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        output: Tensor,
    ) -> Call:  # fmt: skip
        """See `HostRow`."""
        memories = [cache.memory_for(self._layer, keys[:, :1], values[:, :1]) for cache in self._caches]
        spans = [(rule.first_visible(cache.length + 1), cache.length + 1) for cache in self._caches]
        return compiled.each(query, (keys, values), memories, spans, rule.scale, output)

    def packing(self, packing: CompiledPacking) -> Call | None:
        """See `HostRow`."""
        return None

    def repeat(self, call: Call) -> None:
        """See `HostRow`."""
        call.repeat([cache.length + 1 for cache in self._caches])

    def attend(self, number: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `HostRow`."""
        return self._caches[number].attend(self._layer, query, keys, values, in_ram(rule))


class PackedRow:
    """Of sequences whose layer has fewer bits. `keys` and `values` [kv_heads, n, dim] are as the tokens' will be, in
    RAM.
    """

    def __init__(
        self, layer: int, caches: Sequence[LowBitCache], keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> None:
        self._layer, self._caches = layer, caches
        one = keys[:, :1], values[:, :1]
        self._memories = [cache.layer_for(layer, *one, rule) for cache in caches]

    @property
    def memories(self) -> Sequence[object]:
        """See `HostRow`."""
        return [one for memory in self._memories for one in memory.memories]

    @property
    def has_room(self) -> bool:
        """See `HostRow`: without it there is no such row."""
        return True

    def compiles(
        self, compiled: CompiledAttention, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> bool:
        """See `HostRow`."""
        takes = packed_attention.takes(self._memories[0].layout) and compiled.takes_heads(query, keys, values)
        return rule.is_plain and takes

    def call(
        self, compiled: CompiledAttention, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        output: Tensor,
    ) -> Call:  # fmt: skip
        """See `HostRow`."""
        seen = [memory.seen(*sizes, rule) for memory, sizes in zip(self._memories, self._begin(), strict=True)]
        layout = self._memories[0].layout
        return compiled.each_packed(query, (keys, values), seen, layout, rule.scale, output)

    def packing(self, packing: CompiledPacking) -> Call | None:
        """See `HostRow`."""
        pages = [page for memory in self._memories if (page := memory.take_leaving()) is not None]
        return packing.each(self._memories[0].layout, pages) if pages else None

    def repeat(self, call: Call) -> None:
        """See `HostRow`."""
        lengths, num_pages = zip(*self._begin(), strict=True)
        call.repeat_packed(lengths, num_pages)

    def attend(self, number: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `HostRow`."""
        return self._caches[number].attend(self._layer, query, keys, values, in_ram(rule))

    def _begin(self) -> list[tuple[int, int]]:
        """Of each sequence the length of its window with its token, and the number of pages that this one sees."""
        pairs = zip(self._memories, self._caches, strict=True)
        return [memory.begin_token(cache.start + cache.length) for memory, cache in pairs]


def in_ram(rule: AttentionRule) -> AttentionRule:
    """The rule with its tensors in RAM."""
    return rule if rule.sinks is None else replace(rule, sinks=rule.sinks.cpu())
