"""A run's pipeline in one process, with threads and without Ray: what overhead.py compares the actors with."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from pipo_ray.model.attention import RAGGED_ATTENTION
from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.binding import Binder
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.graph import DTYPES, build_graph, load_config
from pipo_ray.model.inspect import trace_of
from pipo_ray.model.layout import TORCH_DTYPES
from pipo_ray.model.runner import ModelRunner
from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.loader import Loader
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import U8, SlotTable
from pipo_ray.pipeline.weight_stream import HostStream
from pipo_ray.plan.budget import RunPlan
from pipo_ray.store.manifest import Manifest
from pipo_ray.store.rows import RowReader

CPU = torch.device("cpu")


def touched(num_bytes: int) -> U8:
    """Page-aligned memory with every page in place."""
    memory = np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8)
    memory[::4096] = 0
    return memory


class LocalPipeline:
    """Loader threads and model of `plan` over the block store in `folder`, in this process. A context manager."""

    def __init__(self, folder: Path, plan: RunPlan, threads: int, read_threads: int, transfer_bytes: int) -> None:
        torch.set_num_threads(threads)
        manifest = Manifest.load(folder)
        facts = ModelFacts.from_json(manifest.extra["facts"])
        placement, sweep = plan.placement, plan.sweep
        rows = {piece: row for row, piece in enumerate(sorted(placement.residents))}
        self._table = SlotTable(
            touched(SlotTable.nbytes(placement.num_slots, len(rows))), placement.num_slots, len(rows)
        )
        slots = [touched(placement.slot_bytes) for _ in range(placement.num_slots)]
        residents = [touched(sweep.pieces[piece].read_bytes) for piece in rows]

        def loads() -> LoadOrder:
            return LoadOrder(sweep.order, sweep.releases, rows, placement.num_slots)

        drive = Drive(folder)
        self._loader = Loader(
            drive, sweep.pieces, loads(), self._table, slots, residents, threads=read_threads,
            transfer_bytes=transfer_bytes,
            checksums=BlockChecksums({b.name: b for b in manifest.blocks}, Drive(folder)),
        )  # fmt: skip
        self._loader.start()
        self._folder, self._manifest = folder, manifest
        self._readers: dict[str, RowReader] = {}
        stream = HostStream(
            sweep, loads(), self._table, [torch.from_numpy(slot) for slot in slots],
            [torch.from_numpy(piece) for piece in residents],
        )  # fmt: skip
        graph = build_graph(
            load_config(folder), DTYPES[manifest.precision], attention=RAGGED_ATTENTION if facts.ragged else "eager",
            device=CPU,
        )  # fmt: skip
        binder = Binder(graph, trace_of(facts), sweep, manifest.aliases, stream, self._read_rows)
        self._runner = ModelRunner(graph, binder, CPU, ragged=facts.ragged)

    def decode(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """`num_tokens` greedy tokens behind `prompt`, and the mean of the seconds between them, in a list."""
        ids, fed, times = list(prompt), 0, []
        while len(ids) < len(prompt) + num_tokens:
            entry = SweepEntry("one", tuple(ids[fed:]), fed, len(prompt) + num_tokens, "last")
            fed = len(ids)
            (logits,) = self._runner.run([entry])
            assert logits is not None
            ids.append(int(logits[-1].argmax()))
            times.append(time.perf_counter())
        self._runner.drop(["one"])
        return ids[len(prompt) :], [(times[-1] - times[0]) / (num_tokens - 1)]

    def _read_rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        reader = self._readers.setdefault(name, RowReader(self._folder, self._manifest, name))
        return torch.from_numpy(reader.read(ids.numpy())).view(TORCH_DTYPES[reader.dtype]).view(len(ids), -1)

    def __enter__(self) -> LocalPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.stop()
        self._loader.stop()
        for reader in self._readers.values():
            reader.close()
