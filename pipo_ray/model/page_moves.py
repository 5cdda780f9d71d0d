"""KV pages on their way between RAM and the file: frames, places in the file, and what the loader is asked for."""

from __future__ import annotations

import errno
import os
from collections import deque

from pipo_ray.errors import DriveError, ResourceError
from pipo_ray.model.kv_page import LookAhead, Page, PageState
from pipo_ray.model.kv_page_copies import PageCopies
from pipo_ray.pipeline.page_table import MOVING, FrameState, PageTable
from pipo_ray.plan.kv_disk import KVDiskPlacement


class PageMoves:
    """Free frames and places in the file, and the pages that leave frames or come into them. What `ahead` claims stays
    in its frame when it has come, or has been saved.
    """

    def __init__(
        self, placement: KVDiskPlacement, table: PageTable, ahead: LookAhead, copies: PageCopies | None
    ) -> None:
        self._placement, self._table, self._ahead, self._copies = placement, table, ahead, copies
        self.loaded_pages = self.saved_pages = 0
        self.waited_s = 0.0
        self.free = deque(range(placement.ram_pages))
        self.free_stored = list(reversed(range(placement.disk_pages)))
        self.saving: deque[Page] = deque()
        self.to_save: deque[Page] = deque()  # full, but maybe not in RAM yet: on their way from a GPU
        self.leaving: list[tuple[int, int]] = []  # frames, and their places in the file, of pages given up meanwhile

    # -- to RAM
    # ----------------------------------------------------------------------------------------------------------

    def start_load(self, page: Page, frame: int) -> tuple[int, int]:
        """Returns what the table is to be asked for."""
        page.at, page.frame = PageState.LOADING, frame
        self._ahead.claimed[page] = 1
        self.loaded_pages += 1
        return frame, page.stored

    def load(self, page: Page) -> None:
        """Now: nobody has asked for it ahead."""
        self._table.post(FrameState.LOAD, [self.start_load(page, self.take_frame())])

    def wait_for(self, page: Page) -> None:
        """Until a page that is being loaded has come, or is lost."""
        self.waited_s += self._table.wait(page.frame)
        page.at = PageState.STAGED
        if self._table.state(page.frame) is FrameState.FAILED:
            self.lose(page, f"reading failed: {self._cause(page)}")

    # -- to the file
    # -----------------------------------------------------------------------------------------------------

    def save(self, page: Page) -> None:
        """The page, which is full, leaves RAM; it is lost where the file has no room."""
        while not self.free_stored and self.leaving:
            self.wait_for_one()
        if not self.free_stored:
            self.lose(page, f"the file has no room for more than {self._placement.disk_pages}; raise --kv-on-disk")
            return
        page.at, page.stored = PageState.SAVING, self.free_stored.pop()
        self.to_save.append(page)

    def post_saves(self, wait: bool = False) -> None:
        """Ask the loader for what is to be saved and in RAM by now; with `wait` for all of it."""
        saves: list[tuple[int, int]] = []
        owner: object = None
        while self.to_save and (wait or self.is_complete(self.to_save[0].frame)):
            page = self.to_save.popleft()
            if self._copies is not None:
                self._copies.complete(page.frame)
            self.saving.append(page)
            self.saved_pages += 1
            if page.owner is not owner:  # whose pages must not fail with these
                self._table.post(FrameState.SAVE, saves)
                saves, owner = [], page.owner
            saves.append((page.frame, page.stored))
        self._table.post(FrameState.SAVE, saves)

    def finish_save(self, page: Page) -> None:
        """The page stays in its frame, once the loader is done with it."""
        self.post_saves(wait=True)
        self.saving.remove(page)
        self._table.wait(page.frame)

    def is_complete(self, frame: int) -> bool:
        """Whether no copy on the GPU's side is under way."""
        return self._copies is None or self._copies.is_complete(frame)

    # -- frames
    # ----------------------------------------------------------------------------------------------------------

    def take_frame(self) -> int:
        """A frame; waits for a page that leaves, if need be."""
        self.collect()
        while not self.free:
            self.wait_for_one()
        frame = self.free.popleft()  # given back first: copies from it are over by now
        if self._copies is not None:
            self._copies.complete(frame)
        return frame

    def wait_for_one(self) -> None:
        """Until a page that leaves RAM has left it."""
        self.post_saves(wait=True)
        leaving = [page.frame for page in self.saving if page not in self._ahead.claimed]
        leaving += [frame for frame, _ in self.leaving]
        if not leaving:
            raise ResourceError(f"{self._placement.ram_pages} KV pages in RAM are too few; raise --memory")
        self.waited_s += self._table.wait(leaving[0])
        self.collect()

    def collect(self) -> None:
        """Take back the frames of all pages that have left."""
        staying: list[tuple[int, int]] = []
        for frame, stored in self.leaving:
            if self._table.state(frame) in MOVING:
                staying.append((frame, stored))
                continue
            self.free.append(frame)
            if stored >= 0:
                self.free_stored.append(stored)
        self.leaving = staying
        for page in [page for page in self.saving if self._table.state(page.frame) is not FrameState.SAVE]:
            self.saving.remove(page)
            page.at = PageState.STAGED
            if self._table.state(page.frame) is FrameState.FAILED:
                self.lose(page, f"writing failed: {self._cause(page)}")
            elif page not in self._ahead.claimed:
                self.free.append(page.frame)
                page.at, page.frame = PageState.STORED, -1

    # -- ends
    # ------------------------------------------------------------------------------------------------------------

    def lose(self, page: Page, why: str) -> None:
        """Its sequence has lost its cache. Its frame is free, its place in the file is not used again."""
        self._ahead.claimed.pop(page, None)
        self.free.append(page.frame)
        page.at, page.frame, page.stored = PageState.GONE, -1, -1
        if page.owner.failed is None:
            page.owner.failed = DriveError(f"KV pages of this request, in a file in {self._placement.folder}: {why}")

    def _cause(self, page: Page) -> str:
        number = self._table.error(page.frame)
        what = "they came back changed" if number == errno.EBADMSG else os.strerror(number)
        return f"{what}; check that the drive is connected, healthy and not full, or choose another with --kv-folder"

    def discard(self, page: Page) -> None:
        """The page is not needed any more; whatever is on its way may still be."""
        self._ahead.claimed.pop(page, None)
        if page.at is PageState.SAVING:
            (self.to_save if page in self.to_save else self.saving).remove(page)
        elif page.at is PageState.OPEN and self._copies is not None:
            self._copies.close(page.frame)
        if page.frame >= 0 and self._table.state(page.frame) in MOVING:
            self.leaving.append((page.frame, page.stored))
        else:
            if page.frame >= 0:
                self.free.append(page.frame)
            if page.stored >= 0:
                self.free_stored.append(page.stored)
        page.at, page.frame, page.stored = PageState.GONE, -1, -1
