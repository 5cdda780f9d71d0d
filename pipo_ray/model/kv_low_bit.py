"""The KV cache of a sequence in few bits: packed pages, and a window of the last tokens at 16 bits.

When a page's tokens have all left the window, they are rounded once, from their 16 bits. A token always sees the same
pages packed, whichever tokens are computed with it: so the cache is the same for a prompt at once, in chunks, token by
token, or rebuilt.

A token that comes alone attends to packed pages as they are, where that can be compiled; otherwise they are unpacked,
a few MiB at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipo_ray.compiled import packed_attention
from pipo_ray.compiled.attend import CompiledAttention, PackedTokens
from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.kv_cache import SequenceCache, SequenceKV
from pipo_ray.model.kv_spans import CHUNK_TOKENS, AttentionRule, OnlineAttention
from pipo_ray.model.packed_pages import MemoryPages, PackedPages
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, PageLayout, packed_pages
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of

# So much is unpacked at a time: what stays in a processor's cache is attended to twice as fast.
_SCRATCH_BYTES = 4 << 20


class PagedSequence(SequenceKV, Protocol):
    """A sequence's cache at 16 bits, in pages that may be elsewhere, which has room for packed pages among them."""

    def packed_pages(self, layer: int, layout: PageLayout, sliding_window: int | None) -> PackedPages:
        """Where the packed pages of a layer that is not at 16 bits lie; called once, with the layer's first tokens. A
        token sees so many with itself.
        """
        ...


class PagedStore(Protocol):
    """Where sequences' pages lie, at 16 bits and packed."""

    def open(self, capacity: int) -> PagedSequence:
        """A new sequence's cache, of at most `capacity` tokens."""
        ...


