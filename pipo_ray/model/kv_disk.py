"""KV pages in two tiers: RAM, and a file on the drive that the loader writes and reads.

A page has so many bytes in every layer; what they are is its layer's matter: keys and values (`disk_cache.py`), or
packed pages of few bits (`disk_pages.py`). `plan/kv_disk.py` says how many stay in RAM. A page that is full and does
not stay is handed to the loader ("KV save"), and its frame is free once that is done. Ahead of its layer it is read
into another frame ("KV load"), as many at a time as the plan has room for. Attention takes a sequence page by page,
wherever the pages are: so what comes out does not depend on it, to the last bit.

    OPEN --full--> KEPT                         the newest page; one that stays: in a frame only
      |----full--> SAVING --done--> STORED      in a frame and the file, then in the file only
                                      | ahead of its layer
                                   LOADING --done--> STAGED --used--> STORED, or KEPT where there is room by now

What a sequence has in common with others it reads in their pages, also of one that has ended: that has no page that is
written any more, and its pages leave RAM before those that a sequence still sees in every sweep.

A page that cannot be written or read costs its sequence the cache, and those that stand on it, and nobody else
anything: `KVPagesLostError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from pipo_ray.errors import ResourceError
from pipo_ray.model.disk_cache import DiskCache, Prefix
from pipo_ray.model.kv_page import LookAhead, Page, PageState
from pipo_ray.model.kv_page_copies import PageCopies
from pipo_ray.model.kv_page_layout import PageLayout
from pipo_ray.model.page_moves import PageMoves
from pipo_ray.pipeline.device_ops import DeviceOps
from pipo_ray.pipeline.page_table import MOVING, FrameState, PageTable
from pipo_ray.pipeline.slots import U8
from pipo_ray.plan.kv_disk import GROUP_PAGES, PASSING_PAGES, RUN_BYTES, KVDiskPlacement, kept_pages


class KVPagesLostError(Exception):
    """Pages of at least one sequence (`DiskCache.lost`) cannot be written or read. The others' are as they were before
    the sweep.
    """


class KVDisk:
    """Both tiers of a stage and the page tables of its sequences. All of it belongs to the thread that computes.

    `memory` is uint8 [ram_pages, page_bytes], shared with the loader, which does what `table` asks for. With `ops` a
    GPU computes, which has copies of pages in RAM (`kv_page_copies.py`). Where sequences are `shared`, another one may
    see what a sliding window has left behind: it is not given up.
    """

    def __init__(
        self,
        placement: KVDiskPlacement,
        memory: U8,
        table: PageTable,
        dtype: torch.dtype,
        ops: DeviceOps | None = None,
        *,
        shared: bool = True,
    ) -> None:
        self.placement, self._table, self._shared = placement, table, shared
        ram = torch.from_numpy(memory)
        self._frames = ram
        self._copies = None
        if ops is not None:
            newest = placement.gpu_pages - PASSING_PAGES
            self._copies = PageCopies(ram, ops, newest, GROUP_PAGES)
        self.at_once = 1 if ops is None else GROUP_PAGES
        # Frames that are attended to are frames into which nothing is read.
        self._most_together = max(1, min(RUN_BYTES // placement.page_bytes, placement.ahead_pages // 2))
        self._ahead = LookAhead()
        self.moves = PageMoves(placement, table, self._ahead, self._copies)
        self._live: list[DiskCache] = []
        self._room = (0,) * placement.num_layers  # pages that may stay, and those that do
        self._kept = [0] * placement.num_layers
        self._idle: dict[int, Iterator[Page]] = {}
        self._batch: Sequence[DiskCache] = ()
        self._sweep = 0  # the number of the one that is computed, or comes next
        self.layout = PageLayout(placement.page_bytes, dtype)
        self.windows: dict[int, int | None] = {}
        """By layer, as they attend: what a token sees."""
        table.restart()

    # -- sequences
    # -------------------------------------------------------------------------------------------------------

    def open(self, capacity: int, prefix: Prefix = ()) -> DiskCache:
        """A new sequence's cache, of at most `capacity` tokens behind those of `prefix`. Raises ResourceError for more
        sequences than there are pages in RAM for.
        """
        cache = DiskCache(self, capacity, prefix)
        self._check_growing([*self._live, cache])
        self._live.append(cache)
        return cache

    def _check_growing(self, caches: Sequence[DiskCache]) -> None:
        if (growing := _num_growing(caches)) > self.placement.max_sequences:
            raise ResourceError(
                f"{growing} sequences at the same time, but RAM has KV pages for "
                f"{self.placement.max_sequences}; lower the number of requests"
            )

    def resize(self, cache: DiskCache, held: Mapping[int, int], *, grows: bool) -> None:
        """Let the sequence have no more than so many tokens in pages of each layer, and go on if it `grows`; else it
        has ended, and no page of it will be written any more.
        """
        cache.grows = grows
        self._check_growing(self._live)
        self._set_room()
        for layer, pages in cache.layers.items():
            num_pages = -(-held[layer] // self.placement.page_tokens(layer))
            for page in pages[num_pages:]:
                self._discard(page)
            del pages[num_pages:]
            if not grows and pages and pages[-1].at is PageState.OPEN:
                self._settle(pages[-1], wanted=False)

    def drop(self, cache: DiskCache) -> None:
        """Give the sequence's pages back."""
        self._live.remove(cache)
        for pages in cache.layers.values():
            for page in pages:
                self._discard(page)
        cache.layers.clear()

    # -- a sweep
    # ---------------------------------------------------------------------------------------------------------

    def begin_sweep(self, batch: Sequence[DiskCache]) -> None:
        """A sweep adds tokens to each of these caches. Raises KVPagesLostError if one of them is lost."""
        self.moves.collect()
        self._raise_if_lost(batch)
        self._batch = batch
        self._sweep += 1  # also where the one before was given up
        self._make_room()
        self.moves.post_saves()
        self._ahead.restart(iter(()))
        for layer in {page.layer for page in self._ahead.claimed}:
            seen = {page for cache in batch for page in cache.seen(layer)}
            for page in [page for page in self._ahead.claimed if page.layer == layer and page not in seen]:
                self._give_back(page, wanted=False)
        self._look_ahead()

    def end_sweep(self) -> None:
        """All layers have attended: the first pages of the next sweep are read, which will most likely be for the same
        sequences.
        """
        self._sweep += 1
        self._look_ahead()

    def enter(self, cache: DiskCache) -> None:
        """The sequence's pages are about to be read or written. Raises KVPagesLostError if they are lost."""
        self._raise_if_lost([cache])
        self.moves.post_saves()

    def read(self, pages: Sequence[Page]) -> Tensor:
        """`at_once` pages or fewer, uint8 [pages, page_bytes]; waits for them. They are valid until `used`."""
        if self._copies is None:
            (page,) = pages
            self._bring(page)
            return self._frames[page.frame][None]
        here: list[Page] = []
        for row, page in enumerate(pages):
            if here and not self._is_here(page):
                self._into_group(self._copies, row, here)
            self._bring(page)
            here.append(page)
        self._into_group(self._copies, len(pages), here)
        return self._copies.group(len(pages))

    def read_some(self, pages: Sequence[Page]) -> list[Tensor]:
        """As many of the first of `pages` as are worth a call and cost no further wait, uint8 [n, page_bytes] each;
        they are valid until `used`.
        """
        if self._copies is not None:
            return [self.read(pages[: self.at_once])]
        here = [self.read(pages[:1])]
        for page in pages[1 : self._most_together]:
            if not self._is_here(page):
                break
            here.append(self.read([page]))
        return here

    def _into_group(self, copies: PageCopies, stop: int, here: list[Page]) -> None:
        """These pages are copied to the group's rows before `stop`. Their frames are needed for that alone: so RAM need
        not hold a group at once.
        """
        copies.into_group(stop - len(here), [page.frame for page in here])
        for page in here:
            self._give_back(page)
        here.clear()
        self.moves.post_saves()
        self._claim()

    def _is_here(self, page: Page) -> bool:
        """Whether nobody would have to wait for it."""
        if page.at is PageState.LOADING:
            return self._table.state(page.frame) not in MOVING
        return page.at is not PageState.STORED

    def _bring(self, page: Page) -> None:
        """The page is in RAM."""
        self._raise_if_lost([page.owner])
        page.read_in, page.reads = self._sweep, page.reads_in(self._sweep) + 1
        if page.at is PageState.STORED:
            self.moves.load(page)
        if page.at is PageState.LOADING:
            self.moves.wait_for(page)
            self._raise_if_lost([page.owner])

    def used(self, pages: Sequence[Page]) -> None:
        """What was read has been computed with, or will be before anything that is computed from here on."""
        if self._copies is not None:
            self._copies.passed()
        else:
            for page in pages:
                self._give_back(page)
            self._claim()

    def _give_back(self, page: Page, *, wanted: bool = True) -> None:
        """The page in RAM has been used, and is `wanted` in the next sweep, too; or will not be."""
        if not self._ahead.used(page):
            return
        if page.owner.failed is not None:
            return  # it is dropped soon, with whatever it has
        if page.at is PageState.STAGED:
            if self._keep(page, wanted=wanted):
                self.moves.free_stored.append(page.stored)
                page.stored = -1
            else:
                self.moves.free.append(page.frame)
                page.at, page.frame = PageState.STORED, -1
        elif page.at is PageState.LOADING:
            self.moves.leaving.append((page.frame, -1))
            page.at, page.frame = PageState.STORED, -1

    # -- what stays
    # ------------------------------------------------------------------------------------------------------

    def _set_room(self) -> None:
        """For a page of each layer of everybody who goes on, and those on their way; the rest may stay."""
        self._room = kept_pages(self.placement, _num_growing(self._live))
        self._idle.clear()

    def _make_room(self) -> None:
        """What stays beyond the room that there is is handed over: first what nobody sees."""
        self._set_room()
        for layer, room in enumerate(self._room):
            if self._kept[layer] <= room:
                continue
            latest = (page for cache in reversed(self._live) for page in reversed(cache.layers.get(layer, ())))
            for page in chain(self._idle_pages(layer), latest):
                if self._kept[layer] <= room:
                    break
                if page.at is PageState.KEPT:
                    self._hand_over(page)

    def _idle_pages(self, layer: int) -> Iterator[Page]:
        """Those that stay, and that nobody who goes on will see."""
        seen = {page for cache in self._live if cache.grows for page in cache.seen(layer)}
        for cache in self._live:
            for page in reversed(cache.unseen(layer) if cache.grows else cache.layers.get(layer, ())):
                if page.at is PageState.KEPT and page not in seen:
                    yield page

    def _hand_over(self, page: Page) -> None:
        """The page, which stayed, does so no more."""
        self._kept[page.layer] -= 1
        self.moves.save(page)

    def _keep(self, page: Page, *, wanted: bool) -> bool:
        """Whether the page, which is full and in RAM, stays there; for one that is `wanted` another goes, that nobody
        sees.
        """
        layer = page.layer
        if wanted and self._kept[layer] >= self._room[layer] and self.moves.free_stored:
            idle = next(self._idle.setdefault(layer, self._idle_pages(layer)), None)
            if idle is not None:
                self._hand_over(idle)
        if self._kept[layer] >= self._room[layer]:
            return False
        self._kept[layer] += 1
        page.at = PageState.KEPT
        return True

    def newest(self, cache: DiskCache, layer: int, index: int) -> Tensor:
        """Page number `index` of a layer, uint8 [page_bytes], to be written: the newest, or the next, which becomes it;
        the one before is full by then. To be followed by `wrote`.
        """
        pages = cache.layers.setdefault(layer, [])
        if index == len(pages):
            if pages and pages[-1].at is PageState.OPEN:
                self._settle(pages[-1])
            pages.append(Page(cache, layer, index, self.moves.take_frame()))
            if self._copies is not None:
                self._copies.open(pages[-1].frame)
        elif pages[index].at is not PageState.OPEN:  # its sequence had ended
            self._reopen(pages[index])
        frame = pages[index].frame
        return self._frames[frame] if self._copies is None else self._copies.written(frame)

    def wrote(self) -> None:
        """What `newest` gave was written."""
        self.moves.post_saves()

    def forget(self, pages: Sequence[Page]) -> None:
        """No token of their sequence will see them any more."""
        for page in pages if not self._shared else ():
            if page.at not in (PageState.GONE, PageState.OPEN):  # which is written to
                self._discard(page)

    def _settle(self, page: Page, *, wanted: bool = True) -> None:
        """The page is full, or its sequence has ended."""
        if self._copies is not None:
            self._copies.settle(page.frame)
        if not self._keep(page, wanted=wanted):
            self.moves.save(page)

    def return_to(self, cache: DiskCache, layer: int, num_pages: int, *, last_is_full: bool) -> None:
        """Undo what a sweep that failed has appended: there are so many pages, and the last is the newest again, unless
        it is full.
        """
        pages = cache.layers.setdefault(layer, [])
        for page in pages[num_pages:]:
            self._discard(page)
        del pages[num_pages:]
        if not last_is_full and pages and pages[-1].at is not PageState.OPEN:
            self._reopen(pages[-1])

    def _reopen(self, page: Page) -> None:
        """The page is written to again."""
        if page.at is PageState.SAVING:
            self.moves.finish_save(page)
        elif page.at is PageState.KEPT:
            self._kept[page.layer] -= 1
        self._bring(page)
        if self._copies is not None:
            self._copies.reopen(page.frame)
        self._ahead.claimed.pop(page, None)
        if page.stored >= 0:
            self.moves.free_stored.append(page.stored)
        page.at, page.stored = PageState.OPEN, -1

    def _discard(self, page: Page) -> None:
        """The page is not needed any more."""
        if page.at is PageState.KEPT:
            self._kept[page.layer] -= 1
        self.moves.discard(page)

    # -- ahead
    # -----------------------------------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        self._ahead.restart(self._order())
        self._claim()

    def _order(self) -> Iterator[tuple[Page, int]]:
        """The settled pages of the batch as a sweep will read them, and how often it reads each before."""
        for layer in range(self.placement.num_layers):
            reads = Counter[Page]()
            for cache in self._batch:
                for page in cache.seen(layer):
                    yield page, reads[page]
                    reads[page] += 1

    def _claim(self) -> None:
        """Have as many pages as may be on their way, as far as frames are free: several at a time, which the loader
        reads at once if they are neighbours in the file.
        """
        ahead, most, free = self._ahead, self.placement.ahead_pages, self.moves.free
        # Whole transfers, but not one that has to wait until all others are over and used.
        most -= (most - len(ahead.claimed)) % min(self.placement.run_pages, max(1, most // 4))
        loads: list[tuple[int, int]] = []
        owner: DiskCache | None = None
        while (coming := ahead.next or next(ahead.coming, None)) is not None:
            ahead.next = None
            page, reads = coming
            if page.reads_in(self._sweep) > reads:
                continue  # it was read before this sweep began, and has been used in it meanwhile
            if page in ahead.claimed:  # others use it, too
                ahead.claimed[page] += 1
                continue
            if page.at not in (PageState.STORED, PageState.SAVING) or page.owner.failed is not None:
                continue
            if len(ahead.claimed) >= most:
                ahead.next = coming
                break
            if page.at is PageState.SAVING:
                ahead.claimed[page] = 1
                continue
            if not free:
                self.moves.collect()
            if not free or not self.moves.is_complete(free[0]):
                ahead.next = coming
                break
            if page.owner is not owner:  # whose pages must not fail with these
                self._table.post(FrameState.LOAD, loads)
                loads, owner = [], page.owner
            loads.append(self.moves.start_load(page, free.popleft()))
        self._table.post(FrameState.LOAD, loads)

    def _raise_if_lost(self, caches: Sequence[DiskCache]) -> None:
        if any(cache.lost is not None for cache in caches):
            raise KVPagesLostError

    # -- books
    # -----------------------------------------------------------------------------------------------------------

    @property
    def loaded_pages(self) -> int:
        """Pages that were read from the file."""
        return self.moves.loaded_pages

    @property
    def saved_pages(self) -> int:
        """Pages that were written to the file."""
        return self.moves.saved_pages

    @property
    def waited_s(self) -> float:
        """Seconds without a page that was needed."""
        return self.moves.waited_s


def _num_growing(caches: Sequence[DiskCache]) -> int:
    return sum(cache.grows for cache in caches)
