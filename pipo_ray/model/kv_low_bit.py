"""The KV cache of a sequence in few bits: packed pages, and a window of the last tokens at 16 bits.

When a page's tokens have all left the window, they are rounded once, from their 16 bits. A token always sees the same
pages packed, whichever tokens are computed with it: so the cache is the same for a prompt at once, in chunks, token by
token, or rebuilt.

A token that comes alone attends to packed pages as they are, where that can be compiled; otherwise they are unpacked,
a few MiB at a time.

Sequences with a common beginning read its whole pages where they are, each in the cache of who packed it. What comes
behind the last common page each has for itself: a copy of at most a window, from a sequence that still has these tokens
at 16 bits, or that computes them in the same sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.kv_cache import SequenceCache, SequenceKV
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.low_bit_layer import LowBitLayer
from pipo_ray.model.packed_pages import LinePages, MemoryPages, PackedPages
from pipo_ray.model.packed_rows import PackedRows
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, PageLayout, packed_pages


class PagedSequence(SequenceKV, Protocol):
    """A sequence's cache at 16 bits, in pages that may be elsewhere, which has room for packed pages among them."""

    def packed_pages(self, layer: int, layout: PageLayout, sliding_window: int | None) -> PackedPages:
        """Where the packed pages of a layer that is not at 16 bits lie, those of the prefix first; called once, with
        the layer's first tokens. A token sees so many with itself.
        """
        ...

    def resize(self, capacity: int, length: int, packed: int) -> None:
        """Keep its own first `length` tokens alone, `packed` of which are in packed pages, with room for `capacity`."""
        ...


class PagedStore(Protocol):
    """Where sequences' pages lie, at 16 bits and packed."""

    def open(self, capacity: int, prefix: Any = ()) -> PagedSequence:
        """A new sequence's cache, of at most `capacity` tokens behind so many of the first of each of the caches of
        this store in `prefix`, in whole packed pages.
        """
        ...


Prefix = Sequence[tuple["LowBitCache", int]]
"""Caches, and of each so many of its own first tokens."""

