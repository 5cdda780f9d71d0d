"""Sequences whose pages are in little RAM and in a file, and the same with room for all of them in RAM."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from kv_sweeps import segments_of
from pipeline.page_loader import Pages
from prefix_twins import TwinCaches

from pipo_ray.model.disk_cache import DiskCache
from pipo_ray.model.kv_cache import RaggedCache
from pipo_ray.model.kv_disk import KVDisk, KVPagesLostError
from pipo_ray.model.kv_page import Page, PageState
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.pipeline.page_table import _NO_FRAME
from pipo_ray.plan.disk_pages import PAGE_TOKENS
from pipo_ray.plan.kv_disk import PASSING_PAGES, KVDiskPlacement, pages_of
from pipo_ray.session.kv_file import KVFile

HEADS, KV_HEADS, DIM, LAYERS = 2, 1, 8, 3
STAGING = 6


class Twins(TwinCaches):
    """Each layer of a sweep has random queries, keys and values, and each result of the one must be the other's."""

    def __init__(self, disk: KVDisk, ram: KVDisk, device: FakeDevice | None, window: int | None, seed: int) -> None:
        super().__init__()
        self.disk, self.ram, self.device = disk, ram, device
        self.window, self.generator = window, torch.Generator().manual_seed(seed)

    def make(self, capacity: int, line: list[tuple[int, int]]) -> tuple[DiskCache, DiskCache]:
        return self.disk.open(capacity, self.caches(line, 0)), self.ram.open(capacity, self.caches(line, 1))

    def has_room(self, capacity: int, instead_of: int | None = None) -> bool:
        """By the books: pages for all that a sequence can become, and a place among those that run."""
        others = [mine for name, (mine, _) in self.pairs.items() if name != instead_of]
        pages = sum(pages_of(cache.capacity) for cache in others) + pages_of(capacity)
        running = sum(cache.grows for cache in others) + 1
        placement = self.disk.placement
        return pages * PAGE_TOKENS <= placement.kv_tokens and running <= placement.max_sequences

    def sweep(self, batch: list[tuple[int, int]], layers: int | None = None) -> None:
        """So many tokens to each; a sweep of fewer `layers` is one that was given up."""
        total = sum(count for _, count in batch)
        rows = [
            RaggedCache(segments_of([(self.pairs[name][which], count) for name, count in batch]), store)
            for which, store in enumerate((self.disk, self.ram))
        ]
        for row in rows:
            row.begin_sweep()
        for layer in range(layers or LAYERS):
            rule = AttentionRule(0.3, self.window if layer % 2 else None)
            query, keys, values = (
                torch.randn(heads, total, DIM, generator=self.generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            for mine, theirs in zip(rows[0].segments, rows[1].segments, strict=True):
                own = [tensor[:, mine.start : mine.stop] for tensor in (query, keys, values)]
                with nullcontext() if self.device is None else self.device.watching():
                    got = mine.cache.attend(layer, *own, rule).clone()
                assert torch.equal(got, theirs.cache.attend(layer, *own, rule))
        if layers is None:
            for row in rows:
                row.advance()

    def stored(self) -> int:
        """Pages that are in the file, or on their way there."""
        return self.disk.placement.disk_pages - len(self.disk.moves.free_stored)

    def check_books(self) -> None:
        """Nothing stays that the books have no room for: of those that have ended no page is written."""
        for mine, _ in self.pairs.values():
            assert mine.lost is None
            for pages in mine.layers.values():
                assert not pages or mine.grows or pages[-1].at is not PageState.OPEN
        assert all(kept <= room for kept, room in zip(self.disk._kept, self.disk._room, strict=True))

    def check_empty(self) -> None:
        """With nobody there all frames and all of the file are free, once everything has ended."""
        moves = self.disk.moves
        while moves.to_save or moves.saving or moves.leaving:
            moves.wait_for_one()
        assert sorted(moves.free) == list(range(self.disk.placement.ram_pages))
        assert sorted(moves.free_stored) == list(range(self.disk.placement.disk_pages))
        assert not self.disk._ahead.claimed
        assert self.disk._kept == [0] * LAYERS
        if self.disk._copies is not None:
            assert not self.disk._copies._written


@contextmanager
def stores(
    ram_pages: int, disk_pages: int, dtype: torch.dtype = torch.float32, device: FakeDevice | None = None,
    *, newest: int = 4, shared: bool = True, page_bytes: int | None = None, tokens: tuple[int, ...] = (),
) -> Iterator[tuple[KVDisk, KVDisk]]:  # fmt: skip
    """One of so many pages of RAM and file, and one with room for all in RAM; where a GPU computes, with places there
    for the newest pages of so many sequences. Pages are of LAYERS at 16 bits, or of so many `tokens` of each layer.
    """
    layers = len(tokens) or LAYERS
    nbytes = page_bytes or PAGE_TOKENS * KV_HEADS * 2 * DIM * dtype.itemsize
    assert nbytes % 4096 == 0
    with tempfile.TemporaryDirectory() as folder:
        file = KVFile(folder, disk_pages * nbytes)
        pages = Pages.create(Path(folder), file, ram_pages, disk_pages, nbytes)
        stop, table, frames = pages.open()
        server = pages.serve(table, frames)
        gpu_pages = 0 if device is None else PASSING_PAGES + newest * layers
        options: dict[str, Any] = {"gpu_pages": gpu_pages, "tokens": tokens}
        placement = KVDiskPlacement(layers, nbytes, ram_pages, STAGING, disk_pages, folder, **options)
        # A GPU attends to other parts at once: with the same ones.
        plenty = KVDiskPlacement(layers, nbytes, 400, STAGING, 1, folder, **options)
        other_device = None if device is None else FakeDevice(eager=1.0)
        (Path(folder) / "other").mkdir()
        others = Pages.create(Path(folder) / "other", file, 400, 1, nbytes).open()
        others[1]._words64[2] = 1  # nobody serves this one, and nobody needs to
        try:
            disk = KVDisk(placement, frames, table, dtype, device, shared=shared)
            yield disk, KVDisk(plenty, others[2], others[1], dtype, other_device, shared=shared)
        finally:
            stop[0] = 1
            table._post([_NO_FRAME])  # whoever sleeps looks up
            server.stop()
            file.close()


@contextmanager
def twins(
    ram_pages: int, disk_pages: int, *, device: FakeDevice | None = None, window: int | None = None, seed: int = 0
) -> Iterator[Twins]:
    """In so many pages of RAM and file; where a GPU computes, on that."""
    with stores(ram_pages, disk_pages, device=device) as (disk, ram):
        yield Twins(disk, ram, device, window, seed)


def watch_late_pages(monkeypatch: pytest.MonkeyPatch) -> list[Page]:
    """From here on, pages that are asked for when they are needed, and not ahead."""
    late: list[Page] = []
    real = KVDisk._bring

    def bring(self: KVDisk, page: Page) -> None:
        if page.at is PageState.STORED:
            late.append(page)
        real(self, page)

    monkeypatch.setattr(KVDisk, "_bring", bring)
    return late


@contextmanager
def pages_that_are_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file gives nothing back, and what is computed within has to say so."""
    with monkeypatch.context() as patch:
        patch.setattr(PageFile, "load", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(KVPagesLostError):
            yield
