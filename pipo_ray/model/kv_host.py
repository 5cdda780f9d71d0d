"""A KV cache in RAM beside a device that computes the rest: what is attended to does not cross the link.

A token that comes alone, as in decoding, is attended for by the processor: its query, keys and values go to RAM, its
result comes back, and the keys and values of all tokens before it stay where they are. (FlexGen, arXiv 2303.06865, does
so with its `cpu_cache_compute`.) Where several tokens of a sequence come together, as in a prompt, the device attends,
to a copy of the layer's earlier keys and values that it gets for as long as that takes; where these are packed, they
cross the link packed, and what the new tokens pack is packed by the device.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipo_ray.compiled.attend import Call, CompiledAttention
from pipo_ray.compiled.pack import CompiledPacking
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.host_link import HostLink, tokens_at_once
from pipo_ray.model.host_rows import HostRow, PackedRow, WideRow, in_ram
from pipo_ray.model.kv_spans import AttentionRule, DenseSpan, attend_spans
from pipo_ray.model.packed_pages import VisitingPages

if TYPE_CHECKING:
    from pipo_ray.model.kv_cache import Segment, SequenceCache
    from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore


@dataclass(frozen=True)
class _Deferred:
    """A layer's call for a row of tokens that come alone, and what does it in the stream's order. It is told anew only
    where the tokens lie in other memory: telling 32 sequences' places takes 0.4 ms for each layer, and three times that
    beside other threads.
    """

    call: Call
    run: Call
    memories: tuple[weakref.ref[object], ...]
    buffers: tuple[int, int, AttentionRule]

    def is_for(self, memories: Sequence[object], buffers: tuple[int, int, AttentionRule]) -> bool:
        """Whether these sequences' tokens come in the same order, from the same buffers, by the same rule."""
        return (
            self.buffers == buffers
            and buffers[2].sliding_window is None
            and len(memories) == len(self.memories)
            and all(one() is other for one, other in zip(self.memories, memories, strict=True))
        )


