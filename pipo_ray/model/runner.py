"""One sweep: a forward pass of transformers' module graph over a batch of sequences, fed by the weight stream."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.errors import DriveError
from pipo_ray.model.attention import ragged_row
from pipo_ray.model.batch import KeptPoint, PrefixPart, SweepEntry
from pipo_ray.model.binding import Binder
from pipo_ray.model.disk_cache import DiskCache
from pipo_ray.model.heap import Heap
from pipo_ray.model.host_values import known, row_of
from pipo_ray.model.kv_cache import KVStore, RaggedCache, Segment, SequenceCache, SequenceKV, at_16_bits
from pipo_ray.model.kv_disk import KVDisk, KVPagesLostError
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_pool import KVPool
from pipo_ray.model.kv_tiers import KVTiers
from pipo_ray.model.lanes import Lanes
from pipo_ray.model.settled_layers import SettledLayers


class OutOfStepError(Exception):
    """An entry does not continue what the cache holds: the caller must send the sequence again from its first token."""


class ModelRunner:
    """Runs sweeps and keeps the sequences' KV caches. With `ragged` all sequences share a row; otherwise each walks
    alone, in lockstep. `kv_store` holds the ragged rows' caches; without it each is by itself in the device's memory,
    and has `attention` for tokens that come alone; with a `HostKV` it is by itself in RAM. `layers` compute a single
    token of a single sequence. `heap` is what sweeps on the CPU have their activations in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        binder: Binder,
        device: torch.device,
        *,
        ragged: bool,
        kv_store: KVStore | HostKV | None = None,
        attention: CompiledAttention | None = None,
        layers: SettledLayers | None = None,
        heap: Heap | None = None,
    ) -> None:
        self._model, self._binder, self._device, self._ragged = model, binder, device, ragged
        self._heap = heap
        self._kv_store, self._attention, self._layers = kv_store, attention, layers
        self._caches: dict[str, SequenceKV] = {}
        self._own_caches: dict[str, tuple[Any, int]] = {}
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted

    def run(self, entries: Sequence[SweepEntry], *, again: bool = False) -> list[torch.Tensor | None]:
        """Compute `entries`; per entry its logits [tokens wanted, vocabulary] in the model's dtype on the device, None
        if none are wanted. `again`: those that are left of a sweep that failed, in which they have begun.

        If it raises, the sweep counts as not run, and the caches of its sequences are dropped; of KVPagesLostError only
        those that `undo` tells.
        """
        with torch.inference_mode():  # in which caches are written
            for entry in entries if not again else ():
                self._shrink_what_is_taken(entry)
            for entry in entries:
                if entry.begins and not again:
                    self._begin(entry)
                self._check_step(entry)
                for point in entry.keep if not again else ():
                    self._open_point(point)
        try:
            with torch.inference_mode(), self._watched_heap(entries):
                result = self._run_ragged(entries) if self._ragged else self._run_lanes(entries)
                self._binder.end()
        except KVPagesLostError:
            self._binder.abandon()
            raise
        except BaseException:
            self._binder.abandon()
            self.drop([entry.sequence for entry in entries] + [one.name for entry in entries for one in entry.keep])
            raise
        return result

    def _watched_heap(self, entries: Sequence[SweepEntry]) -> AbstractContextManager[None]:
        if self._heap is None:
            return nullcontext()
        return self._heap.watched(sum(len(entry.token_ids) for entry in entries))

    def undo(self) -> dict[str, DriveError | None]:
        """A sweep has failed because KV pages are lost: see `take_lost`. None: it is not lost, but the sweep cannot be
        undone in it.
        """
        caches = {name: cache for name, cache in self._caches.items() if isinstance(cache, LowBitCache)}
        torn = {name: cache for name, cache in caches.items() if not cache.undo() or _lost(cache) is not None}
        while more := {name: cache for name, cache in caches.items()
                       if name not in torn and cache.depends_on(torn.values())}:  # fmt: skip
            torn |= more
        return dict.fromkeys(torn) | self.take_lost(torn)

    def take_lost(self, others: Iterable[str] = ()) -> dict[str, DriveError | None]:
        """The caches whose KV pages are lost, or that stand on such, and why. They are dropped, and `others`."""
        lost = {name: error for name, cache in self._caches.items() if (error := _lost(cache)) is not None}
        self.drop((*lost, *others))
        return dict(lost)

    def drop(self, sequences: Sequence[str]) -> None:
        """Forget these sequences' caches."""
        for sequence in sequences:
            if (cache := self._caches.pop(sequence, None)) is not None:
                cache.drop()
            self._own_caches.pop(sequence, None)

    def drop_all(self) -> None:
        """Forget all caches."""
        self.drop([*self._caches, *self._own_caches])

    def cut(self, sequences: Sequence[tuple[str, int]]) -> None:
        """Of these sequences' caches keep so many of the first tokens that are in them, and memory for no more."""
        with torch.inference_mode():
            for sequence, num_tokens in sequences:
                self._kept(sequence).resize(num_tokens, num_tokens)

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for KV caches of ragged rows."""
        return sum(cache.nbytes for cache in self._caches.values())

    def length(self, sequence: str) -> int:
        """Number of tokens of `sequence` that are in its cache and in those that it stands on."""
        if self._ragged:
            cache = self._caches.get(sequence)
            return 0 if cache is None else cache.start + cache.length
        return self._own_caches[sequence][1] if sequence in self._own_caches else 0

    def _begin(self, entry: SweepEntry) -> None:
        self.drop([entry.sequence])
        if self._ragged:
            self._caches[entry.sequence] = self._open(entry)

    def _check_step(self, entry: SweepEntry) -> None:
        if self.length(entry.sequence) != entry.start:
            raise OutOfStepError(
                f"{entry.sequence}: cache holds {self.length(entry.sequence)} tokens, not {entry.start}"
            )

    def _open(self, entry: SweepEntry) -> Any:
        """The cache of a sequence that begins."""
        shared, own = entry.shared, entry.prefix[len(entry.shared) :]
        if own and own[0].use == "take":
            cache = self._kept(own[0].sequence)
            del self._caches[own[0].sequence]
            cache.resize(entry.own_capacity, own[0].num_tokens)
            return cache
        prefix = tuple((self._kept(part.sequence), part.num_tokens) for part in shared)
        store = self._store
        if store is None:
            cache = SequenceCache(entry.own_capacity, prefix=prefix, compiled=self._attention)
        elif prefix:
            assert isinstance(store, KVPool | KVTiers | KVDisk | LowBitStore)
            cache = store.open(entry.own_capacity, prefix)
        else:
            cache = store.open(entry.own_capacity)
        if copied := [(self._kept(part.sequence), part.num_tokens) for part in own if part.use == "copy"]:
            cache.copy_from(copied)
        self._begin_window(cache, own)
        return cache

    @property
    def _store(self) -> KVStore | None:
        """What opens caches; None: each is by itself."""
        return self._kv_store.low_bit if isinstance(self._kv_store, HostKV) else self._kv_store

    def _begin_window(self, cache: Any, parts: Sequence[PrefixPart]) -> None:
        """Its last tokens at 16 bits, if they are another's."""
        for part in parts:
            if part.use == "window":
                cache.begin_with(self._kept(part.sequence), part.num_tokens)

    def _open_point(self, point: KeptPoint) -> None:
        """A cache on which others are to begin."""
        store = self._store
        assert isinstance(store, LowBitStore), "others begin anywhere"
        *shared, window = point.prefix
        prefix = [(self._kept(part.sequence), part.num_tokens) for part in shared]
        cache = store.open(window.num_tokens, prefix, pages=False)
        self._begin_window(cache, [window])
        self._caches[point.name] = cache

    def _shrink_what_is_taken(self, entry: SweepEntry) -> None:
        """A cache that `entry` will take gives back what it has too much: those who begin before may count on it."""
        for part in entry.prefix:
            if part.use == "take":
                cache = self._kept(part.sequence)
                if (capacity := max(entry.own_capacity, cache.length)) < cache.capacity:
                    cache.resize(capacity, cache.length)

    def _kept(self, sequence: str) -> Any:
        """The cache of a sequence that another one is to begin with, or that is to be smaller."""
        if sequence not in self._caches:
            raise OutOfStepError(f"{sequence}: there is no cache with which another sequence could begin")
        return self._caches[sequence]

    def _run_ragged(self, entries: Sequence[SweepEntry]) -> list[torch.Tensor | None]:
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        segments: list[Segment] = []
        counts: list[int] = []
        for entry in entries:
            begin = len(ids)
            ids.extend(entry.token_ids)
            positions.extend(range(entry.start, entry.start + len(entry.token_ids)))
            segments.append(Segment(self._caches[entry.sequence], begin, len(ids)))
            wanted = _wanted_rows(entry)
            keep.extend(begin + row for row in wanted)
            counts.append(len(wanted))
        cache = RaggedCache(tuple(segments), self._kv_store)
        self._binder.begin()
        cache.begin_sweep()
        if self._layers is not None:
            self._layers.begin(segments[0].cache if len(segments) == 1 else None, len(ids))
        with ragged_row(cache):
            logits = self._forward(ids, keep, cache, positions)
        self._binder.finish_pass()
        cache.advance()
        return [part if len(part) else None for part in logits.split(counts)]

    def _run_lanes(self, entries: Sequence[SweepEntry]) -> list[torch.Tensor | None]:
        lanes = Lanes(len(entries))
        self._binder.begin(lanes, len(entries))

        def body(entry: SweepEntry) -> torch.Tensor | None:
            with torch.inference_mode():
                cache, _ = self._own_caches.get(entry.sequence, (None, 0))
                if cache is None:
                    cache = DynamicCache(config=self._model.config)
                wanted = _wanted_rows(entry)
                logits = self._forward(list(entry.token_ids), wanted, cache, None)
                self._binder.finish_pass()
                self._own_caches[entry.sequence] = (cache, entry.start + len(entry.token_ids))
                return logits if wanted else None

        return lanes.run([lambda entry=entry: body(entry) for entry in entries])  # type: ignore[misc]

    def _forward(self, ids: list[int], keep: list[int], cache: Any, positions: list[int] | None) -> torch.Tensor:
        """Logits [len(keep), vocabulary] of the columns `keep` of one row of tokens."""
        arguments: dict[str, Any] = {}
        if positions is not None:
            arguments["position_ids"] = row_of(known(positions, self._device))
        rows = known(keep, self._device)
        if self._keeps_logits:
            arguments["logits_to_keep"] = rows
        output = self._model(
            input_ids=row_of(known(ids, self._device)), past_key_values=cache, use_cache=True, **arguments
        )
        logits: torch.Tensor = output.logits[0]
        return logits if self._keeps_logits else logits[rows]


def _lost(cache: SequenceKV) -> DriveError | None:
    pages = at_16_bits(cache)
    return pages.lost if isinstance(pages, DiskCache) else None


def _wanted_rows(entry: SweepEntry) -> list[int]:
    count = len(entry.token_ids)
    return {"none": [], "last": [count - 1], "all": list(range(count))}[entry.logits]
