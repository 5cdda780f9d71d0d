"""A loader that can be told, from one sweep to the next, to use fewer slots than there are, and other reads.

`staging_modes.py` imports `limited_loader.py`, which does nothing by itself, and puts this in the place of the
session's loader, and without its machine code: so sizes of staging take turns within one session and over the same
memory, while two sessions differ by more than what is to be told apart.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.cloudpickle
from pipo_ray.actors import nvme_loader

from pipo_ray import LLM
from pipo_ray.pipeline.loader import Loader
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.plan.pieces import Piece
from pipo_ray.plan.transfer import Transfer


class LimitedLoader(Loader):
    """With a limit of k slots, a load begins when that one has been released whose slot it would have in a session of k
    slots. It goes into the slot that has been free longest all the same, so every limit uses all of the memory in turn.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limited = self._main_loads
        self._allowed = threading.Condition()
        self._active = len(self._readers)

    def limit(self, limited: LoadOrder, transfer_bytes: int, read_threads: int) -> None:
        """From the next load on, as in a session with the order `limited`, and with such reads."""
        self._limited, self._transfer_bytes = limited, transfer_bytes
        with self._allowed:
            self._active = read_threads
            self._allowed.notify_all()

    def stop(self) -> None:
        """End all threads; the table must have been stopped."""
        with self._allowed:
            self._active = len(self._readers)
            self._allowed.notify_all()
        super().stop()

    def _fill_slot(self, load: int, piece: Piece, epoch: int, first_load: int) -> None:
        before = self._limited.load_before(load, first_load)
        if before is not None:
            self._table.wait_free(self._loads.slot(before), epoch, before)
        super()._fill_slot(load, piece, epoch, first_load)

    def _read_loop(self) -> None:
        number = self._readers.index(threading.current_thread())
        while True:
            with self._allowed:
                self._allowed.wait_for(lambda: number < self._active)
            task = self._tasks.get()
            if task is None:
                return
            task()


def limited(*what: Any, folder: Path | None, **options: Any) -> LimitedLoader:
    """In the place of `make_loader`."""
    return LimitedLoader(*what, **options)


class LimitedNvmeLoader(nvme_loader.NvmeLoader):
    """The actor around it."""

    def __init__(self, roll: str, number: int = 0) -> None:
        # By way of the function: the class that it belongs to may have come from the driver as a copy.
        super().__init__.__func__.__globals__["make_loader"] = limited  # type: ignore[attr-defined]
        super().__init__(roll, number)

    def limit(self, limited: LoadOrder, transfer_bytes: int, read_threads: int) -> None:
        """See `LimitedLoader.limit`."""
        self._loader.limit(limited, transfer_bytes, read_threads)  # type: ignore[attr-defined]


@contextlib.contextmanager
def limited_loaders() -> Iterator[None]:
    """Sessions that are started within have this loader."""
    import limited_loader  # by its name, also if it is the program

    ray.cloudpickle.register_pickle_by_value(limited_loader)
    own = nvme_loader.NvmeLoader
    nvme_loader.NvmeLoader = limited_loader.LimitedNvmeLoader  # type: ignore[misc]
    try:
        yield
    finally:
        nvme_loader.NvmeLoader = own  # type: ignore[misc]
        ray.cloudpickle.unregister_pickle_by_value(limited_loader)


def limit(llm: LLM, transfer: Transfer) -> None:
    """Let the loader of `llm`, whose slots are as large, use no more of them than `transfer` has, and read like it."""
    setup = llm._stage._setup
    rows = {piece: row for row, piece in enumerate(sorted(setup.placement.residents))}
    limited = LoadOrder(setup.plan.order, setup.plan.releases, rows, transfer.num_slots)
    llm._stage.call(
        llm._stage.nvme_loader, "limit", limited, transfer.transfer_bytes // 4096 * 4096, transfer.read_threads
    )
