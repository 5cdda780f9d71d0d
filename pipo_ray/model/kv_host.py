"""A KV cache in RAM beside a device that computes the rest: what is attended to does not cross the link.

A token that comes alone, as in decoding, is attended for by the processor: its query, keys and values go to RAM, its
result comes back, and the keys and values of all tokens before it stay where they are. (FlexGen, arXiv 2303.06865, does
so with its `cpu_cache_compute`.) Where several tokens of a sequence come together, as in a prompt, the device attends,
to a copy of the layer's earlier keys and values that it gets for as long as that takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_spans import AttentionRule

if TYPE_CHECKING:
    from pipo_ray.model.kv_cache import Segment, SequenceCache

_BUFFER_BYTES = 32 << 20


class HostKV:
    """Attention of rows on `device` whose sequences' caches (`SequenceCache`) are in RAM. `compiled` takes what it does
    of tokens that come alone. One thread uses it.

    Between RAM and `device` everything passes through two pinned buffers of at most 32 MiB, and a token that is larger.
    """

    def __init__(self, device: torch.device, compiled: CompiledAttention | None = None) -> None:
        self.compiled = compiled
        self._device = device
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
        row_bytes = query.itemsize * sum(x.shape[0] * x.shape[2] for x in (query, keys, values))
        at_once = max(1, _BUFFER_BYTES // row_bytes)
        for first in range(0, len(alone), at_once):
            part = alone[first : first + at_once]
            columns = [segment.start for segment in part]
            neighbours = columns[-1] - columns[0] == len(columns) - 1
            chosen = slice(columns[0], columns[-1] + 1) if neighbours else columns
            on_host = self._to_host([x.transpose(0, 1)[chosen] for x in (query, keys, values)])
            q, k, v = (x.transpose(0, 1) for x in on_host)
            attended = self._buffer("output", (len(part), *output.shape[1:]), output.dtype)
            by_kernel = [number for number, segment in enumerate(part) if self._compiles(segment, rule, q, k, v)]
            if by_kernel:
                assert self.compiled is not None
                caches = [_cache(part[number]) for number in by_kernel]
                self.compiled.attend_each(
                    q, (k, v), by_kernel,
                    [cache.memory_for(layer, k[:, :1], v[:, :1]) for cache in caches],
                    [(rule.first_visible(cache.length + 1), cache.length + 1) for cache in caches],
                    rule.scale, attended,
                )  # fmt: skip
            others = set(range(len(part))).difference(by_kernel)
            for number in sorted(others):
                one = slice(number, number + 1)
                result = _cache(part[number]).attend(layer, q[:, one], k[:, one], v[:, one], _in_ram(rule))
                attended[number] = result[:, 0]
            # The buffer is written again behind the next `_to_host`, which waits for the stream, and so for this copy.
            output[chosen] = attended.to(self._device, non_blocking=True)

    def _compiles(self, segment: Segment, rule: AttentionRule, *row: Tensor) -> bool:
        plain = not _cache(segment).prefix and rule.softcap is None and rule.sinks is None
        return plain and self.compiled is not None and self.compiled.takes(*(x[:, :1] for x in row))

    def _append(self, cache: SequenceCache, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values on the device behind those of a cache in RAM."""
        tokens = keys.shape[1]
        memory = cache.memory_for(layer, *(torch.empty((), dtype=x.dtype).expand(x.shape) for x in (keys, values)))
        at_once = max(1, _BUFFER_BYTES // (keys.itemsize * sum(x.shape[0] * x.shape[2] for x in (keys, values))))
        for first in range(0, tokens, at_once):
            part = slice(first, min(first + at_once, tokens))
            on_host = self._to_host([x.transpose(0, 1)[part] for x in (keys, values)])
            place = slice(cache.length + part.start, cache.length + part.stop)
            for target, rows in zip(memory, on_host, strict=True):
                target[:, place] = rows.transpose(0, 1)

    def _with_earlier(self, cache: SequenceCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's keys and values, those of its prefix before them, and the new ones behind, on the device."""
        sources = [(part.memory_of(layer), count) for part, count in cache.prefix]
        if cache.length:
            sources.append((cache.memory_of(layer), cache.length))
        if not sources:
            return keys, values
        results = []
        for which, new in enumerate((keys, values)):
            earlier = sum(count for _, count in sources)
            whole = new.new_empty(new.shape[0], earlier + new.shape[1], new.shape[2])
            at = 0
            for memory, count in sources:
                self._to_device(memory[which][:, :count], whole[:, at : at + count])
                at += count
            whole[:, at:] = new
            results.append(whole)
        return results[0], results[1]

    def _to_host(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors [n, heads, dim] of the device, in a pinned buffer until this is called again."""
        n = parts[0].shape[0]
        together = torch.cat([part.flatten(1) for part in parts], dim=1)
        buffer = self._buffer("row", tuple(together.shape), together.dtype)
        buffer.copy_(together, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        columns = buffer.split([part.shape[1] * part.shape[2] for part in parts], dim=1)
        return [column.view(n, *part.shape[1:]) for column, part in zip(columns, parts, strict=True)]

    def _to_device(self, source: Tensor, target: Tensor) -> None:
        """Copy [heads, n, dim] in RAM to the device, through the pinned buffer."""
        at_once = max(1, _BUFFER_BYTES // (source.itemsize * source.shape[0] * source.shape[2]))
        for first in range(0, source.shape[1], at_once):
            part = source[:, first : first + at_once]
            buffer = self._buffer("row", tuple(part.shape), part.dtype)
            buffer.copy_(part)
            target[:, first : first + at_once].copy_(buffer, non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned memory that is there until it is asked for again under this name."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            # By powers of two: torch keeps pinned memory that is given back, for blocks of such sizes.
            size = 1 << max(20, (nbytes - 1).bit_length())
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._buffers[name] = buffer
        return buffer[:nbytes].view(dtype).view(shape)


def _cache(segment: Segment) -> SequenceCache:
    cache: SequenceCache = segment.cache  # type: ignore[assignment]
    return cache


def _in_ram(rule: AttentionRule) -> AttentionRule:
    return rule if rule.sinks is None else replace(rule, sinks=rule.sinks.cpu())
