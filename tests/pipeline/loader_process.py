"""A loader in a process of its own, as an actor has it: python loader_process.py SPECIFICATION.pickle TRACE NUMBER"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.compiled_loader import make_loader
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.loader import Loader
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import U8, SlotTable
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.plan.pieces import SweepPlan
from pipo_ray.prepare import code_folder
from pipo_ray.store.manifest import StoredBlock

PAGE = 4096


def loads_in(trace: Path) -> Iterator[int]:
    """The load number of every streamed piece that a loader, or several that were killed, wrote to `trace`."""
    for line in trace.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a kill, and the next process wrote behind it
        if event["kind"] == "weight load" and "load" in event["labels"]:
            yield event["labels"]["load"]


@dataclass(frozen=True)
class Shared:
    """Table, slots and residents in one file that several processes map."""

    file: Path
    num_slots: int
    slot_bytes: int
    resident_bytes: tuple[int, ...] = ()
    num_loaders: int = 1

    @property
    def table_bytes(self) -> int:
        return -(-SlotTable.nbytes(self.num_slots, len(self.resident_bytes), self.num_loaders) // PAGE) * PAGE

    def create(self) -> None:
        total = self.table_bytes + self.num_slots * self.slot_bytes + sum(self.resident_bytes)
        self.file.write_bytes(bytes(total))

    def open(self) -> tuple[SlotTable, list[U8], list[U8]]:
        with open(self.file, "r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        table = SlotTable(memory[: self.table_bytes], self.num_slots, len(self.resident_bytes), self.num_loaders)
        at = self.table_bytes
        parts = []
        for size in [self.slot_bytes] * self.num_slots + list(self.resident_bytes):
            parts.append(memory[at : at + size])
            at += size
        return table, parts[: self.num_slots], parts[self.num_slots :]


@dataclass(frozen=True)
class Specification:
    """All that the loaders need; `folders` has a folder for each."""

    folders: tuple[Path, ...]
    blocks: tuple[StoredBlock, ...]
    plan: SweepPlan
    resident_rows: dict[int, int]
    shared: Shared


def kind_of_loader() -> Callable[..., Loader]:
    """What makes it, as PIPO_TEST_LOADER says."""
    if os.environ.get("PIPO_TEST_LOADER") == "python":
        return lambda *what, folder, **options: Loader(*what, **options)
    return make_loader


def main() -> None:
    with open(sys.argv[1], "rb") as file:
        arguments = pickle.load(file)
    specification = Specification(**arguments | {"shared": Shared(**arguments["shared"])})
    shared, plan = specification.shared, specification.plan
    table, slots, residents = shared.open()
    number = int(sys.argv[3])
    drive = Drive(specification.folders[number])
    loads = LoadOrder(plan.order, plan.releases, specification.resident_rows, shared.num_slots)
    checksums = BlockChecksums({block.name: block for block in specification.blocks}, plan.pieces, drive)
    trace = NO_TRACE if sys.argv[2] == "-" else TraceWriter(sys.argv[2], "loader")
    loader = kind_of_loader()(
        drive,
        plan.pieces,
        loads,
        table,
        slots,
        residents,
        checksums=checksums,
        threads=3,
        transfer_bytes=16 << 10,
        trace=trace,
        number=number,
        folder=code_folder(),
    )
    loader.start()
    print("started", flush=True)
    loader.stop()
    assert loader.error is None, loader.error


if __name__ == "__main__":
    main()
