"""An actor's view of the memory that the driver made: slot table, slots, resident pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipo_ray.messages import KVDiskSetup, StageSetup
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.page_table import PageTable
from pipo_ray.pipeline.slots import U8, SlotTable
from pipo_ray.session.slots import assert_in_shm, attach


@dataclass(frozen=True)
class KVMemory:
    """Of KV pages on the drive: what is asked for, and the pages in RAM, uint8 [ram_pages, page_bytes]."""

    table: PageTable
    pages: U8

    @staticmethod
    def attach(setup: KVDiskSetup, slots: SlotTable) -> KVMemory:
        """Attach to it; `slots` tells when everybody is to stop."""
        placement = setup.placement
        table, memory = attach(setup.table_ref[0]), attach(setup.ram_ref[0])
        for array in (table, memory):
            assert_in_shm(array)
        return KVMemory(
            PageTable(table, placement.ram_pages, placement.disk_pages, lambda: slots.stopped),
            np.asarray(memory[: placement.ram_bytes]).reshape(placement.ram_pages, placement.page_bytes),
        )


@dataclass(frozen=True)
class StageMemory:
    """`slots` and `residents` are writable uint8 arrays over the object store, 4096-aligned; `resident_rows` maps a
    piece to its index.
    """

    table: SlotTable
    slots: list[U8]
    residents: list[U8]
    resident_rows: dict[int, int]

    @staticmethod
    def attach(setup: StageSetup) -> StageMemory:
        """Attach to everything in `setup`, and make sure that it lies in /dev/shm."""
        placement = setup.placement
        resident_rows = {piece: row for row, piece in enumerate(sorted(placement.residents))}
        memory = attach(setup.table_ref[0])
        slots = [attach(ref)[: placement.slot_bytes] for ref in setup.slot_refs]
        arenas = [attach(ref) for ref in setup.arena_refs]
        for array in [memory, *slots, *arenas]:
            assert_in_shm(array)
        residents: list[U8] = []
        for piece in resident_rows:
            arena, offset = placement.residents[piece]
            residents.append(arenas[arena][offset : offset + setup.plan.pieces[piece].read_bytes])
        return StageMemory(
            SlotTable(memory, placement.num_slots, len(resident_rows), setup.plan.num_drives),
            slots,
            residents,
            resident_rows,
        )

    def load_order(self, setup: StageSetup) -> LoadOrder:
        """The order of loads: every user needs one of its own."""
        placement = setup.placement
        on_gpu = placement.num_gpu_slots > 0 or bool(placement.gpu_residents)
        return LoadOrder(
            setup.plan.order,
            # With a GPU a slot in RAM is free as soon as it was copied, in order; on the CPU it is when its last unit
            # has run.
            range(len(setup.plan.order)) if on_gpu else setup.plan.releases,
            self.resident_rows,
            placement.num_slots,
            elsewhere=placement.gpu_residents,
        )

    def copy_order(self, setup: StageSetup) -> LoadOrder:
        """The order of copies into the GPU's slots."""
        placement = setup.placement
        return LoadOrder(
            setup.plan.order, setup.plan.releases, {}, placement.num_gpu_slots, elsewhere=placement.gpu_residents
        )

    def preload_order(self, setup: StageSetup) -> LoadOrder | None:
        """The order in which pieces that stay on the GPU are loaded, once; None if there are none."""
        pieces = setup.placement.gpu_residents
        if not pieces:
            return None
        return LoadOrder(pieces, range(len(pieces)), {}, setup.placement.num_slots)