class LowBitStore:
    """Opens sequences' caches at `bits` per layer (16, 8 or 4), and has the scratch that they share. All of it belongs
    to the thread that computes. What `compiled` takes it does: a token that comes alone. Packed pages, and the layers
    at 16 bits, are in `paged`; without it each sequence's are by themselves in the memory of its keys and values.
    """

    def __init__(
        self, bits: tuple[int, ...], compiled: CompiledAttention | None = None, paged: PagedStore | None = None
    ) -> None:
        self.bits, self.compiled, self.paged = bits, compiled, paged
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def bits_of(self, layer: int) -> int:
        """The layer's. Raises UnsupportedModelError for one that the model does not have by its facts."""
        if layer >= len(self.bits):
            raise UnsupportedModelError(
                f"layer {layer} has a KV cache, but its model's facts say {len(self.bits)} layers"
            )
        return self.bits[layer]

    def open(self, capacity: int) -> LowBitCache:
        """A new sequence's cache."""
        return LowBitCache(self, capacity)

    def scratch(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that holds until it is asked for again."""
        found = self._scratch.get((device, dtype))
        if found is None or found.numel() < num_elements:
            with torch.inference_mode(False):  # written to in and out of inference mode
                found = self._scratch[device, dtype] = torch.empty(num_elements, dtype=dtype, device=device)
        return found[:num_elements]


class LowBitCache:
    """Keys and values of one sequence of at most `capacity` tokens, `length` of which are there in every layer."""

    start = 0
    """Tokens in other sequences' caches."""

    def __init__(self, store: LowBitStore, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._store = store
        self._layers: dict[int, LowBitLayer] = {}
        self._paged = None if store.paged is None else store.paged.open(capacity)
        self.wide: SequenceKV = self._paged or SequenceCache(capacity, compiled=store.compiled)
        """Layers at 16 bits, and what moves pages."""

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `SequenceCache.attend`. A token sees at least WINDOW_TOKENS before it at 16 bits."""
        if self._store.bits_of(layer) == 16:
            return self.wide.attend(layer, query, keys, values, rule)
        return self.layer_for(layer, keys, values, rule).attend(self.length, query, keys, values, rule)

    def layer_for(self, layer: int, keys: Tensor, values: Tensor, rule: AttentionRule) -> LowBitLayer:
        """A layer of fewer than 16 bits, with room for these new tokens, which attend by `rule`."""
        stop = self.length + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} tokens cannot hold {stop}")
        if layer not in self._layers:
            self._layers[layer] = self._open(layer, keys, values, rule)
        return self._layers[layer]

    def _open(self, layer: int, keys: Tensor, values: Tensor, rule: AttentionRule) -> LowBitLayer:
        layout = PageLayout(keys.shape[0], keys.shape[2], values.shape[2], self._store.bits[layer])
        # The last token that there can be sees so many.
        most = packed_pages(self.capacity - 1)
        if self._paged is not None:
            pages = self._paged.packed_pages(layer, layout, rule.sliding_window)
        else:
            pages = MemoryPages(keys.new_empty(most, layout.page_bytes, dtype=torch.uint8))
        return LowBitLayer(self._store, min(self.capacity, SHORT_TOKENS), pages, most, layout, keys, values)

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        self.length += num_tokens
        self.wide.advance(num_tokens)

    def undo(self) -> bool:
        """A sweep that appended to some layers failed: they are as they were before it. False where they cannot be,
        because a page has left a window.
        """
        return all(memory.undo(self.length) for memory in self._layers.values())

    def drop(self) -> None:
        """Give the memory back."""
        self._layers.clear()
        self.wide.drop()

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.wide.nbytes + sum(memory.nbytes for memory in self._layers.values())


@dataclass(frozen=True)
class _Chunk:
    """Scratch for so many unpacked pages: keys and values [kv_heads, tokens, head_dim], and for their codes."""

    num_pages: int
    keys: Tensor
    values: Tensor
    codes: Tensor


class LowBitLayer:
    """One layer: at most `most` packed pages of tokens from the first on, and behind them the window, which has `room`:
    keys and values [kv_heads, tokens, head_dim] as they came.
    """

    def __init__(
        self,
        store: LowBitStore,
        room: int,
        pages: PackedPages,
        most: int,
        layout: PageLayout,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        heads, _, dim = keys.shape
        self._store, self._pages, self._most, self.layout = store, pages, most, layout
        self._window = keys.new_empty(heads, room, dim), values.new_empty(heads, room, values.shape[2])
        self._length = 0
        self._unsettled: int | None = None  # the number of a token with which a page leaves the window
        # Torch's ways in 16 bits on the CPU are no faster, and unpacking to them is slower.
        self._dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype
        token_bytes = self._dtype.itemsize * heads * (dim + values.shape[2])
        self._pages_at_once = max(1, min(CHUNK_TOKENS, _SCRATCH_BYTES // token_bytes) // PAGE_TOKENS)

    def attend(self, start: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `SequenceCache.attend`: the tokens from number `start` on."""
        self._settle()
        stop = start + keys.shape[1]
        if rule.is_plain and self._compiles(query, keys, values):
            return self._attend_alone(start, query, keys, values, rule)
        attention = OnlineAttention(query, stop, rule)
        before = packed_pages(start) * PAGE_TOKENS
        for first, unpacked_keys, unpacked_values in self._unpacked(attention.first_seen(), before):
            attention.add(first, unpacked_keys, unpacked_values)
        window = self._append(start, keys, values)
        steps = [(begin, end, packed_pages(begin) * PAGE_TOKENS) for begin, end in _steps(start, stop)]
        # Each page that the new tokens pack is unpacked once, for all steps that see it.
        for first, unpacked_keys, unpacked_values in self._unpacked(max(before, attention.first_seen()), steps[-1][2]):
            for begin, end, packed in steps:
                if seen := max(0, min(packed - first, unpacked_keys.shape[1])):
                    rows = begin - start, end - start
                    attention.add(first, unpacked_keys[:, :seen], unpacked_values[:, :seen], rows)
        for begin, end, packed in steps:
            inside = slice(packed - before, end - before)
            attention.add(packed, window[0][:, inside], window[1][:, inside], (begin - start, end - start))
        return attention.result()

    def begin_token(self, start: int) -> tuple[int, int]:
        """Append a token, number `start`, that a kernel will fill in before the next one is appended: how many tokens
        the window holds with it, and how many pages it sees packed. What leaves the window with it is packed when
        something else is asked of this.
        """
        self._settle()
        _, size = self._grow(start, 1)
        if self._leaving(start):
            self._unsettled = start
        return size, packed_pages(start)

    def seen(self, size: int, num_pages: int, rule: AttentionRule) -> PackedTokens:
        """What the last token sees, given what `begin_token` said of it; in memory where pages are neighbours."""
        pages = self._pages.whole(num_pages)
        assert pages is not None
        return PackedTokens(pages, self._window, size, rule.first_visible(self._length))

    def visit(self, pages: PackedPages, keys: Tensor, values: Tensor) -> LowBitLayer:
        """This layer for new tokens that are where `keys`, `values` are: with room for a window there, whose first
        `num_held` tokens are to be filled in, and its pages as `pages` has them.
        """
        self._settle()
        room = self._window[0].shape[1]
        other = LowBitLayer(self._store, room, pages, self._most, self.layout, keys, values)
        other._length = self._length
        return other

    def come_back(self, other: LowBitLayer) -> None:
        """Hold as many tokens as the layer that visited; those in its window are to be filled in."""
        self._length = other._length

    @property
    def pages(self) -> PackedPages:
        """Where its packed pages lie."""
        return self._pages

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, room, head_dim], of which the first `num_held` are there."""
        return self._window

    @property
    def num_held(self) -> int:
        """Tokens in the window."""
        return self._length - min(packed_pages(self._length), self._most) * PAGE_TOKENS

    def _settle(self) -> None:
        """Pack what has left the window with a token that a kernel has filled in."""
        if self._unsettled is not None:
            start, self._unsettled = self._unsettled, None
            size = self._length - packed_pages(start) * PAGE_TOKENS
            self._let_go(start, *(window[:, :size].clone() for window in self._window))

    def _append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens from `start` on, and pack the pages that leave the window. Returns keys and values of the
        window as it was, with all new tokens behind it; valid until the next call.
        """
        held, size = self._grow(start, keys.shape[1])
        if size <= self._window[0].shape[1]:
            for window, tensor in zip(self._window, (keys, values), strict=True):
                window[:, held:size] = tensor
            window_keys, window_values = (window[:, :size] for window in self._window)
        else:
            window_keys, window_values = (
                torch.cat([window[:, :held], tensor], dim=1)
                for window, tensor in zip(self._window, (keys, values), strict=True)
            )
        if self._leaving(start) and size <= self._window[0].shape[1]:  # what is returned is not to change
            window_keys, window_values = window_keys.clone(), window_values.clone()
        self._let_go(start, window_keys, window_values)
        return window_keys, window_values

    def _compiles(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether `_attend_alone` is for these."""
        compiled = self._store.compiled
        return compiled is not None and packed_attention.takes(self.layout) and compiled.takes(query, keys, values)

    def _attend_alone(self, start: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """Append a token, number `start`, and let it attend to what it sees of all."""
        assert self._store.compiled is not None
        _, size = self._grow(start, 1)
        num_pages = packed_pages(start)
        if self._pages.whole(num_pages) is not None:
            seen = self.seen(size, num_pages, rule)
            output = self._store.compiled.attend_packed(query, (keys, values), seen, self.layout, rule.scale)
        else:
            first = rule.first_visible(self._length)
            begin = min(first // PAGE_TOKENS, num_pages)
            output = self._store.compiled.attend_parts(
                query, (keys, values), self._pages.parts(begin, num_pages), self._window, size,
                first - begin * PAGE_TOKENS, self.layout, rule.scale,
            )  # fmt: skip
        if self._leaving(start):
            self._let_go(start, *(window[:, :size].clone() for window in self._window))
        return output

    def _grow(self, start: int, num_tokens: int) -> tuple[int, int]:
        """Count new tokens from `start` on. How many tokens the window held, and holds with them."""
        if start != self._length:
            raise ValueError(f"the cache holds {self._length} tokens of this layer, not {start}")
        self._length += num_tokens
        before = packed_pages(start) * PAGE_TOKENS
        return start - before, self._length - before

    def undo(self, length: int) -> bool:
        """There are `length` tokens again, if all that have come since are still in the window."""
        if min(packed_pages(self._length), self._most) > packed_pages(length):
            return False
        self._length = length
        return True

    def _leaving(self, start: int) -> int:
        """Pages that leave the window with the tokens from `start` on."""
        return min(packed_pages(self._length), self._most) - packed_pages(start)

    def _let_go(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Pack the pages that leave the window, which has these keys and values with the tokens from `start` on."""
        old, tokens = packed_pages(start), self._leaving(start) * PAGE_TOKENS
        if not tokens:
            return
        at = 0
        for place in self._pages.places(old, old + tokens // PAGE_TOKENS):
            part = slice(at, at + len(place) * PAGE_TOKENS)
            pack_pages(keys[:, part], values[:, part], views_of(place, self.layout), self.layout)
            at = part.stop
        for window, tensor in zip(self._window, (keys, values), strict=True):
            window[:, : tensor.shape[1] - tokens] = tensor[:, tokens:]

    def _unpacked(self, first: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Tokens from `first` to before `stop`, which are packed, chunk by chunk: number of the first, keys, values. A
        chunk is valid until the next one is asked for.
        """
        begin, end = first // PAGE_TOKENS, stop // PAGE_TOKENS
        if first >= stop:
            return
        chunk, there = self._chunk(min(self._pages_at_once, end - begin)), 0
        for pages in itertools.chain.from_iterable(self._pages.parts(begin, end)):
            at = 0
            while at < len(pages):
                count = min(len(pages) - at, chunk.num_pages - there)
                self._unpack(pages[at : at + count], chunk, there)
                at, there = at + count, there + count
                if there == chunk.num_pages:
                    skipped = max(0, first - begin * PAGE_TOKENS)
                    yield begin * PAGE_TOKENS + skipped, chunk.keys[:, skipped:], chunk.values[:, skipped:]
                    begin, there = begin + there, 0
                    chunk = self._chunk(min(self._pages_at_once, end - begin))

    def _chunk(self, num_pages: int) -> _Chunk:
        """Scratch for so many pages."""
        layout, tokens = self.layout, num_pages * PAGE_TOKENS
        shapes = [(layout.heads, tokens, dim) for dim in (layout.key_dim, layout.value_dim)]
        sizes = [math.prod(shape) for shape in shapes]
        device = self._window[0].device
        both = self._store.scratch(sum(sizes), self._dtype, device).split(sizes)
        codes = self._store.scratch(max(sizes), torch.uint8, device)
        keys, values = (part.view(shape) for part, shape in zip(both, shapes, strict=True))
        return _Chunk(num_pages, keys, values, codes)

    def _unpack(self, pages: Tensor, chunk: _Chunk, at: int) -> None:
        """`pages` are those of the chunk from number `at` on."""
        tokens = slice(at * PAGE_TOKENS, (at + len(pages)) * PAGE_TOKENS)
        unpack_pages(
            views_of(pages, self.layout), self.layout, chunk.keys[:, tokens], chunk.values[:, tokens], chunk.codes
        )

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._pages.nbytes + sum(window.nbytes for window in self._window)


def _steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Tokens `start` to before `stop` in parts that see the same pages packed."""
    while start < stop:
        begin = max((start // PAGE_TOKENS + 1) * PAGE_TOKENS, SHORT_TOKENS)
        yield start, min(begin, stop)
        start = begin