class HostKV:
    """Attention of rows on `device` whose sequences' caches are in RAM: each a `SequenceCache`, or what `low_bit`
    opens. `compiled` takes what it does of tokens that come alone; with `in_stream_order` it does so when the device's
    stream comes to it, and the thread that uses this, always the same, waits for nothing. A sweep has ended on the
    device before the next one begins: what left a window in it is packed when the next token comes, by `packing` in the
    stream's order as well, or here by torch.

    Between RAM and `device` everything passes through two pinned buffers of at most 32 MiB, and a token that is larger.
    """

    def __init__(
        self,
        device: torch.device,
        compiled: CompiledAttention | None = None,
        in_stream_order: Callable[[int, int], None] | None = None,
        low_bit: LowBitStore | None = None,
        packing: CompiledPacking | None = None,
    ) -> None:
        self.low_bit = low_bit
        self._compiled, self._packing = compiled, packing
        self._packed: dict[int, Call] = {}  # by layer, what the sweep's call has to live with
        self._link, self._in_stream_order = HostLink(device), in_stream_order
        self._deferred: dict[int, _Deferred] = {}  # by layer

    def attend_row(
        self, segments: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> Tensor:
        """Append the row's `keys`, `values` [kv_heads, n, head_dim] to the caches of `segments`, and let `query`
        [heads, n, head_dim] attend to what its segment's cache holds. Returns [n, heads, value_head_dim] on the device.

        What is appended first may be the prefix of another sequence in the same row. Those of few bits that have tokens
        for each other attend behind all that come alone, in the row's order.
        """
        packed = self.low_bit is not None and self.low_bit.bits_of(layer) != 16
        alone: list[Segment] = []
        several: list[Segment] = []
        for segment in segments:
            is_alone = segment.stop - segment.start == 1 and not _is_linked(segment)
            (alone if is_alone else several).append(segment)
        if not packed:
            for segment in several:
                self._append_several(segment, layer, keys, values)
        output = query.new_empty(query.shape[1], query.shape[0], values.shape[2])
        if self._in_stream_order is not None and not several:
            row = _row(alone, layer, keys, values, rule, packed=packed)
            if self._compiled is not None and row.compiles(self._compiled, query, keys, values, rule):
                self._defer(alone, row, layer, query, keys, values, rule, output)
                return output
        if alone:
            self._attend_alone(alone, layer, query, keys, values, rule, output, packed=packed)
        for segment in several:
            columns = slice(segment.start, segment.stop)
            own = query[:, columns], keys[:, columns], values[:, columns]
            if segment.stop - segment.start == 1:
                attended = self._attend_linked(_low_bit(segment), layer, *own, rule)
            elif packed:
                attended = self._attend_packed(_low_bit(segment), layer, *own, rule)
            else:
                attended = self._attend_wide(_wide(segment), layer, *own, rule)
            output[columns] = attended.transpose(0, 1)
        return output

    # -- tokens that come alone
    # -------------------------------------------------------------------------------------------

    def _attend_alone(
        self, alone: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        output: Tensor, *, packed: bool,
    ) -> None:  # fmt: skip
        """Fill the rows of `output` that belong to tokens which come alone, as many at a time as the buffers hold."""
        at_once = tokens_at_once(query, keys, values)
        for first in range(0, len(alone), at_once):
            part = alone[first : first + at_once]
            columns = [segment.start for segment in part]
            neighbours = columns[-1] - columns[0] == len(columns) - 1
            chosen = slice(columns[0], columns[-1] + 1) if neighbours else columns
            q, k, v = self._link.to_host([x.transpose(0, 1)[chosen] for x in (query, keys, values)])
            attended = self._link.buffer("output", (len(part), *output.shape[1:]), output.dtype)
            row = _row(part, layer, k, v, rule, packed=packed)
            if self._compiled is not None and row.compiles(self._compiled, q, k, v, rule):
                if self._packing is not None and (packing := row.packing(self._packing)) is not None:
                    self._compiled.run(packing)
                self._compiled.run(row.call(self._compiled, q, k, v, rule, attended))
            else:
                for number in range(len(part)):
                    one = slice(number, number + 1)
                    attended[number] = row.attend(number, q[:, one], k[:, one], v[:, one], rule)[:, 0]
            # The buffer is written again behind the next `to_host`, which waits for the stream, and so for this one.
            output[chosen] = self._link.on_device(attended)

    def _defer(
        self, alone: Sequence[Segment], row: HostRow, layer: int, query: Tensor, keys: Tensor, values: Tensor,
        rule: AttentionRule, output: Tensor,
    ) -> None:  # fmt: skip
        """The same for a row of tokens that all come alone, in the stream's order from copy to copy. The buffers are
        used again, by the next layer, in that order as well.
        """
        assert self._compiled is not None
        assert self._in_stream_order is not None
        if self._packing is not None and (packing := row.packing(self._packing)) is not None:
            self._packed[layer] = packing = self._compiled.deferred(packing)
            self._in_stream_order(packing.function, ctypes.addressof(packing.context))
        q, k, v = self._link.copy_to_host([x.transpose(0, 1) for x in (query, keys, values)])
        attended = self._link.buffer("output", tuple(output.shape), output.dtype)
        memories = row.memories
        buffers = q.data_ptr(), attended.data_ptr(), rule
        last = self._deferred.get(layer)
        if last is not None and last.is_for(memories, buffers) and row.has_room:
            row.repeat(last.call)
        else:
            call = row.call(self._compiled, q, k, v, rule, attended)
            last = _Deferred(call, self._compiled.deferred(call), tuple(map(weakref.ref, row.memories)), buffers)
            self._deferred[layer] = last
        self._in_stream_order(last.run.function, ctypes.addressof(last.run.context))
        torch.mul(self._link.on_device(attended), 1, out=output)  # a kernel: `copy_` would be the copy engine's

    def _attend_linked(
        self, cache: LowBitCache, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> Tensor:
        """One that comes alone, and that has tokens for others or they for it: where all of its sequence is."""
        q, k, v = self._link.to_host([x.transpose(0, 1) for x in (query, keys, values)])
        attended = cache.attend(layer, q, k, v, in_ram(rule))
        output = self._link.buffer("output", (1, attended.shape[0], attended.shape[2]), attended.dtype)
        output.copy_(attended.transpose(0, 1))
        return self._link.on_device(output).transpose(0, 1)

    # -- several tokens of a sequence
    # -------------------------------------------------------------------------------------

    def _append_several(self, segment: Segment, layer: int, keys: Tensor, values: Tensor) -> None:
        """In a layer at 16 bits, those of the row's keys and values that are the segment's. One that is linked and
        comes alone appends them when it attends.
        """
        if segment.stop - segment.start == 1:
            return
        self._append(_wide(segment), layer, *(x[:, segment.start : segment.stop] for x in (keys, values)))
        if self.low_bit is not None:
            _low_bit(segment).hand_out_wide(layer)

    def _append(self, cache: SequenceCache, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values on the device behind those of a cache in RAM."""
        memory = cache.memory_for(layer, *_like_in_ram(keys, values))
        place = slice(cache.length, cache.length + keys.shape[1])
        self._link.fetch([keys, values], [target[:, place] for target in memory])

    def _attend_wide(
        self, cache: SequenceCache, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> Tensor:
        """At 16 bits: the device gets a copy of what there was before. Beside layers of few bits a prefix is attended
        to in its parts, as where all is in one memory: so every bit is the same.
        """
        parts = [part.span(layer, count) for part, count in cache.prefix]
        own = [cache.span(layer, cache.length)] if cache.length else []
        if self.low_bit is None or not parts:
            return attend(query, *self._behind([*parts, *own], keys, values), rule)
        spans = [DenseSpan(*self._behind([part], keys[:, :0], values[:, :0])) for part in parts]
        return attend_spans(query, [*spans, DenseSpan(*self._behind(own, keys, values))], rule)

    def _behind(self, earlier: Sequence[DenseSpan], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values behind earlier ones, which are in RAM, on the device."""
        if not earlier:
            return keys, values
        return (
            self._link.put_before(keys, [span.keys for span in earlier]),
            self._link.put_before(values, [span.values for span in earlier]),
        )

    def _attend_packed(
        self, cache: LowBitCache, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> Tensor:
        """The same with packed pages: the window visits the device, and so do the pages seen, some at a time."""
        home = cache.layer_for(layer, *_like_in_ram(keys, values), rule)
        visitor = home.visit(VisitingPages(home.pages, self._link, keys.device), keys, values)
        held = home.num_held
        for source, target in zip(home.window, visitor.window, strict=True):
            self._link.send(source[:, :held], target[:, :held])
        visitor.hand_out = cache.handing_out(layer, self._fetched)
        attended = visitor.attend(cache.start + cache.length, query, keys, values, rule)
        # Where no page has left the window, what was there is there.
        first = held if visitor.num_held == held + keys.shape[1] else 0
        changed = slice(first, visitor.num_held)
        self._link.fetch([x[:, changed] for x in visitor.window], [x[:, changed] for x in home.window])
        home.come_back(visitor)
        return attended

    def _fetched(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the device in RAM."""
        on_host = torch.empty(keys.shape, dtype=keys.dtype), torch.empty(values.shape, dtype=values.dtype)
        self._link.fetch([keys, values], on_host)
        return on_host


def _row(
    alone: Sequence[Segment], layer: int, keys: Tensor, values: Tensor, rule: AttentionRule, *, packed: bool
) -> HostRow:
    if packed:
        return PackedRow(layer, [_low_bit(segment) for segment in alone], *_like_in_ram(keys, values), rule)
    return WideRow(layer, [_wide(segment) for segment in alone])


def _like_in_ram(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors of the same shapes in RAM, without memory of their own."""
    like_keys, like_values = (torch.empty((), dtype=x.dtype).expand(x.shape) for x in (keys, values))
    return like_keys, like_values


def _is_linked(segment: Segment) -> bool:
    """See `LowBitCache.is_linked`; at 16 bits none is."""
    is_linked: bool = getattr(segment.cache, "is_linked", False)
    return is_linked


def _low_bit(segment: Segment) -> LowBitCache:
    cache: LowBitCache = segment.cache  # type: ignore[assignment]
    return cache


def _wide(segment: Segment) -> SequenceCache:
    """What holds the sequence's layers at 16 bits."""
    cache: SequenceCache = getattr(segment.cache, "wide", segment.cache)  # type: ignore[arg-type]
    return cache