Fetch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values in the memory where a cache has them."""


class LowBitStore:
    """Opens sequences' caches at `bits` per layer (16, 8 or 4), and has the scratch that they share. All of it belongs
    to the thread that computes. What `compiled` takes it does: a token that comes alone; `rows` is that for
    all sequences of a row on a GPU. Packed pages, and the layers
    at 16 bits, are in `paged`; without it each sequence's are by themselves in the memory of its keys and values.
    """

    def __init__(
        self,
        bits: tuple[int, ...],
        compiled: CompiledAttention | None = None,
        paged: PagedStore | None = None,
        rows: PackedRows | None = None,
    ) -> None:
        self.bits, self.compiled, self.paged = bits, compiled, paged
        self.rows = rows if paged is None else None  # pages that move have no address to be known by
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def bits_of(self, layer: int) -> int:
        """The layer's. Raises UnsupportedModelError for one that the model does not have by its facts."""
        if layer >= len(self.bits):
            raise UnsupportedModelError(
                f"layer {layer} has a KV cache, but its model's facts say {len(self.bits)} layers"
            )
        return self.bits[layer]

    def open(self, capacity: int, prefix: Prefix = (), *, pages: bool = True) -> LowBitCache:
        """The cache of a new sequence that has at most `capacity` tokens of its own, behind those of `prefix`; without
        `pages` no more than a window.
        """
        return LowBitCache(self, capacity, prefix, pages=pages)

    def scratch(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that holds until it is asked for again."""
        found = self._scratch.get((device, dtype))
        if found is None or found.numel() < num_elements:
            with torch.inference_mode(False):  # written to in and out of inference mode
                found = self._scratch[device, dtype] = torch.empty(num_elements, dtype=dtype, device=device)
        return found[:num_elements]


class LowBitCache:
    """Keys and values of one sequence: behind those of `prefix`, so many of the first own tokens of each of these
    caches, in whole pages, at most `capacity` of its own, `length` of which are there in every layer.
    """

    def __init__(self, store: LowBitStore, capacity: int, prefix: Prefix = (), *, pages: bool = True) -> None:
        self.capacity, self.length = capacity, 0
        self.start = sum(count for _, count in prefix)
        self._store, self._prefix = store, prefix
        self._layers: dict[int, LowBitLayer] = {}
        self._paged: PagedSequence | None = None
        if store.paged is not None:
            line = tuple((cache._paged, count) for cache, count in prefix)
            self._paged = store.paged.open(capacity if pages else 0, line)
        self._alike: SequenceCache | None = None
        if self._paged is None:
            beginning = tuple((cache._wide_memory, count) for cache, count in prefix)
            self._alike = SequenceCache(capacity, prefix=beginning, compiled=store.compiled)
        self._waiting: list[LowBitCache] = []
        self._source: LowBitCache | None = None
        self._awaited = 0
        for cache, _ in prefix:
            cache.settle()

    @property
    def wide(self) -> SequenceKV:
        """Layers at 16 bits, and what moves pages."""
        return self._wide_memory if self._paged is None else self._paged

    @property
    def _wide_memory(self) -> SequenceCache:
        assert self._alike is not None, "where pages are elsewhere, sequences with layers at 16 bits share nothing"
        return self._alike

    # -- what it has in common with others
    # --------------------------------------------------------------------------------

    def begin_with(self, source: LowBitCache, num_tokens: int) -> None:
        """Go on with the `num_tokens` tokens behind, which `source` has at 16 bits, or comes to have so in the sweep
        that is about to run. Raises ValueError if it has them no more.
        """
        first = self.start + self.length
        stop = first + num_tokens
        comes = stop > source.start + source.length
        if not comes and source._source is not None:
            source, comes = source._source, True
        self.length += num_tokens
        self.wide.length = self.length
        self._awaited = num_tokens
        if comes:
            source._waiting.append(self)
            self._source = source
            return
        for layer, memory in source._layers.items():
            self._receive(layer, memory.begin, *memory.window)
        for layer, (keys, values) in source._wide_memory.layers.items() if self._paged is None else ():
            self._receive(layer, source.start, keys, values)

    @property
    def is_linked(self) -> bool:
        """Whether in the sweep that runs it has tokens for others, or they for it: these attend in the row's order."""
        return self.is_awaited or self._source is not None

    def settle(self) -> None:
        """Pack what has left windows, so that others may read it. No sweep is under way."""
        for memory in self._layers.values():
            memory.settle()

    def copy_from(self, parts: Sequence[tuple[LowBitCache, int]]) -> None:
        """Begin with so many of the first own tokens of each of these caches, in whole pages."""
        for cache, count in parts:
            cache.settle()
            for layer, memory in cache._layers.items():
                keys, values = (window[:, :0] for window in memory.window)
                mine = self._layers.get(layer) or self._open(layer, keys, values, None)
                self._layers[layer] = mine
                mine.put_pages(cache.own_pages(layer)[: count // PAGE_TOKENS])
            self._wide_memory.copy_from([(cache._wide_memory, count)])
            self.length += count

    def own_pages(self, layer: int) -> Tensor:
        """See `Owner`."""
        return self._layers[layer].own_pages

    def resize(self, capacity: int, length: int) -> None:
        """Keep its own first `length` tokens alone, in memory for `capacity`. Where these are no more than what is
        packed, in whole pages, nobody can go on behind them. Moves them, a layer at a time.
        """
        packed = 0
        for memory in self._layers.values():
            memory.resize(self.start, self.start + capacity, self.start + length)
            packed = memory.begin - self.start
        if self._paged is not None:
            self._paged.resize(capacity, length, packed)
        else:
            self._wide_memory.resize(capacity, length)
        self.capacity, self.length = capacity, length

    def _receive(self, layer: int, first: int, keys: Tensor, values: Tensor, fetch: Fetch | None = None) -> None:
        """Take what it awaits of keys and values [kv_heads, tokens, head_dim] of tokens from `first` on."""
        stop = self.start + self.length
        begin = stop - self._awaited
        if first > begin:
            raise ValueError(f"of tokens from {begin} on those before {first} are packed")
        keys, values = (tensor[:, begin - first : stop - first] for tensor in (keys, values))
        if fetch is not None:
            keys, values = fetch(keys, values)
        if self._store.bits[layer] == 16:
            self._wide_memory.put(layer, begin - self.start, keys, values)
            return
        if layer not in self._layers:
            self._layers[layer] = self._open(layer, keys, values, None)
        self._layers[layer].put(keys, values)

    def handing_out(self, layer: int, fetch: Fetch | None = None) -> Callable[[int, Tensor, Tensor], None] | None:
        """What a layer of fewer than 16 bits is to tell its window, for those who wait for tokens of it, which `fetch`
        brings to where their caches are. None: nobody does.
        """
        return partial(self._hand_out, layer, fetch=fetch) if self._waiting else None

    def hand_out_wide(self, layer: int) -> None:
        """In a layer at 16 bits, which has its new tokens: let those who wait take theirs."""
        if self._waiting and self._paged is None:
            self._hand_out(layer, self.start, *self._wide_memory.layers[layer])

    def _hand_out(self, layer: int, first: int, keys: Tensor, values: Tensor, fetch: Fetch | None = None) -> None:
        """Let those who wait take what they await."""
        for cache in self._waiting:
            cache._receive(layer, first, keys, values, fetch)

    @property
    def is_awaited(self) -> bool:
        """Whether others wait for what its window gets in this sweep."""
        return bool(self._waiting)

    # -- attention
    # --------------------------------------------------------------------------------------------------------

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `SequenceCache.attend`. A token sees at least WINDOW_TOKENS before it at 16 bits."""
        if self._store.bits_of(layer) == 16:
            output = self.wide.attend(layer, query, keys, values, rule)
            self.hand_out_wide(layer)
            return output
        memory = self.layer_for(layer, keys, values, rule)
        memory.hand_out = self.handing_out(layer)
        return memory.attend(self.start + self.length, query, keys, values, rule)

    def layer_for(self, layer: int, keys: Tensor, values: Tensor, rule: AttentionRule) -> LowBitLayer:
        """A layer of fewer than 16 bits, with room for these new tokens, which attend by `rule`."""
        stop = self.length + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} tokens cannot hold {stop}")
        if layer not in self._layers:
            self._layers[layer] = self._open(layer, keys, values, rule.sliding_window)
        return self._layers[layer]

    def _open(self, layer: int, keys: Tensor, values: Tensor, sliding_window: int | None) -> LowBitLayer:
        layout = PageLayout(keys.shape[0], keys.shape[2], values.shape[2], self._store.bits[layer])
        # The last token that there can be sees so many.
        most = packed_pages(self.start + self.capacity - 1)
        pages: PackedPages
        if self._paged is not None:
            pages = self._paged.packed_pages(layer, layout, sliding_window)
        else:
            own = max(0, most - self.start // PAGE_TOKENS)
            memory = keys.new_empty(own, layout.page_bytes, dtype=torch.uint8)
            line = [(cache, count // PAGE_TOKENS) for cache, count in self._prefix]
            pages = LinePages(layer, line, memory) if line else MemoryPages(memory)
        room = min(self.capacity, SHORT_TOKENS)
        return LowBitLayer(self._store, self.start, room, pages, most, layout, keys, values)

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        self.length += num_tokens
        self.wide.advance(num_tokens)
        for cache in self._waiting:
            cache._source = None
        self._waiting.clear()

    def undo(self) -> bool:
        """A sweep that appended to some layers failed: they are as they were before it. False where they cannot be,
        because a page has left a window.
        """
        return all(memory.undo(self.start + self.length) for memory in self._layers.values())

    def depends_on(self, others: Container[object]) -> bool:
        """Whether it stands on one of them, or awaits tokens of it."""
        return self._source in others or any(cache in others for cache, _ in self._prefix)

    def drop(self) -> None:
        """Give the memory back."""
        if self._source is not None and self in self._source._waiting:
            self._source._waiting.remove(self)
        self._layers.clear()
        self._waiting.clear()
        self.wide.drop()

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.wide.nbytes + sum(memory.nbytes for memory in self._layers.values())
