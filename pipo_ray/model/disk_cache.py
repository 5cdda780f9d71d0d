"""The KV cache of one sequence whose pages are in RAM and on the drive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pipo_ray.errors import DriveError
from pipo_ray.model.disk_pages import DiskPages
from pipo_ray.model.kv_page import Page
from pipo_ray.model.kv_spans import AttentionRule, DenseSpan, Span, attend_spans
from pipo_ray.plan import kv_pages
from pipo_ray.plan.disk_pages import PAGE_TOKENS
from pipo_ray.plan.kv_disk import pages_of
from pipo_ray.plan.low_bit_pages import PageLayout, packed_pages

if TYPE_CHECKING:
    from pipo_ray.model.kv_disk import KVDisk


Prefix = tuple[tuple["DiskCache", int], ...]
"""So many of the first tokens of each of these caches."""


class DiskCache:
    """The KV cache of one sequence: behind the tokens of `prefix` at most `capacity` of its own, `length` of which are
    there in every layer. `grows` until it has ended. Layers at 16 bits attend here; the packed pages of others are
    kept.
    """

    def __init__(self, store: KVDisk, capacity: int, prefix: Prefix = ()) -> None:
        self.capacity, self.length, self.prefix = capacity, 0, prefix
        self.grows = capacity > 0
        self.layers: dict[int, list[Page]] = {}
        self.failed: DriveError | None = None
        self._store = store
        self._packed: set[int] = set()

    @property
    def start(self) -> int:
        """Tokens of the prefix."""
        return sum(count for _, count in self.prefix)

    @property
    def lost(self) -> DriveError | None:
        """Why it cannot be used any more: a page of it, or of one that it stands on, is gone."""
        failed = (cache.failed for cache in (self, *(one for one, _ in self.prefix)))
        return next((error for error in failed if error is not None), None)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `SequenceCache.attend`. Raises KVPagesLostError, and UnsupportedModelError for more bytes than a token of
        this model has by its facts.
        """
        stop = self.length + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} tokens cannot hold {stop}")
        self._store.enter(self)
        self._store.layout.learn(layer, keys, values)
        self._store.windows[layer] = rule.sliding_window
        filled = self.length % PAGE_TOKENS
        self._store.return_to(self, layer, pages_of(self.length), last_is_full=not filled)
        pages = self.layers[layer]
        self.forget_unseen(layer)
        spans: list[Span] = [DiskSpan(self._store, cache.layers[layer], count) for cache, count in self.prefix]
        # Whether the new tokens' keys lie in pages when they are attended to is a matter of their number alone.
        if filled and filled + keys.shape[1] <= PAGE_TOKENS:
            self._append(layer, keys, values)
            return attend_spans(query, [*spans, DiskSpan(self._store, pages, stop)], rule)
        spans += [DiskSpan(self._store, pages, self.length), DenseSpan(keys, values)]
        attended = attend_spans(query, spans, rule)
        self._append(layer, keys, values)
        return attended

    def packed_pages(self, layer: int, layout: PageLayout, sliding_window: int | None) -> DiskPages:
        """See `PagedSequence`. Raises UnsupportedModelError for larger pages than this model has by its facts."""
        self._store.windows.setdefault(layer, sliding_window)
        self._packed.add(layer)
        return DiskPages(self._store, self, layer, layout)

    def seen(self, layer: int) -> Iterator[Page]:
        """The pages that the next sweep attends to, in order, as far as they are there before it."""
        first, at = self._first_seen(layer), 0
        for cache, count in self.prefix:
            yield from cache._pages(layer, first - at, count)
            at += count
        own = self.length
        if layer in self._packed:
            own = packed_pages(self.start + self.length) * kv_pages.PAGE_TOKENS - self.start
        yield from self._pages(layer, first - at, own)

    def unseen(self, layer: int) -> Sequence[Page]:
        """Those of its own pages that none of its tokens will see any more."""
        first = max(0, self._first_seen(layer) - self.start)
        return self.layers.get(layer, [])[: first // self._store.placement.page_tokens(layer)]

    def forget_unseen(self, layer: int) -> None:
        """Give back what no token will see any more."""
        self._store.forget(self.unseen(layer))

    def _first_seen(self, layer: int) -> int:
        """The first token of all that the next one sees."""
        window = self._store.windows.get(layer)
        return 0 if window is None else max(0, self.start + self.length - window + 1)

    def _pages(self, layer: int, first: int, stop: int) -> Sequence[Page]:
        """Those of its own tokens `first` to before `stop`, as far as they are there."""
        tokens = self._store.placement.page_tokens(layer)
        return self.layers.get(layer, [])[max(0, first) // tokens : -(-stop // tokens)]

    def _append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        done = 0
        while done < keys.shape[1]:
            index, start = divmod(self.length + done, PAGE_TOKENS)
            count = min(PAGE_TOKENS - start, keys.shape[1] - done)
            page = self._store.layout.views(self._store.newest(self, layer, index), layer)
            for memory, new in zip(page, (keys, values), strict=True):
                memory[:, start : start + count] = new[:, done : done + count]
            done += count
        self._store.wrote()

    def resize(self, capacity: int, length: int, packed: int = 0) -> None:
        """Keep its own first `length` tokens alone, `packed` of which are in packed pages, with room for `capacity`:
        for no more, where it has ended.
        """
        self.capacity, self.length = capacity, length
        held = {layer: packed if layer in self._packed else length for layer in self.layers}
        self._store.resize(self, held, grows=capacity > length)

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        self.length += num_tokens

    def drop(self) -> None:
        """Give the pages back."""
        self._store.drop(self)

    @property
    def nbytes(self) -> int:
        """Bytes of its pages in RAM."""
        pages = (page for layer in self.layers.values() for page in layer)
        return sum(page.frame >= 0 for page in pages) * self._store.placement.page_bytes


@dataclass(frozen=True)
class DiskSpan:
    """The first `num_tokens` tokens of a sequence in one layer at 16 bits."""

    store: KVDisk
    pages: Sequence[Page]
    num_tokens: int

    def chunks(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Span`: a part is as many pages as are attended to at once. Which ones those are depends on their
        numbers alone, so a part is the same wherever its pages are.
        """
        index, stop = first // PAGE_TOKENS, pages_of(self.num_tokens)
        while index < stop:
            behind = min(stop, (index // self.store.at_once + 1) * self.store.at_once)
            start = index * PAGE_TOKENS
            rows = slice(max(0, first - start), min(behind * PAGE_TOKENS, self.num_tokens) - start)
            pages = self.pages[index:behind]
            keys, values = self.store.layout.merged(self.store.read(pages), pages[0].layer)
            yield keys[:, rows], values[:, rows]
            self.store.used(pages)
            index = behind
