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

A page that cannot be written or read costs its sequence the cache, and nobody else anything: `KVPagesLostError`.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipo_ray.errors import DriveError, ResourceError
from pipo_ray.model.disk_cache import DiskCache
from pipo_ray.model.kv_page import LookAhead, Page, PageState
from pipo_ray.model.kv_page_copies import PageCopies
from pipo_ray.model.kv_page_layout import PageLayout
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
    GPU computes, which has copies of pages in RAM (`kv_page_copies.py`).
    """

    def __init__(
        self,
        placement: KVDiskPlacement,
        memory: U8,
        table: PageTable,
        dtype: torch.dtype,
        ops: DeviceOps | None = None,
    ) -> None:
        self.placement, self._table = placement, table
        self.loaded_pages = self.saved_pages = 0
        self.waited_s = 0.0
        ram = torch.from_numpy(memory)
        self._frames = ram
        self._copies = None
        if ops is not None:
            newest = placement.gpu_pages - PASSING_PAGES
            self._copies = PageCopies(ram, ops, newest, GROUP_PAGES)
        self.at_once = 1 if ops is None else GROUP_PAGES
        # Frames that are attended to are frames into which nothing is read.
        self._most_together = max(1, min(RUN_BYTES // placement.page_bytes, placement.ahead_pages // 2))
        self._free = deque(range(placement.ram_pages))
        self._free_stored = list(reversed(range(placement.disk_pages)))
        self._saving: deque[Page] = deque()
        self._to_save: deque[Page] = deque()  # full, but maybe not in RAM yet: on their way from a GPU
        self._leaving: list[tuple[int, int]] = []  # frames, and their places in the file, of pages given up meanwhile
        self._live: list[DiskCache] = []
        self._room = (0,) * placement.num_layers  # pages that may stay, and those that do
        self._kept = [0] * placement.num_layers
        self._batch: Sequence[DiskCache] = ()
        self._ahead = LookAhead()
        self._sweep = 0  # the number of the one that is computed, or comes next
        self.layout = PageLayout(placement.page_bytes, dtype)
        table.restart()

    # -- sequences
    # -------------------------------------------------------------------------------------------------------

    def open(self, capacity: int) -> DiskCache:
        """A new sequence's cache. Raises ResourceError for more sequences than there are pages in RAM for."""
        if len(self._live) >= self.placement.max_sequences:
            raise ResourceError(
                f"{len(self._live) + 1} sequences at the same time, but RAM has KV pages for "
                f"{self.placement.max_sequences}; lower the number of requests"
            )
        cache = DiskCache(self, capacity)
        self._live.append(cache)
        return cache

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
        self._collect()
        self._raise_if_lost(batch)
        self._batch = batch
        self._sweep += 1  # also where the one before was given up
        self._make_room()
        self.post_saves()
        self._ahead.coming, self._ahead.next = iter(()), None
        for page in [page for page in self._ahead.claimed if page.owner not in batch]:
            self.release(page)
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
        self.post_saves()

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
        self.post_saves()
        self._claim()

    def _is_here(self, page: Page) -> bool:
        """Whether nobody would have to wait for it."""
        if page.at is PageState.LOADING:
            return self._table.state(page.frame) not in MOVING
        return page.at is not PageState.STORED

    def _bring(self, page: Page) -> None:
        """The page is in RAM."""
        self._raise_if_lost([page.owner])
        page.read_in = self._sweep
        if page.at is PageState.STORED:
            self._table.post(FrameState.LOAD, [self._start_load(page, self._take_frame())])
        if page.at is PageState.LOADING:
            self.waited_s += self._table.wait(page.frame)
            self._arrived(page)
            self._raise_if_lost([page.owner])

    def used(self, pages: Sequence[Page]) -> None:
        """What was read has been computed with, or will be before anything that is computed from here on."""
        if self._copies is not None:
            self._copies.passed()
        else:
            for page in pages:
                self._give_back(page)
            self._claim()

    def release(self, page: Page) -> None:
        """The page in RAM has been used, or will not be."""
        self._give_back(page)
        self._claim()

    def _give_back(self, page: Page) -> None:
        self._ahead.claimed.pop(page, None)
        if page.owner.lost is not None:
            return  # it is dropped soon, with whatever it has
        if page.at is PageState.STAGED:
            if self._keep(page):
                self._free_stored.append(page.stored)
                page.stored = -1
            else:
                self._free.append(page.frame)
                page.at, page.frame = PageState.STORED, -1
        elif page.at is PageState.LOADING:
            self._leaving.append((page.frame, -1))
            page.at, page.frame = PageState.STORED, -1

    # -- what stays
    # ------------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """For a page of each layer of everybody, and those on their way: what stays beyond it is handed over."""
        self._room = kept_pages(self.placement, len(self._live))
        for layer, room in enumerate(self._room):
            for cache in reversed(self._live):
                for page in reversed(cache.layers.get(layer, ())):
                    if self._kept[layer] <= room:
                        break
                    if page.at is PageState.KEPT:
                        self._kept[layer] -= 1
                        self._save(page)

    def _keep(self, page: Page) -> bool:
        """Whether the page, which is full and in RAM, stays there."""
        if self._kept[page.layer] >= self._room[page.layer]:
            return False
        self._kept[page.layer] += 1
        page.at = PageState.KEPT
        return True

    def newest(self, cache: DiskCache, layer: int, index: int) -> Tensor:
        """Page number `index` of a layer, uint8 [page_bytes], to be written: the newest, or the next, which becomes it;
        the one before is full by then. To be followed by `post_saves`.
        """
        pages = cache.layers.setdefault(layer, [])
        if index == len(pages):
            if pages:
                self._settle(pages[-1])
            pages.append(Page(cache, layer, index, self._take_frame()))
            if self._copies is not None:
                self._copies.open(pages[-1].frame)
        frame = pages[index].frame
        return self._frames[frame] if self._copies is None else self._copies.written(frame)

    def forget(self, cache: DiskCache, layer: int, stop: int) -> None:
        """No token will see the pages before number `stop` any more."""
        pages = cache.layers.get(layer, [])
        for page in pages[: min(stop, len(pages) - 1)]:  # the newest is written to
            if page.at is not PageState.GONE:
                self._discard(page)

    def _settle(self, page: Page) -> None:
        """The page is full, and a newer one begins."""
        if self._copies is not None:
            self._copies.settle(page.frame)
        if not self._keep(page):
            self._save(page)

    def return_to(self, cache: DiskCache, layer: int, num_pages: int) -> None:
        """Undo what a sweep that failed has appended: there are so many pages, and the last is the newest again."""
        pages = cache.layers.setdefault(layer, [])
        for page in pages[num_pages:]:
            self._discard(page)
        del pages[num_pages:]
        if not pages or pages[-1].at is PageState.OPEN:
            return
        page = pages[-1]
        if page.at is PageState.SAVING:
            self.post_saves(wait=True)
            self._saving.remove(page)
            self._table.wait(page.frame)
        elif page.at is PageState.KEPT:
            self._kept[page.layer] -= 1
        self._bring(page)
        if self._copies is not None:
            self._copies.reopen(page.frame)
        self._ahead.claimed.pop(page, None)
        if page.stored >= 0:
            self._free_stored.append(page.stored)
        page.at, page.stored = PageState.OPEN, -1

    # -- ahead
    # -----------------------------------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        self._ahead.coming, self._ahead.next = self._order(), None
        self._claim()

    def _order(self) -> Iterator[Page]:
        """The settled pages of the batch as a sweep will read them."""
        for layer in range(self.placement.num_layers):
            for cache in self._batch:
                yield from cache.seen(layer)

    def _claim(self) -> None:
        """Have as many pages as may be on their way, as far as frames are free: several at a time, which the loader
        reads at once if they are neighbours in the file.
        """
        ahead, most = self._ahead, self.placement.ahead_pages
        # Whole transfers, but not one that has to wait until all others are over and used.
        most -= (most - len(ahead.claimed)) % min(self.placement.run_pages, max(1, most // 4))
        if len(ahead.claimed) >= most:
            return
        loads: list[tuple[int, int]] = []
        owner: DiskCache | None = None
        while len(ahead.claimed) < most:
            page = ahead.next or next(ahead.coming, None)
            ahead.next = None
            if page is None:
                break
            if page.read_in == self._sweep:
                continue  # it was read before this sweep began, and has been used in it meanwhile
            if page.at is PageState.STORED and page.owner.lost is None:
                if not self._free:
                    self._collect()
                if not self._free or not self._is_complete(self._free[0]):
                    ahead.next = page
                    break
                if page.owner is not owner:  # whose pages must not fail with these
                    self._table.post(FrameState.LOAD, loads)
                    loads, owner = [], page.owner
                loads.append(self._start_load(page, self._free.popleft()))
            elif page.at is PageState.SAVING:
                ahead.claimed[page] = None
        self._table.post(FrameState.LOAD, loads)

    # -- moving
    # ----------------------------------------------------------------------------------------------------------

    def _start_load(self, page: Page, frame: int) -> tuple[int, int]:
        """Returns what the table is to be asked for."""
        page.at, page.frame = PageState.LOADING, frame
        self._ahead.claimed[page] = None
        self.loaded_pages += 1
        return frame, page.stored

    def _save(self, page: Page) -> None:
        while not self._free_stored and self._leaving:
            self._wait_for_one()
        if not self._free_stored:
            self._lose(page, f"the file has no room for more than {self.placement.disk_pages}; raise --kv-on-disk")
            return
        page.at, page.stored = PageState.SAVING, self._free_stored.pop()
        self._to_save.append(page)

    def post_saves(self, wait: bool = False) -> None:
        """Ask the loader for what is to be saved and in RAM by now; with `wait` for all of it."""
        saves: list[tuple[int, int]] = []
        owner: DiskCache | None = None
        while self._to_save and (wait or self._is_complete(self._to_save[0].frame)):
            page = self._to_save.popleft()
            if self._copies is not None:
                self._copies.complete(page.frame)
            self._saving.append(page)
            self.saved_pages += 1
            if page.owner is not owner:
                self._table.post(FrameState.SAVE, saves)
                saves, owner = [], page.owner
            saves.append((page.frame, page.stored))
        self._table.post(FrameState.SAVE, saves)

    def _is_complete(self, frame: int) -> bool:
        """Whether no copy on the GPU's side is under way."""
        return self._copies is None or self._copies.is_complete(frame)

    def _arrived(self, page: Page) -> None:
        page.at = PageState.STAGED
        if self._table.state(page.frame) is FrameState.FAILED:
            self._lose(page, f"reading failed: {self._cause(page)}")

    def _take_frame(self) -> int:
        self._collect()
        while not self._free:
            self._wait_for_one()
        return self._take_free()

    def _take_free(self) -> int:
        """The frame that was given back first: copies from it are over by now."""
        frame = self._free.popleft()
        if self._copies is not None:
            self._copies.complete(frame)
        return frame

    def _wait_for_one(self) -> None:
        """Until a page that leaves RAM has left it."""
        self.post_saves(wait=True)
        leaving = [page.frame for page in self._saving if page not in self._ahead.claimed]
        leaving += [frame for frame, _ in self._leaving]
        if not leaving:
            raise ResourceError(f"{self.placement.ram_pages} KV pages in RAM are too few; raise --memory")
        self.waited_s += self._table.wait(leaving[0])
        self._collect()

    def _collect(self) -> None:
        """Take back the frames of all pages that have left."""
        staying: list[tuple[int, int]] = []
        for frame, stored in self._leaving:
            if self._table.state(frame) in MOVING:
                staying.append((frame, stored))
                continue
            self._free.append(frame)
            if stored >= 0:
                self._free_stored.append(stored)
        self._leaving = staying
        for page in [page for page in self._saving if self._table.state(page.frame) is not FrameState.SAVE]:
            self._saving.remove(page)
            page.at = PageState.STAGED
            if self._table.state(page.frame) is FrameState.FAILED:
                self._lose(page, f"writing failed: {self._cause(page)}")
            elif page not in self._ahead.claimed:
                self._free.append(page.frame)
                page.at, page.frame = PageState.STORED, -1

    def _lose(self, page: Page, why: str) -> None:
        """Its sequence has lost its cache. Its frame is free, its place in the file is not used again."""
        self._ahead.claimed.pop(page, None)
        self._free.append(page.frame)
        page.at, page.frame, page.stored = PageState.GONE, -1, -1
        if page.owner.lost is None:
            page.owner.lost = DriveError(f"KV pages of this request, in a file in {self.placement.folder}: {why}")

    def _cause(self, page: Page) -> str:
        number = self._table.error(page.frame)
        what = "they came back changed" if number == errno.EBADMSG else os.strerror(number)
        return f"{what}; check that the drive is connected, healthy and not full, or choose another with --kv-folder"

    def _raise_if_lost(self, caches: Sequence[DiskCache]) -> None:
        if any(cache.lost is not None for cache in caches):
            raise KVPagesLostError

    def _discard(self, page: Page) -> None:
        """The page is not needed any more; whatever is on its way may still be."""
        self._ahead.claimed.pop(page, None)
        if page.at is PageState.SAVING:
            (self._to_save if page in self._to_save else self._saving).remove(page)
        elif page.at is PageState.KEPT:
            self._kept[page.layer] -= 1
        elif page.at is PageState.OPEN and self._copies is not None:
            self._copies.close(page.frame)
        if page.frame >= 0 and self._table.state(page.frame) in MOVING:
            self._leaving.append((page.frame, page.stored))
        else:
            if page.frame >= 0:
                self._free.append(page.frame)
            if page.stored >= 0:
                self._free_stored.append(page.stored)
        page.at, page.frame, page.stored = PageState.GONE, -1, -1
