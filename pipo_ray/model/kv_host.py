"""A KV cache in RAM beside a device that computes the rest: what is attended to does not cross the link.

A token that comes alone, as in decoding, is attended for by the processor: its query, keys and values go to RAM, its
result comes back, and the keys and values of all tokens before it stay where they are. (FlexGen, arXiv 2303.06865, does
so with its `cpu_cache_compute`.) Where several tokens of a sequence come together, as in a prompt, the device attends,
to a copy of the layer's earlier keys and values that it gets for as long as that takes.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipo_ray.compiled.attend import Call, CompiledAttention
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_memory import SequenceMemory
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.pipeline.host_functions import as_device_sees

if TYPE_CHECKING:
    from pipo_ray.model.kv_cache import Segment, SequenceCache

_BUFFER_BYTES = 32 << 20


@dataclass(frozen=True)
class _Deferred:
    """A layer's call for a row of tokens that come alone, and what does it in the stream's order. It is told anew only
    where the tokens lie in other memory: telling 32 sequences' places takes 0.4 ms for each layer, and three times that
    beside other threads.
    """

    call: Call
    run: Call
    memories: tuple[weakref.ref[SequenceMemory], ...]
    buffers: tuple[int, int, AttentionRule]

    def is_for(self, memories: Sequence[SequenceMemory], buffers: tuple[int, int, AttentionRule]) -> bool:
        """Whether these sequences' tokens come in the same order, from the same buffers, by the same rule."""
        return (
            self.buffers == buffers
            and buffers[2].sliding_window is None
            and len(memories) == len(self.memories)
            and all(one() is other for one, other in zip(self.memories, memories, strict=True))
        )


