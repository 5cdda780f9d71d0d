"""A layer of a low-bit KV cache: packed pages, and a window at 16 bits behind them; and how tokens attend to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipo_ray.compiled import packed_attention
from pipo_ray.compiled.attend import PackedTokens
from pipo_ray.compiled.pack import LeavingPage
from pipo_ray.model.kv_spans import CHUNK_TOKENS, AttentionRule, OnlineAttention
from pipo_ray.model.packed_pages import LinePages, MemoryPages, PackedPages
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, WINDOW_TOKENS, PageLayout, packed_pages
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of

if TYPE_CHECKING:
    from pipo_ray.model.kv_low_bit import LowBitStore

# So much is unpacked at a time: what stays in a processor's cache is attended to twice as fast.
_SCRATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class _Chunk:
    """Scratch for so many unpacked pages: keys and values [kv_heads, tokens, head_dim], and for their codes."""

    num_pages: int
    keys: Tensor
    values: Tensor
    codes: Tensor


class LowBitLayer:
    """One layer: at most `most` packed pages of tokens from the first on, and behind them the window, which has `room`:
    keys and values [kv_heads, tokens, head_dim] as they came. `start` tokens before are others', in pages. Tokens of
    the window are told to `hand_out`, with the number of the first, before it moves on.
    """

    def __init__(
        self,
        store: LowBitStore,
        start: int,
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
        self._length = self.begin = start
        self.hand_out: Callable[[int, Tensor, Tensor], None] | None = None
        # Torch's ways in 16 bits on the CPU are no faster, and unpacking to them is slower.
        self._dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype
        token_bytes = self._dtype.itemsize * heads * (dim + values.shape[2])
        self._pages_at_once = max(1, min(CHUNK_TOKENS, _SCRATCH_BYTES // token_bytes) // PAGE_TOKENS)

    def attend(self, start: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `SequenceCache.attend`: the tokens from number `start` on."""
        self.settle()
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
        self.settle()
        _, size = self._grow(start, 1)
        return size, packed_pages(start)

    def take_leaving(self) -> LeavingPage | None:
        """A page that is to leave the window, for a kernel that packs it before anything else is done with this."""
        if self.num_leaving != 1:
            return None
        first, held = self.begin // PAGE_TOKENS, self.num_held
        (place,) = self._pages.places(first, first + 1)
        self.begin += PAGE_TOKENS
        return LeavingPage(place[0], self._window, held)

    def seen(self, size: int, num_pages: int, rule: AttentionRule) -> PackedTokens:
        """What the last token sees, given what `begin_token` said of it; where pages stay in memory."""
        found = self._pages.memories(num_pages)
        assert found is not None
        pages = tuple(memory[:count] for memory, count in found)
        return PackedTokens(pages, self._window, size, rule.first_visible(self._length))

    def visit(self, pages: PackedPages, keys: Tensor, values: Tensor) -> LowBitLayer:
        """This layer for new tokens that are where `keys`, `values` are: with room for a window there, whose first
        `num_held` tokens are to be filled in, and its pages as `pages` has them.
        """
        self.settle()
        room = self._window[0].shape[1]
        other = LowBitLayer(self._store, self.begin, room, pages, self._most, self.layout, keys, values)
        other._length = self._length
        return other

    def come_back(self, other: LowBitLayer) -> None:
        """Hold as many tokens as the layer that visited; those in its window are to be filled in."""
        self._length, self.begin = other._length, other.begin

    @property
    def pages(self) -> PackedPages:
        """Where its packed pages lie."""
        return self._pages

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, room, head_dim], of which the first `num_held` are there."""
        return self._window

    @property
    def memories(self) -> list[Tensor]:
        """What its window and its pages lie in, where these stay in memory: others when they have moved."""
        found = self._pages.memories(packed_pages(self._length))
        assert found is not None
        return [self._window[0], *(memory for memory, _ in found)]

    @property
    def num_held(self) -> int:
        """Tokens in the window."""
        return self._length - self.begin

    def settle(self) -> None:
        """Pack what has left the window since it was filled in."""
        if self.num_leaving:
            self._let_go(*(window[:, : self.num_held].clone() for window in self._window))

    def _append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens from `start` on, and pack the pages that leave the window. Returns keys and values of the
        window as it was, with all new tokens behind it; valid until the next call.
        """
        begin = self.begin
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
        if self.num_leaving and size <= self._window[0].shape[1]:  # what is returned is not to change
            window_keys, window_values = window_keys.clone(), window_values.clone()
        if self.hand_out is not None:
            self.hand_out(begin, window_keys, window_values)
        self._let_go(window_keys, window_values)
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
        if self._pages.memories(num_pages) is not None:
            seen = self.seen(size, num_pages, rule)
            output = self._store.compiled.attend_packed(query, (keys, values), seen, self.layout, rule.scale)
        else:
            first = rule.first_visible(self._length)
            begin = min(first // PAGE_TOKENS, num_pages)
            output = self._store.compiled.attend_parts(
                query, (keys, values), self._pages.parts(begin, num_pages), self._window, size,
                first - begin * PAGE_TOKENS, self.layout, rule.scale,
            )  # fmt: skip
        if self.hand_out is not None:
            self.hand_out(self.begin, *(window[:, :size] for window in self._window))
        self.settle()
        return output

    def _grow(self, start: int, num_tokens: int) -> tuple[int, int]:
        """Count new tokens from `start` on. How many tokens the window held, and holds with them."""
        if start != self._length:
            raise ValueError(f"the cache holds {self._length} tokens of this layer, not {start}")
        self._length += num_tokens
        return start - self.begin, self._length - self.begin

    def undo(self, length: int) -> bool:
        """There are `length` tokens again, if all that have come since are still in the window."""
        if self.begin > packed_pages(length) * PAGE_TOKENS:
            return False
        self._length = length
        return True

    @property
    def num_leaving(self) -> int:
        """Pages that are to leave the window."""
        packed = (self._length - WINDOW_TOKENS) // PAGE_TOKENS
        leaving = (packed if packed < self._most else self._most) - self.begin // PAGE_TOKENS
        return leaving if leaving > 0 else 0  # asked for every token in every layer

    def _let_go(self, keys: Tensor, values: Tensor) -> None:
        """Pack the pages that are to leave the window, which has these keys and values with those that are new."""
        old, tokens = self.begin // PAGE_TOKENS, self.num_leaving * PAGE_TOKENS
        if not tokens:
            return
        at = 0
        for place in self._pages.places(old, old + tokens // PAGE_TOKENS):
            part = slice(at, at + len(place) * PAGE_TOKENS)
            pack_pages(keys[:, part], values[:, part], views_of(place, self.layout), self.layout)
            at = part.stop
        for window, tensor in zip(self._window, (keys, values), strict=True):
            window[:, : tensor.shape[1] - tokens] = tensor[:, tokens:]
        self.begin += tokens

    # -- beginnings and ends
    # ----------------------------------------------------------------------------------------------

    @property
    def own_pages(self) -> Tensor:
        """Memory of the pages that are in no other's."""
        assert isinstance(self._pages, (MemoryPages, LinePages)), "where pages are elsewhere, sequences share nothing"
        return self._pages.memory

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Begin with these in the window."""
        self._length = self.begin + keys.shape[1]
        for window, tensor in zip(self._window, (keys, values), strict=True):
            window[:, : tensor.shape[1]] = tensor
        self.settle()

    def put_pages(self, pages: Tensor) -> None:
        """Go on with these, [pages, page_bytes]; nothing is in the window."""
        at = self.begin // PAGE_TOKENS
        for place in self._pages.places(at, at + len(pages)):
            place.copy_(pages)
        self._length = self.begin = self.begin + len(pages) * PAGE_TOKENS

    def resize(self, start: int, capacity: int, length: int) -> None:
        """See `LowBitCache.resize`; here tokens of others, `start` in number, count."""
        keys, values = self._window
        begin = min(self.begin, length)
        self._length, self.begin = length, begin
        self._most = max(packed_pages(capacity - 1), begin // PAGE_TOKENS)
        own = self.own_pages if isinstance(self._pages, (MemoryPages, LinePages)) else None
        if own is not None and len(own) != self._most - start // PAGE_TOKENS:
            memory = own.new_empty(self._most - start // PAGE_TOKENS, self.layout.page_bytes)
            there = (begin - start) // PAGE_TOKENS
            memory[:there] = own[:there]
            self._pages.memory = memory  # type: ignore[attr-defined]
        room = length - begin if capacity == length else min(capacity - start, SHORT_TOKENS)
        if room != self._window[0].shape[1]:
            self._window = (
                keys.new_empty(len(keys), room, keys.shape[2]),
                values.new_empty(len(values), room, values.shape[2]),
            )
            for window, tensor in zip(self._window, (keys, values), strict=True):
                window[:, : length - begin] = tensor[:, : length - begin]
        self.settle()

    # -- packed pages
    # -----------------------------------------------------------------------------------------------------

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
