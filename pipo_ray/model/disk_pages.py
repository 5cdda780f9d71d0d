"""Packed pages of one layer of a sequence, several to a page of RAM and drive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.packed_pages import PageRun
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout

if TYPE_CHECKING:
    from pipo_ray.model.disk_cache import DiskCache
    from pipo_ray.model.kv_disk import KVDisk


class DiskPages:
    """See `PackedPages`: those of `layout`, of one layer of `cache`."""

    def __init__(self, store: KVDisk, cache: DiskCache, layer: int, layout: PageLayout) -> None:
        self._store, self._cache, self._layer, self._layout = store, cache, layer, layout
        self._before = cache.start // PAGE_TOKENS
        self._per_page = store.placement.page_tokens(layer) // PAGE_TOKENS
        if self._per_page * layout.page_bytes > store.placement.page_bytes:
            raise UnsupportedModelError(
                f"layer {layer} caches pages of {layout.page_bytes} bytes, its model's facts say at most "
                f"{store.placement.page_bytes // self._per_page}"
            )

    def places(self, first: int, stop: int) -> Iterator[Tensor]:
        """See `PackedPages`. Raises KVPagesLostError."""
        self._store.enter(self._cache)
        self._cache.forget_unseen(self._layer)
        while first < stop:
            index, row = divmod(first - self._before, self._per_page)
            count = min(self._per_page - row, stop - first)
            yield self._packed(self._store.newest(self._cache, self._layer, index)[None])[row : row + count]
            first += count
        self._store.wrote()

    def parts(self, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """See `PackedPages`. Raises KVPagesLostError."""
        self._store.enter(self._cache)
        at = 0
        for cache, tokens in self._cache.prefix:
            count = tokens // PAGE_TOKENS
            yield from self._parts_of(cache, max(0, first - at), min(count, stop - at))
            at += count
        yield from self._parts_of(self._cache, max(0, first - at), stop - at)

    def _parts_of(self, cache: DiskCache, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """Of its own packed pages those from number `first` to before `stop`."""
        if first >= stop:
            return
        pages = cache.layers.get(self._layer, [])
        index, behind = first // self._per_page, -(-stop // self._per_page)
        while index < behind and first < stop:
            here, held, begin = [], index, index * self._per_page
            for some in self._store.read_some(pages[index:behind]):
                packed = self._packed(some)
                here.append(packed[max(0, first - begin) : stop - begin])
                index, begin = index + len(some), begin + len(packed)
            yield here
            self._store.used(pages[held:index])

    def memories(self, stop: int) -> Sequence[tuple[Tensor, int]] | None:
        """See `PackedPages`."""
        return None

    def runs(self, stop: int) -> Sequence[PageRun] | None:
        """See `PackedPages`: they move."""
        return None

    @property
    def nbytes(self) -> int:
        """See `PackedPages`: all are the sequence's."""
        return 0

    def _packed(self, pages: Tensor) -> Tensor:
        """The packed pages in pages, uint8 [number, page_bytes]: a copy, unless it is one, or they have no gap."""
        nbytes = self._layout.page_bytes
        return pages[:, : self._per_page * nbytes].reshape(-1, nbytes)