class HostKV:
    """Attention of rows on `device` whose sequences' caches (`SequenceCache`) are in RAM. `compiled` takes what it does
    of tokens that come alone; with `in_stream_order` it does so when the device's stream comes to it, and the thread
    that uses this, always the same, waits for nothing. A sweep has ended on the device before the next one begins.

    Between RAM and `device` everything passes through two pinned buffers of at most 32 MiB, and a token that is larger.
    """

    def __init__(
        self,
        device: torch.device,
        compiled: CompiledAttention | None = None,
        in_stream_order: Callable[[int, int], None] | None = None,
    ) -> None:
        self._compiled = compiled
        self._device, self._in_stream_order = device, in_stream_order
        self._deferred: dict[int, _Deferred] = {}  # by layer
        self._seen: tuple[Tensor, Tensor] | None = None  # the buffer "output", in RAM and on the device
        self._buffers: dict[str, Tensor] = {}

    def attend_row(
        self, segments: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> Tensor:
        """Append the row's `keys`, `values` [kv_heads, n, head_dim] to the caches of `segments`, and let `query`
        [heads, n, head_dim] attend to what its segment's cache holds. Returns [n, heads, value_head_dim] on the device.

        What is appended first may be the prefix of another sequence in the same row.
        """
        alone = [segment for segment in segments if segment.stop - segment.start == 1]
        several = [segment for segment in segments if segment.stop - segment.start > 1]
        for segment in several:
            self._append(_cache(segment), layer, *(x[:, segment.start : segment.stop] for x in (keys, values)))
        output = query.new_empty(query.shape[1], query.shape[0], values.shape[2])
        if self._in_stream_order is not None and not several and self._all_compile(alone, query, keys, values, rule):
            self._defer(alone, layer, query, keys, values, rule, output)
            return output
        if alone:
            self._attend_alone(alone, layer, query, keys, values, rule, output)
        for segment in several:
            columns = slice(segment.start, segment.stop)
            own = keys[:, columns], values[:, columns]
            everything = self._with_earlier(_cache(segment), layer, *own)
            output[columns] = attend(query[:, columns], *everything, rule).transpose(0, 1)
        return output

    def _attend_alone(
        self, alone: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        output: Tensor,
    ) -> None:  # fmt: skip
        """Fill the rows of `output` that belong to tokens which come alone, as many at a time as the buffers hold."""
        at_once = _tokens_at_once(query, keys, values)
        for first in range(0, len(alone), at_once):
            part = alone[first : first + at_once]
            columns = [segment.start for segment in part]
            neighbours = columns[-1] - columns[0] == len(columns) - 1
            chosen = slice(columns[0], columns[-1] + 1) if neighbours else columns
            q, k, v = self._to_host([x.transpose(0, 1)[chosen] for x in (query, keys, values)])
            attended = self._buffer("output", (len(part), *output.shape[1:]), output.dtype)
            if self._all_compile(part, q, k, v, rule):
                assert self._compiled is not None
                self._compiled.run(self._call(part, layer, q, k, v, rule, attended))
            else:
                for number, segment in enumerate(part):
                    one = slice(number, number + 1)
                    result = _cache(segment).attend(layer, q[:, one], k[:, one], v[:, one], _in_ram(rule))
                    attended[number] = result[:, 0]
            # The buffer is written again behind the next `_to_host`, which waits for the stream, and so for this one.
            output[chosen] = self._on_device(attended)

    def _defer(
        self, alone: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        output: Tensor,
    ) -> None:  # fmt: skip
        """The same for a row of tokens that all come alone, in the stream's order from copy to copy. The buffers are
        used again, by the next layer, in that order as well.
        """
        assert self._compiled is not None
        assert self._in_stream_order is not None
        q, k, v = self._copy_to_host([x.transpose(0, 1) for x in (query, keys, values)])
        attended = self._buffer("output", tuple(output.shape), output.dtype)
        memories = [_cache(segment).memory for segment in alone]
        buffers = q.data_ptr(), attended.data_ptr(), rule
        last = self._deferred.get(layer)
        if last is not None and last.is_for(memories, buffers) and self._have_room(alone):
            last.call.repeat([_cache(segment).length + 1 for segment in alone])
        else:
            call = self._call(alone, layer, q, k, v, rule, attended)
            last = _Deferred(call, self._compiled.deferred(call), tuple(map(weakref.ref, memories)), buffers)
            self._deferred[layer] = last
        self._in_stream_order(last.run.function, ctypes.addressof(last.run.context))
        torch.mul(self._on_device(attended), 1, out=output)  # a kernel: `copy_` would be the copy engine's

    def _have_room(self, alone: Sequence[Segment]) -> bool:
        return all(_cache(segment).length < _cache(segment).capacity for segment in alone)

    def _all_compile(
        self, alone: Sequence[Segment], query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> bool:
        """Whether the kernel takes all of these tokens, given where they are or were."""
        if self._compiled is None or not rule.is_plain or any(_cache(segment).prefix for segment in alone):
            return False
        return self._compiled.takes_heads(query, keys, values)

    def _call(
        self, alone: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        attended: Tensor,
    ) -> Call:  # fmt: skip
        """The kernel's call for these tokens, whose query, keys and values are in RAM."""
        assert self._compiled is not None
        caches = [_cache(segment) for segment in alone]
        memories = [cache.memory_for(layer, keys[:, :1], values[:, :1]) for cache in caches]
        spans = [(rule.first_visible(cache.length + 1), cache.length + 1) for cache in caches]
        return self._compiled.each(query, (keys, values), memories, spans, rule.scale, attended)

    def _append(self, cache: SequenceCache, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values on the device behind those of a cache in RAM."""
        tokens = keys.shape[1]
        memory = cache.memory_for(layer, *(torch.empty((), dtype=x.dtype).expand(x.shape) for x in (keys, values)))
        at_once = _tokens_at_once(keys, values)
        for first in range(0, tokens, at_once):
            part = slice(first, min(first + at_once, tokens))
            on_host = self._to_host([x.transpose(0, 1)[part] for x in (keys, values)])
            place = slice(cache.length + part.start, cache.length + part.stop)
            for target, rows in zip(memory, on_host, strict=True):
                target[:, place] = rows

    def _with_earlier(self, cache: SequenceCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's keys and values, those of its prefix before them, and the new ones behind, on the device."""
        earlier = [part.span(layer, count) for part, count in cache.prefix]
        if cache.length:
            earlier.append(cache.span(layer, cache.length))
        if not earlier:
            return keys, values
        return (
            self._put_before(keys, [span.keys for span in earlier]),
            self._put_before(values, [span.values for span in earlier]),
        )

    def _put_before(self, new: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """`earlier`, in RAM, and `new` behind them, all [heads, n, dim], on the device."""
        tokens = sum(part.shape[1] for part in earlier)
        whole = new.new_empty(new.shape[0], tokens + new.shape[1], new.shape[2])
        at = 0
        for part in earlier:
            self._to_device(part, whole[:, at : at + part.shape[1]])
            at += part.shape[1]
        whole[:, at:] = new
        return whole

    def _to_host(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors [n, heads, dim] of the device as [heads, n, dim] in RAM, in a buffer until this is called again."""
        on_host = self._copy_to_host(parts)
        self._synchronize()
        return on_host

    def _copy_to_host(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The same, there once the device's stream gets here."""
        n = parts[0].shape[0]
        together = torch.cat([part.flatten(1) for part in parts], dim=1)
        buffer = self._buffer("row", tuple(together.shape), together.dtype)
        buffer.copy_(together, non_blocking=True)
        columns = buffer.split([part.shape[1] * part.shape[2] for part in parts], dim=1)
        return [column.view(n, *part.shape[1:]).transpose(0, 1) for column, part in zip(columns, parts, strict=True)]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _to_device(self, source: Tensor, target: Tensor) -> None:
        """Copy [heads, n, dim] in RAM to the device, through the pinned buffer."""
        at_once = _tokens_at_once(source)
        for first in range(0, source.shape[1], at_once):
            part = source[:, first : first + at_once]
            buffer = self._buffer("row", tuple(part.shape), part.dtype)
            buffer.copy_(part)
            target[:, first : first + at_once].copy_(buffer, non_blocking=True)
            self._synchronize()

    def _on_device(self, attended: Tensor) -> Tensor:
        """The buffer "output", filled as `attended`, where the device reads it."""
        if self._device.type != "cuda":
            return attended
        buffer = self._buffers["output"]
        if self._seen is None or self._seen[0] is not buffer:
            self._seen = buffer, as_device_sees(buffer, self._device)
        return self._seen[1][: attended.nbytes].view(attended.dtype).view(attended.shape)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned memory that is there until it is asked for again under this name."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self._synchronize()  # a deferred call may use the one that there is
            # By powers of two: torch keeps pinned memory that is given back, for blocks of such sizes.
            size = 1 << max(20, (nbytes - 1).bit_length())
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._buffers[name] = buffer
        return buffer[:nbytes].view(dtype).view(shape)


def _tokens_at_once(*tensors: Tensor) -> int:
    """So many tokens of all these [heads, _, dim] together does a buffer hold."""
    return max(1, _BUFFER_BYTES // sum(x.itemsize * x.shape[0] * x.shape[2] for x in tensors))


def _cache(segment: Segment) -> SequenceCache:
    cache: SequenceCache = segment.cache  # type: ignore[assignment]
    return cache


def _in_ram(rule: AttentionRule) -> AttentionRule:
    return rule if rule.sinks is None else replace(rule, sinks=rule.sinks.cpu())
