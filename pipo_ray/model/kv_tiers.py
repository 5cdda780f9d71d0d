"""KV pages in two tiers: a working set on the GPU, the rest in RAM. At 16 bits, or packed (`kv_low_bit.py`): these move
as they are, each is saved once, when it is full, and the window before them stays on the GPU.

`resident_layers` says which layers' pages stay on the GPU; they are never moved. The others are at home in RAM. Ahead
of its layer a page is copied to the GPU on a stream of its own ("KV load"); behind the layer, what the sweep's tokens
added is copied back on another ("KV save"), and the page on the GPU is free. Each copy is ordered by events alone, the
host waits for nothing:

- a load waits for the last use of its place on the GPU and for the save that completed its source;
- compute waits for the load; a save waits for the compute that wrote the tokens;
- whatever frees a place, frees it at a point of the save stream (`_stamp`): so two such points have an order, and to
  wait for the later one is enough.

What a sequence has in common with others it reads in their pages, which come to the GPU for the layer once, whoever
stands on them.

Weights cross the same link on a third stream. A page does not queue behind them: it is needed within a layer or two,
while the weight copier works as far ahead as it has slots.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_spans import AttentionRule, DenseSpan, attend_spans
from pipo_ray.model.packed_pages import PackedPages
from pipo_ray.model.tier_rows import TieredPages, TierRows
from pipo_ray.pipeline.device_ops import DeviceOps, Event
from pipo_ray.pipeline.page_pool import PagePool, spans
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.plan.kv_pages import PAGE_TOKENS, KVPlacement, pages_of, resident_layers
from pipo_ray.plan.low_bit_pages import PageLayout

_Stamp = tuple[int, Event]
"""A point of the save stream, and its place among all of them."""

Prefix = tuple[tuple["TieredCache", int], ...]
"""So many of the first tokens of each of these caches."""


@dataclass
class _Run:
    """The table of units of one layer of one sequence of at most `capacity` tokens, which has `tokens` in `layout`,
    behind `start` of others, and at least `packed` of them in packed pages.

    Where the layer is resident, `gpu` are units for the sequence's whole capacity and `ram` is empty. Otherwise `ram`
    are, and `gpu` is empty but around the layer's turn. Compute must wait for `arrivals` before it uses `gpu`.
    """

    layout: TierRows
    capacity: int
    start: int
    tokens: int = 0
    packed: int = 0
    gpu: list[int] = field(default_factory=list)
    ram: list[int] = field(default_factory=list)
    arrivals: list[Event] = field(default_factory=list)
    saved: _Stamp | None = None

    def rows(self, num_tokens: int) -> int:
        """Rows of so many tokens."""
        return self.layout.rows(num_tokens, self.capacity, self.start, self.packed)

    def units(self, num_tokens: int) -> int:
        """Units for so many tokens."""
        return -(-self.rows(num_tokens) // self.layout.per_unit)

    @property
    def all_units(self) -> int:
        """Units for all tokens that there can be."""
        return self.units(self.capacity)


class TieredCache:
    """The KV cache of one sequence: behind the tokens of `prefix` at most `capacity` of its own, `length` of which are
    there in every layer.
    """

    def __init__(self, tiers: KVTiers, capacity: int, prefix: Prefix = ()) -> None:
        self.capacity, self.length, self.prefix = capacity, 0, prefix
        self.runs: dict[int, _Run] = {}
        self._tiers = tiers

    @property
    def start(self) -> int:
        """Tokens of the prefix."""
        return sum(count for _, count in self.prefix)

    @property
    def num_pages(self) -> int:
        """Pages of a layer that its own tokens can take."""
        return pages_of(self.capacity)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SequenceCache.append`; between `KVTiers.begin_layer` and `end_layer`."""
        return self._tiers.append(self, layer, keys, values)

    def packed_pages(self, layer: int, layout: PageLayout, sliding_window: int | None) -> PackedPages:
        """See `kv_low_bit.PagedSequence`."""
        return self._tiers.packed_pages(self, layer, layout)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `SequenceCache.attend`."""
        own = self.append(layer, keys, values)
        if not self.prefix:
            return attend(query, *own, rule)
        spans = [DenseSpan(*self._tiers.held(cache, layer, count, keys, values)) for cache, count in self.prefix]
        return attend_spans(query, [*spans, DenseSpan(*own)], rule)

    def resize(self, capacity: int, length: int, packed: int = 0) -> None:
        """Keep its own first `length` tokens alone, `packed` of which are in packed pages, with room for `capacity`;
        see `KVTiers.resize`.
        """
        self.length = length
        self._tiers.resize(self, capacity, packed)

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        self.length += num_tokens

    def drop(self) -> None:
        """Give the pages back."""
        self._tiers.drop(self)

    @property
    def nbytes(self) -> int:
        """Bytes of its pages, in both tiers."""
        return sum(len(run.ram or run.gpu) for run in self.runs.values()) * self._tiers.unit_bytes


class KVTiers:
    """The two tiers of a stage and the page tables of its sequences. All of it belongs to the thread that computes."""

    def __init__(
        self, placement: KVPlacement, dtype: torch.dtype, ops: DeviceOps, trace: TraceWriter = NO_TRACE
    ) -> None:
        self.unit_bytes = placement.unit_bytes
        self.loaded_bytes = self.saved_bytes = 0
        self._placement, self._num_layers = placement, placement.num_layers
        self._dtype, self._ops, self._trace = dtype, ops, trace
        self._layouts = [TierRows.of(placement, layer) for layer in range(self._num_layers)]
        self.gpu = ops.allocate(placement.gpu_units * self.unit_bytes).view(-1, self.unit_bytes)
        # Whole pages of the operating system: a copy must not leave what is registered.
        memory = torch.from_numpy(
            np.frombuffer(mmap.mmap(-1, max(1, -(-placement.ram_bytes // 4096)) * 4096), np.uint8)
        )
        self.ram = memory[: placement.ram_bytes].view(-1, self.unit_bytes)
        self._gpu_pool = PagePool("GPU memory", placement.gpu_units)
        self._ram_pool = PagePool("RAM", placement.ram_units)
        # Registering takes 0.4 s per GB; nobody waits for it before KV outgrows the GPU.
        wanted = placement.ram_units > 0
        self._pinning = threading.Thread(target=lambda: wanted and ops.pin(memory), name="pin KV", daemon=True)
        self._pinning.start()
        self._live: list[TieredCache] = []
        self._batch: Sequence[tuple[TieredCache, int]] = ()
        self._resident = resident_layers(placement.units, 0, placement.gpu_units)
        self._layer = -1
        self._ahead: set[int] = set()
        self._freed: dict[int, _Stamp] = {}
        self._num_stamps = 0

    # -- sequences
    # -------------------------------------------------------------------------------------------------------

    def open(self, capacity: int, prefix: Prefix = ()) -> TieredCache:
        """The cache of a new sequence that has at most `capacity` tokens of its own, behind those of `prefix`, which at
        16 bits may end anywhere.
        """
        cache = TieredCache(self, capacity, prefix)
        self._live.append(cache)
        return cache

    def resize(self, cache: TieredCache, capacity: int, packed: int) -> None:
        """Let the sequence have pages for `capacity` tokens. What it has too much is free now, copies and computations
        that use it may be under way; what it lacks it takes when the layer's turn comes, by when the layers that stay
        on the GPU have been chosen for it.
        """
        cache.capacity = capacity
        computed = self._ops.record_on_compute()
        for layer, run in cache.runs.items():
            run.capacity, run.tokens, run.packed = capacity, min(run.tokens, cache.length), packed
            home = run.ram or run.gpu
            if len(home) <= run.all_units:
                continue
            if run.ram:
                self._ahead.discard(layer)
                self._free_gpu(run)  # loaded ahead
                self._ram_pool.give(run.ram[run.all_units :])
            else:
                stamp = self._stamp(*run.arrivals, computed)
                self._give_gpu(run.gpu[run.all_units :], stamp)
            del home[run.all_units :]

    def drop(self, cache: TieredCache) -> None:
        """Give the sequence's pages back; copies and computations that use them may be under way."""
        self._live.remove(cache)
        stamp = self._stamp(self._ops.record_on_compute())
        for run in cache.runs.values():
            self._free_gpu(run, stamp)
            self._ram_pool.give(run.ram)
        cache.runs.clear()

    def append(
        self, cache: TieredCache, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `keys`, `values` [heads, tokens, head_dim] behind the sequence's tokens on the GPU; all of them.

        Views where the pages are neighbours, copies otherwise. Raises UnsupportedModelError for more bytes than a
        token of this model has by its facts.
        """
        start, stop = cache.length, cache.length + keys.shape[1]
        if stop > cache.capacity:
            raise ValueError(f"KV cache of {cache.capacity} tokens cannot hold {stop}")
        width = keys.shape[0] * keys.shape[2]
        whole = width + values.shape[0] * values.shape[2]
        layout, gpu = self._layouts[layer], self._rows(layer)
        if whole > gpu.shape[1]:
            raise UnsupportedModelError(
                f"layer {layer} caches {whole} elements per token, its model's facts say {gpu.shape[1]}"
            )
        at = 0
        for count, first in spans(layout.per_unit, start, stop, cache.runs[layer].gpu):
            rows = gpu[first : first + count]
            _per_head(rows[:, :width], keys).copy_(keys[:, at : at + count])
            _per_head(rows[:, width:whole], values).copy_(values[:, at : at + count])
            at += count
        return self.held(cache, layer, stop, keys, values)

    def held(
        self, cache: TieredCache, layer: int, num_tokens: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, num_tokens, head_dim] of the sequence's own first tokens, whose layer is at its turn;
        `keys`, `values` have their heads. Views or copies, as `append` has them.
        """
        layout, gpu = self._layouts[layer], self._rows(layer)
        places = spans(layout.per_unit, 0, num_tokens, cache.runs[layer].gpu)
        parts = [gpu[first : first + count] for count, first in places]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        width = keys.shape[0] * keys.shape[2]
        whole = width + values.shape[0] * values.shape[2]
        return _per_head(rows[:, :width], keys), _per_head(rows[:, width:whole], values)

    def _rows(self, layer: int) -> Tensor:
        """The GPU's memory as a layer's rows."""
        return self.gpu.view(-1, self._layouts[layer].row_bytes).view(self._dtype)

    def packed_pages(self, cache: TieredCache, layer: int, layout: PageLayout) -> PackedPages:
        """Where the layer's packed pages are for what is computed between `begin_layer` and `end_layer`. Raises
        UnsupportedModelError for larger ones than this model has by its facts.
        """
        size = self._layouts[layer].page_units
        if layout.page_bytes > size * self.unit_bytes:
            raise UnsupportedModelError(
                f"layer {layer} has packed pages of {layout.page_bytes} bytes, its model's facts say "
                f"{size * self.unit_bytes} at most"
            )
        line = [(one, count // PAGE_TOKENS * size) for one, count in cache.prefix]

        def units() -> list[int]:
            others = chain.from_iterable(one.runs[layer].gpu[:count] for one, count in line)
            return [*others, *cache.runs[layer].gpu]

        return TieredPages(self.gpu, units, size, layout.page_bytes)

    # -- a sweep
    # ---------------------------------------------------------------------------------------------------------

    def begin_sweep(self, batch: Sequence[tuple[TieredCache, int]]) -> None:
        """A sweep adds so many tokens to each of these caches."""
        adding = {cache for cache, _ in batch}
        prefixes = dict.fromkeys(one for cache, _ in batch for one, _ in cache.prefix if one not in adding)
        self._batch, self._layer = [*((one, 0) for one in prefixes), *batch], -1
        self._ahead.clear()
        total = sum(cache.num_pages for cache in self._live)
        resident = resident_layers(self._placement.units, total, self._placement.gpu_units)
        if resident != self._resident:
            self._resident = resident
            for cache in self._live:
                for layer, run in cache.runs.items():
                    if layer not in resident and not run.ram:
                        self._demote(cache, layer, run)
                    elif layer in resident and run.ram:
                        self._promote(cache, layer, run)
        self._prefetch()

    def begin_layer(self, layer: int) -> None:
        """The layer's pages of all sequences of the batch are on the GPU for what is computed from here on."""
        self._layer = layer
        for cache, num_tokens in self._batch:
            run = cache.runs.get(layer)
            if run is None:
                run = cache.runs[layer] = _Run(self._layouts[layer], cache.capacity, cache.start)
                if layer in self._resident:
                    self._extend(run, run.all_units)
                else:
                    run.ram = self._take_ram(run.all_units)
            elif not run.ram:  # its sequence may be larger than it was
                self._extend(run, run.all_units)
            elif len(run.ram) < run.all_units:
                run.ram += self._take_ram(run.all_units - len(run.ram))
            if run.ram:
                if not run.gpu:
                    self._load(layer, run, run.units(cache.length + num_tokens))
                self._extend(run, run.units(cache.length + num_tokens))
            for event in run.arrivals:
                self._ops.compute_waits_for(event)
            run.arrivals.clear()

    def end_layer(self, layer: int) -> None:
        """What was appended goes home, and the next layers' pages come."""
        moving = [(cache, cache.runs[layer]) for cache, _ in self._batch if cache.runs[layer].ram]
        for cache, num_tokens in self._batch:
            cache.runs[layer].tokens = cache.length + num_tokens
        if moving:
            computed = self._ops.record_on_compute()
            stamp = None
            for cache, run in moving:
                if run.rows(run.tokens) > run.rows(cache.length):
                    stamp = self._save(layer, run, cache.length, computed)
            # Behind earlier layers' saves, too: who takes these places and others waits for the later of two stamps.
            stamp = stamp or self._stamp(computed)
            for _, run in moving:
                self._free_gpu(run, stamp)
            self._ahead.discard(layer)
        self._prefetch()

    # -- moving pages
    # ----------------------------------------------------------------------------------------------------

    def _prefetch(self) -> None:
        """Load the layers that come next, in the next sweep too, as far as there is room for all of a layer."""
        room = self._gpu_pool.num_free
        for step in range(1, self._num_layers + 1):
            layer = (self._layer + step) % self._num_layers
            if layer in self._ahead:
                continue
            wanted: list[tuple[_Run, int]] = []
            for cache, num_tokens in self._batch:
                run = cache.runs.get(layer)
                if run is None:  # a new sequence: it takes its pages when the layer begins
                    run = _Run(self._layouts[layer], cache.capacity, cache.start)
                    room -= run.all_units if layer in self._resident else run.units(cache.length + num_tokens)
                elif run.ram and not run.gpu:
                    most = max(run.tokens, cache.length) + num_tokens
                    wanted.append((run, min(run.all_units, run.units(most))))
            room -= sum(count for _, count in wanted)
            if room < 0:
                return
            for run, count in wanted:
                self._load(layer, run, count)
            if wanted:
                self._ahead.add(layer)

    def _load(self, layer: int, run: _Run, num_units: int) -> None:
        """Copy the run's rows to `num_units` units on the GPU."""
        freed = self._take_gpu(run, num_units, from_end=True)
        after = max((stamp for stamp in (freed, run.saved) if stamp is not None), key=_place, default=None)
        event = None if after is None else after[1]
        ram, gpu = (tier.view(-1, run.layout.row_bytes) for tier in (self.ram, self.gpu))
        rows = run.rows(run.tokens)
        for count, source, target in spans(run.layout.per_unit, 0, rows, run.ram, run.gpu):
            event = self._ops.copy(ram[source : source + count], gpu[target : target + count], event, "KV load")
        if event is not None and num_units:
            run.arrivals.append(event)
        if rows:
            nbytes = rows * run.layout.row_bytes
            self.loaded_bytes += nbytes
            self._trace.mark("KV load", {"piece": f"layer {layer}", "bytes": nbytes})

    def _save(self, layer: int, run: _Run, start: int, computed: Event) -> _Stamp:
        """Copy the run's rows of the tokens from `start` on to RAM, once they have been computed."""
        first, stop = run.rows(start), run.rows(run.tokens)
        if first == stop:
            return self._stamp(computed)
        ram, gpu = (tier.view(-1, run.layout.row_bytes) for tier in (self.ram, self.gpu))
        for count, source, target in spans(run.layout.per_unit, first, stop, run.gpu, run.ram):
            event = self._ops.copy(gpu[source : source + count], ram[target : target + count], computed, "KV save")
        nbytes = (stop - first) * run.layout.row_bytes
        self.saved_bytes += nbytes
        self._trace.mark("KV save", {"piece": f"layer {layer}", "bytes": nbytes})
        run.saved = self._next_stamp(event)
        return run.saved

    def _demote(self, cache: TieredCache, layer: int, run: _Run) -> None:
        """The layer is no longer resident."""
        run.ram = self._take_ram(run.all_units)
        # Whatever the run waits for is behind us on the save stream: a stamp, or the load of `_promote`.
        stamp = self._save(layer, run, 0, self._ops.record_on_compute())
        self._free_gpu(run, stamp)

    def _promote(self, cache: TieredCache, layer: int, run: _Run) -> None:
        """The layer is resident from now on."""
        self._free_gpu(run)
        self._make_room(run.all_units)
        self._load(layer, run, run.all_units)
        if run.arrivals:
            self._stamp(*run.arrivals)  # no save overwrites the pages in RAM before they have been read
        self._ram_pool.give(run.ram)
        run.ram = []

    def _extend(self, run: _Run, num_units: int) -> None:
        """Let the run have `num_units` units on the GPU at least."""
        if num_units > len(run.gpu):
            freed = self._take_gpu(run, num_units - len(run.gpu), from_end=bool(run.ram))
            if freed is not None:
                run.arrivals.append(freed[1])

    # -- places
    # ----------------------------------------------------------------------------------------------------------

    def _take_gpu(self, run: _Run, count: int, *, from_end: bool) -> _Stamp | None:
        """Add `count` pages to the run; when the last of them is free of earlier uses."""
        self._make_room(count)
        pages = self._gpu_pool.take(count, from_end=from_end)
        run.gpu.extend(pages)
        return max((self._freed[page] for page in pages if page in self._freed), key=_place, default=None)

    def _take_ram(self, count: int) -> list[int]:
        self._pinning.join()
        return self._ram_pool.take(count)

    def _make_room(self, count: int) -> None:
        """Give up pages that were loaded ahead, if `count` are not free otherwise."""
        for run in self._loaded_ahead():
            if self._gpu_pool.num_free >= count:
                return
            self._free_gpu(run)

    def _loaded_ahead(self) -> Iterator[_Run]:
        for cache in self._live:
            for layer, run in cache.runs.items():
                if run.ram and run.gpu and layer != self._layer:
                    self._ahead.discard(layer)
                    yield run

    def _free_gpu(self, run: _Run, stamp: _Stamp | None = None) -> None:
        """The run's pages on the GPU are free at `stamp`, None: once its loads and all earlier stamps have passed."""
        if not run.gpu:
            return
        if run.arrivals:
            stamp = self._stamp(*run.arrivals)
            run.arrivals.clear()
        elif stamp is None:
            stamp = self._stamp(self._ops.record_on_compute())
        self._give_gpu(run.gpu, stamp)
        run.gpu = []

    def _give_gpu(self, pages: Sequence[int], stamp: _Stamp) -> None:
        for page in pages:
            self._freed[page] = stamp
        self._gpu_pool.give(pages)

    def _stamp(self, *events: Event) -> _Stamp:
        """A point of the save stream behind `events`: a copy of nothing waits for each of them."""
        for event in events:
            point = self._ops.copy(self.gpu[:0], self.ram[:0], event, "KV save")
        return self._next_stamp(point)

    def _next_stamp(self, event: Event) -> _Stamp:
        self._num_stamps += 1
        return self._num_stamps, event


def _place(stamp: _Stamp) -> int:
    return stamp[0]


def _per_head(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [tokens, heads * dim] as [heads, tokens, dim], heads and dim as `like` has them."""
    heads: Tensor = rows.unflatten(1, (like.shape[0], like.shape[2]))
    return heads.transpose(0, 1)
