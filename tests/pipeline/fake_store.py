"""A block store of random bytes, without a checkpoint, and what it takes to stream it."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import U8
from pipo_ray.plan.pieces import Piece, SweepPlan, cut_pieces, plan_sweep
from pipo_ray.store.manifest import StoredBlock
from pipo_ray.store.striping import plan_stripes

SLOT_BYTES = 64 << 10


@dataclass(frozen=True)
class FakeStore:
    """`sizes` are the bytes of each block's tensors; every tensor has a unit, called once, in this order. What is on
    drive n > 0 lies in the folder "driveN" in it.
    """

    folder: Path
    blocks: tuple[StoredBlock, ...]
    pieces: tuple[Piece, ...]
    plan: SweepPlan

    def loads(self, num_slots: int, resident_rows: Mapping[int, int] | None = None) -> LoadOrder:
        return LoadOrder(self.plan.order, self.plan.releases, resident_rows or {}, num_slots)

    def drive(self, number: int) -> Path:
        """The folder of a drive."""
        return self.folder / f"drive{number}" if number else self.folder

    def content(self, piece: Piece) -> bytes:
        """What a slot must hold when `piece` is loaded."""
        data = (self.drive(piece.drive) / piece.file).read_bytes()
        return data[piece.file_offset : piece.file_offset + piece.read_bytes]


def make_store(
    folder: Path, sizes: Sequence[Sequence[int]], *, slot_bytes: int = SLOT_BYTES, num_drives: int = 1
) -> FakeStore:
    """Write a store. The least slot for a tensor of n bytes is n rounded up to pages and two pages more."""
    specs = [
        BlockSpec(f"block{b}", "layer", b, tuple(TensorSpec(f"b{b}.t{t}", (n,), "U8") for t, n in enumerate(tensors)))
        for b, tensors in enumerate(sizes)
    ]
    random = np.random.default_rng(0)
    blocks: list[StoredBlock] = []
    for file in plan_stripes(specs, num_drives, 1 << 20):
        drive = file.blocks[0].folder
        data = bytearray(random.bytes(file.size))
        data[: len(file.header)] = file.header
        place = folder / f"drive{drive}" if drive else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / file.name).write_bytes(data)
        for block in file.blocks:
            checksum = xxhash.xxh3_128(data[block.offset : block.offset + block.nbytes]).hexdigest()
            blocks.append(replace(block, checksum=checksum))
    blocks.sort(key=lambda block: [spec.name for spec in specs].index(block.name))
    pieces = cut_pieces(blocks, slot_bytes)
    names = [tensor.name for block in blocks for tensor in block.tensors]
    events = [(unit, enters) for unit in range(len(names)) for enters in (True, False)]
    plan = plan_sweep(pieces, [(name,) for name in names], events, {})
    return FakeStore(folder, tuple(blocks), pieces, plan)


def aligned(num_bytes: int) -> U8:
    """Zeroed page-aligned memory."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
