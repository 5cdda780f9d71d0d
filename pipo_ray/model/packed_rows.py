"""Tokens that come alone, one of each of several sequences, and the packed pages on a GPU that they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pipo_ray.model.host_values import to_device
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.attention_parts import AttentionWork, SeenTokens, share_out
from pipo_ray.plan.low_bit_pages import PageLayout

if TYPE_CHECKING:
    from pipo_ray.model.kv_cache import Segment
    from pipo_ray.model.kv_low_bit import LowBitCache
    from pipo_ray.model.low_bit_layer import LowBitLayer
    from pipo_ray.triton_kernels.packed_kernels import PackedKernels


class _Addresses(NamedTuple):
    """What a layer's sequences have of addresses, and the same on the device."""

    known: list[int]
    on_device: Tensor


class _Window(NamedTuple):
    """A layer's window, and where it is."""

    tensors: tuple[Tensor, Tensor]
    place: tuple[int, int, int]


class _Work(NamedTuple):
    """What the sequences see, how that is shared out, and the numbers of it on the device."""

    seen: list[SeenTokens]
    work: AttentionWork
    on_device: Tensor


class PackedRows:
    """Attention of all sequences of a row whose tokens come alone, by `kernels`: one launch for a layer, and one more
    where pages leave windows. Layers have a KV cache of so many `bits`.

    What the kernels have to know is sent to the device once for a sweep, as it is the same in all layers, and once more
    for layers with another sliding window; addresses are sent when they are others.
    """

    def __init__(self, bits: tuple[int, ...], kernels: PackedKernels) -> None:
        self._bits, self._kernels = bits, kernels
        self._addresses: dict[int, _Addresses] = {}  # by layer
        self._work: dict[tuple[int, int | None], _Work] = {}  # by heads and sliding window
        self._windows: WeakKeyDictionary[LowBitLayer, _Window] = WeakKeyDictionary()

    def part(
        self, segments: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Sequence[Segment], Sequence[Segment]]:
        """A row's `segments`, of LowBitCaches, without those that `attend` is for, and those: tokens that come alone,
        and are not handed out to others. `query`, `keys`, `values` are the row's, [heads, tokens, dim].
        """
        bits = self._bits[layer] if layer < len(self._bits) else 16
        if bits == 16:
            return segments, ()
        layout = PageLayout(keys.shape[0], keys.shape[2], values.shape[2], bits)
        if not self._kernels.takes(layout, query, keys, values):
            return segments, ()
        others: list[Segment] = []
        alone: list[Segment] = []
        for segment in segments:
            cache: LowBitCache = segment.cache  # type: ignore[assignment]
            (others if segment.stop - segment.start > 1 or cache.is_awaited else alone).append(segment)
        return others, alone

    def attend(
        self, alone: Sequence[Segment], layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule,
        output: Tensor,
    ) -> None:  # fmt: skip
        """Append the tokens of `alone` to their caches, let them attend, and write that to their rows of `output`,
        contiguous [tokens, heads, value_dim]. `query`, `keys` and `values` are the row's, [heads, tokens, dim].
        """
        new_keys, new_values = keys[:, :1], values[:, :1]
        memories: list[LowBitLayer] = []
        seen: list[SeenTokens] = []
        own: list[int] = []
        shared: list[int] = []
        first_visible = rule.first_visible
        for segment in alone:
            cache: LowBitCache = segment.cache  # type: ignore[assignment]
            memory = cache.layer_for(layer, new_keys, new_values, rule)
            length = cache.start + cache.length + 1
            size, num_pages = memory.begin_token(length - 1)
            runs = memory.pages.runs(num_pages)
            assert runs is not None, "a store whose pages move has no such rows"
            keys_address, values_address, room = self._window_of(memory)
            memories.append(memory)
            leaves = memory.num_leaving > 0
            if len(runs) == 1:
                ((address, stop),) = runs
                stops: tuple[int, ...] = (stop,)
                shared.append(address)
            else:
                address = runs[-1].address
                stops = tuple([run.stop for run in runs])
                shared += [run.address for run in runs]
            seen.append(SeenTokens(segment.start, num_pages, size, room, first_visible(length), stops, leaves))
            own += (keys_address, values_address, address)
        addresses = self._on_device(layer, own + shared, query.device)
        layout = memories[0].layout
        work = self._shared_out(layout.heads, rule.sliding_window, seen, query.device)
        self._kernels.attend(query, keys, values, output, rule, layout, addresses, work.on_device, work.work)
        if work.work.num_leaving:
            self._kernels.pack(layout, keys.dtype, addresses, work.on_device, work.work)
            for memory in memories:
                memory.take_leaving()

    def _window_of(self, memory: LowBitLayer) -> tuple[int, int, int]:
        """Addresses of the keys and values of its window, and the room there: looked up where the window is another."""
        found = self._windows.get(memory)
        if found is None or found.tensors is not memory.window:
            keys, values = memory.window
            found = _Window(memory.window, (keys.data_ptr(), values.data_ptr(), keys.shape[1]))
            self._windows[memory] = found
        return found.place

    def _on_device(self, layer: int, known: list[int], device: torch.device) -> Tensor:
        """The layer's addresses."""
        found = self._addresses.get(layer)
        if found is None or found.known != known:
            found = _Addresses(known, to_device(torch.tensor(known), device))
            self._addresses[layer] = found
        return found.on_device

    def _shared_out(self, heads: int, window: int | None, seen: list[SeenTokens], device: torch.device) -> _Work:
        found = self._work.get((heads, window))
        if found is None or found.seen != seen:
            work = share_out(seen, heads, self._kernels.num_programs)
            found = _Work(seen, work, to_device(torch.tensor(work.numbers, dtype=torch.int32), device))
            self._work[heads, window] = found
        return found
