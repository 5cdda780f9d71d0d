"""A model's KV pages in a file, for a device that computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pipeline.page_loader import Pages

from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.kv_disk import KVDisk
from pipo_ray.plan.disk_pages import DiskPages
from pipo_ray.plan.kv_disk import PASSING_PAGES, KVDiskPlacement
from pipo_ray.plan.low_bit_pages import LowBitKV
from pipo_ray.session.kv_file import KVFile


@contextmanager
def pages_on_disk(
    facts: ModelFacts, folder: Path, ram_pages: int, bits: tuple[int, ...] | None = None
) -> Iterator[Callable[[torch.dtype, Any], KVDisk]]:
    """KV pages of a model for a device that computes, so many in RAM, or packed pages of so many bits: makes the
    store.
    """
    sizes = DiskPages.of(facts, None if bits is None else LowBitKV.of(bits, facts))
    nbytes, disk_pages = sizes.page_bytes, 200
    file = KVFile(folder, disk_pages * nbytes)
    pages = Pages.create(folder, file, ram_pages, disk_pages, nbytes)
    stop, table, frames = pages.open()
    server = pages.serve(table, frames)
    gpu_pages = PASSING_PAGES + 4 * facts.num_layers
    placement = KVDiskPlacement(
        facts.num_layers, nbytes, ram_pages, 6, disk_pages, str(folder), True, gpu_pages, sizes.tokens
    )
    try:
        yield lambda dtype, ops: KVDisk(placement, frames, table, dtype, ops)
    finally:
        stop[0] = 1
        server.stop()
        file.close()
