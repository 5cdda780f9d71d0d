"""The pipeline in one process, without Ray: pack, plan, slot table, loader threads, slots, binder, model."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from transformers import PretrainedConfig

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.model.batch import SweepEntry, WantedLogits
from pipo_ray.model.binding import Binder
from pipo_ray.model.compiled_layers import compile_model
from pipo_ray.model.cpu_linear import HALF_DTYPES, CpuProducts, always
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.graph import build_graph, load_config
from pipo_ray.model.host_values import host_values, to_device
from pipo_ray.model.inspect import find_facts, trace_of
from pipo_ray.model.kv_cache import KVStore
from pipo_ray.model.kv_disk import KVDisk
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_pool import KVPool
from pipo_ray.model.kv_tiers import KVTiers
from pipo_ray.model.layer_graphs import LayerGraphs
from pipo_ray.model.layout import TORCH_DTYPES, block_layout
from pipo_ray.model.linear_experts import experts_are_linear
from pipo_ray.model.low_bit import LowBitProducts, always_low_bit
from pipo_ray.model.runner import ModelRunner
from pipo_ray.model.settled_layers import SettledLayers
from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.compiled_loader import make_loader
from pipo_ray.pipeline.cuda_graph import Graphs
from pipo_ray.pipeline.device_ops import CudaOps, DeviceOps
from pipo_ray.pipeline.device_stream import DeviceStream
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import U8, SlotTable
from pipo_ray.pipeline.weight_stream import HostStream, WeightStream
from pipo_ray.plan.kv_pages import KVPlacement, page_bytes
from pipo_ray.plan.pieces import Piece, SweepPlan, cut_pieces, largest_uncut_bytes, plan_sweep
from pipo_ray.prepare import code_folder
from pipo_ray.quant.assign import assign
from pipo_ray.quant.panels import PANEL_BYTES, machine_layout
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.source import QuantizedSource
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.manifest import Manifest
from pipo_ray.store.pack import pack
from pipo_ray.store.rows import RowReader
from pipo_ray.store.source import TensorSource

CPU = torch.device("cpu")
PART_BYTES = 6000
"""Of a striped store: so small that the matrices of tiny models are split by rows."""


@dataclass(frozen=True)
class Followed:
    """`logits` [tokens, vocabulary] of a sequence, as last computed; `choices` its greedy tokens as first computed."""

    logits: torch.Tensor
    choices: tuple[int, ...]


@dataclass(frozen=True)
class PackedModel:
    """A block store made from a checkpoint, and what is known of its model."""

    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    manifest: Manifest
    facts: ModelFacts

    @cached_property
    def least_slot_bytes(self) -> int:
        """The least slot size."""
        return largest_uncut_bytes(self.manifest.blocks)


def pack_checkpoint(
    checkpoint: Path,
    destination: Path,
    dtype: torch.dtype,
    precision: Precision | None = None,
    *,
    panel_bytes: int = PANEL_BYTES,
    layout: str | None = None,
    num_stripes: int = 0,
) -> PackedModel:
    """Trace, probe and pack the checkpoint; with `precision`, in panels of `panel_bytes` and int4 in `layout`; with
    `num_stripes` further folders beside the destination, in parts of at most `PART_BYTES`.
    """
    config = load_config(checkpoint)
    model, trace, facts = find_facts(config, dtype, checkpoint)
    with Checkpoint.open(checkpoint) as opened:
        source = TensorSource(model, opened, dtype)
        blocks = block_layout(model, trace, source.aliases)
        tables = {source.aliases.get(n, n) for unit in trace.units if unit.kind == "lookup" for n in unit.tensors}
        blocks = assign(
            blocks, precision or Precision(), looked_up=tables, layout=layout or machine_layout(),
            linear_experts=precision is not None and experts_are_linear(config), panel_bytes=panel_bytes,
        )  # fmt: skip
        with QuantizedSource(source, num_threads=2) as quantized:
            manifest = pack(
                blocks, quantized, destination,
                checkpoint=opened, aliases=source.aliases, architecture=opened.architecture,
                model_type=opened.model_type, precision=source.precision, slot_bytes=1 << 20,
                extra={"facts": facts.to_json()}, part_bytes=PART_BYTES,
                stripes=[destination.with_name(f"{destination.name}-stripe{n}") for n in range(num_stripes)],
            )  # fmt: skip
    return PackedModel(destination, config, dtype, manifest, ModelFacts.from_json(manifest.extra["facts"]))


def aligned(num_bytes: int) -> U8:
    """Zeroed page-aligned memory."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


@runtime_checkable
class Closing(Protocol):
    """Operations of a device that have a thread of their own."""

    def close(self) -> None:
        """End it."""


class Pipeline:
    """Everything between a packed model and its logits, at work. A context manager; leaving it ends all threads.

    `slot_bytes` None is the least that will do; there are as many slots as must be held at once and `spare_slots` more,
    or `num_slots`.
    The pieces of kind "rest" and `resident_pieces` others, taken from the middle (None: all), stay in memory. Prompts
    go in chunks of `chunk` tokens if the architecture allows it. With `kv_pages` the KV cache has so many pages on the
    GPU and in RAM, with `kv_pool` it is a pool of so many tokens, with `kv_store` it is what that makes, with `kv_bits`
    each layer has so many bits. `gpu_resident_pieces` None: everything stays on the device. With `graphs`, layers are
    computed by those while weights stay.
    """

    def __init__(
        self,
        packed: PackedModel,
        *,
        slot_bytes: int | None = None,
        spare_slots: int = 0,
        num_slots: int | None = None,
        resident_pieces: int | None = 2,
        chunk: int | None = 5,
        threads: int = 2,
        checksums: bool = True,
        device: torch.device = CPU,
        num_gpu_slots: int | None = None,
        gpu_resident_pieces: int | None = 0,
        ops: DeviceOps | None = None,
        products: CpuProducts | None = None,
        low_bit: LowBitProducts | None = None,
        kv_pages: tuple[int, int] | None = None,
        kv_pool: int | None = None,
        kv_store: Callable[[torch.dtype, DeviceOps], KVStore] | None = None,
        kv_bits: tuple[int, ...] | None = None,
        attention: CompiledAttention | None = None,
        compile_layers: bool = False,
        graphs: Graphs | None = None,
    ) -> None:
        self.packed, self.chunk = packed, chunk if packed.facts.chunked else None
        facts, manifest = packed.facts, packed.manifest
        slot_bytes = slot_bytes or packed.least_slot_bytes
        self.pieces: tuple[Piece, ...] = cut_pieces(manifest.blocks, slot_bytes)
        trace = trace_of(facts)
        tensors = [() if unit.kind == "lookup" else unit.tensors for unit in trace.units]
        self.plan: SweepPlan = plan_sweep(self.pieces, tensors, trace.events, manifest.aliases)
        rest = [piece.index for piece in self.pieces if piece.kind == "rest"]
        others = [piece.index for piece in self.pieces if piece.kind != "rest"]
        middle = 0 if resident_pieces is None else len(others) // 2
        resident_pieces = len(others) if resident_pieces is None else resident_pieces
        self.resident_rows: Mapping[int, int] = {
            piece: row for row, piece in enumerate(rest + others[middle : middle + resident_pieces])
        }
        if gpu_resident_pieces is None:
            self.resident_rows = {}
        self.device = device
        self._ops = ops
        self._cuda: CudaOps | None = None
        free = [piece for piece in others if piece not in self.resident_rows]
        self.gpu_residents = tuple(free[-gpu_resident_pieces:]) if gpu_resident_pieces else ()
        if gpu_resident_pieces is None:
            self.gpu_residents = tuple(rest + others)
        self.num_slots = num_slots or self.plan.max_held + spare_slots
        sizes = self.num_slots, len(self.resident_rows), self.plan.num_drives
        self.table = SlotTable(aligned(SlotTable.nbytes(*sizes)), *sizes)
        self._slots = [aligned(slot_bytes) for _ in range(self.num_slots)]
        self._residents = [aligned(self.pieces[piece].read_bytes) for piece in self.resident_rows]
        blocks = {block.name: block for block in manifest.blocks}
        self.loaders = []
        for number, folder in enumerate(manifest.folders(packed.folder)[: self.plan.num_drives]):
            drive = Drive(folder)
            loader = make_loader(
                drive, self.pieces, self.loads(), self.table, self._slots, self._residents, threads=threads,
                preloads=self.preloads(), number=number, folder=code_folder(),
                checksums=BlockChecksums(blocks, self.pieces, drive) if checksums else None,
            )  # fmt: skip
            loader.start()
            self.loaders.append(loader)
        self._readers: dict[str, RowReader] = {}
        try:
            self.stream: WeightStream = self._open_stream(slot_bytes, num_gpu_slots)
            self.model = build_graph(packed.config, packed.dtype, attention=facts.attention, device=device)
            if products is None and device.type == "cpu" and packed.dtype in HALF_DTYPES:
                products = CpuProducts(always("wide", packed.dtype))
            low_bit = low_bit or LowBitProducts(always_low_bit("packed"), machine_layout(), device)
            layers: SettledLayers | None = None
            self.graphs: LayerGraphs | None = None
            if graphs is not None:
                layers = self.graphs = LayerGraphs(self.model, facts, packed.dtype, graphs)
            if compile_layers:
                assert attention is not None
                layers = compile_model(self.model, products, low_bit, attention)
            self.binder = Binder(
                self.model, trace, self.plan, manifest.aliases, self.stream, self._read_rows, products, low_bit, layers
            )
            self.kv_tiers = None if kv_pages is None else self._open_kv(*kv_pages)
            store: KVStore | None = self.kv_tiers
            if kv_pool is not None:
                store = KVPool(kv_pool, device)
            if kv_bits is not None:
                store = LowBitStore(kv_bits, attention)
            if kv_store is not None:
                store = kv_store(packed.dtype, self._device_ops())
            self.runner = ModelRunner(
                self.model,
                self.binder,
                device,
                ragged=facts.ragged,
                kv_store=store,
                attention=attention,
                layers=layers,
            )
        except BaseException:
            self.close()
            raise

    def loads(self) -> LoadOrder:
        """A load order of one's own."""
        # Slots that are copied from are free in the order of the copies.
        copied = self.device.type == "cuda" or self._ops is not None
        releases = range(len(self.plan.order)) if copied else self.plan.releases
        return LoadOrder(self.plan.order, releases, self.resident_rows, self.num_slots, elsewhere=self.gpu_residents)

    def _open_stream(self, slot_bytes: int, num_gpu_slots: int | None) -> WeightStream:
        slots = [torch.from_numpy(slot) for slot in self._slots]
        residents = [torch.from_numpy(part) for part in self._residents]
        if self.device.type == "cpu" and self._ops is None:
            return HostStream(self.plan, self.loads(), self.table, slots, residents)
        ops = self._device_ops()
        gpu_slots = num_gpu_slots or self.plan.max_held + 1
        return DeviceStream(
            self.plan, self.loads,
            lambda: LoadOrder(self.plan.order, self.plan.releases, {}, gpu_slots, elsewhere=self.gpu_residents),
            self.preloads(), self.table, slots, residents, slot_bytes, gpu_slots,
            {piece: ops.allocate(self.pieces[piece].read_bytes) for piece in self.gpu_residents}, ops,
        )  # fmt: skip

    def _device_ops(self) -> DeviceOps:
        if self._ops is not None:
            return self._ops
        self._cuda = self._cuda or CudaOps(self.device)
        return self._cuda

    def _open_kv(self, gpu_pages: int, ram_pages: int) -> KVTiers:
        facts = self.packed.facts
        nbytes = page_bytes(facts.kv_bytes_per_token, facts.num_layers)
        placement = KVPlacement((1,) * facts.num_layers, nbytes, gpu_pages, ram_pages)
        return KVTiers(placement, self.packed.dtype, self._device_ops())

    def preloads(self) -> LoadOrder | None:
        """The order in which pieces that stay on the GPU are loaded."""
        pieces = self.gpu_residents
        return LoadOrder(pieces, range(len(pieces)), {}, self.num_slots) if pieces else None

    def follow(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], joins: Sequence[int] | None = None
    ) -> list[Followed]:
        """Run `sequences` token by token behind their prompts, sequence i from sweep `joins[i]` on."""
        joins = joins or [0] * len(sequences)
        logits: list[list[torch.Tensor]] = [[] for _ in sequences]
        choices: list[list[int]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        sweep = 0
        while any(at < len(tokens) for at, tokens in zip(done, sequences, strict=True)):
            chosen = [i for i, tokens in enumerate(sequences) if done[i] < len(tokens) and joins[i] <= sweep]
            entries = []
            for i in chosen:
                start, stop = self._next_step(done[i], prompt_lengths[i])
                entries.append(
                    SweepEntry(str(i), tuple(sequences[i][start:stop]), start, len(sequences[i]), logits="all")
                )
            for i, entry, output in zip(chosen, entries, self.runner.run(entries), strict=True):
                assert output is not None
                logits[i] = [*logits[i], output] if entry.start else [output]
                done[i] = entry.start + len(entry.token_ids)
                choices[i] += output.argmax(-1).tolist()[len(choices[i]) - entry.start :]
            sweep += 1
        self.runner.drop([str(i) for i in range(len(sequences))])
        return [Followed(torch.cat(parts), tuple(made)) for parts, made in zip(logits, choices, strict=True)]

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The greedy continuations of `prompts`, all in one batch."""
        tokens = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        while unfinished := [i for i, prompt in enumerate(prompts) if len(tokens[i]) < len(prompt) + num_tokens]:
            entries = []
            for i in unfinished:
                start, stop = self._next_step(done[i], len(prompts[i]))
                wanted: WantedLogits = "last" if stop == len(tokens[i]) else "none"
                capacity = len(prompts[i]) + num_tokens
                entries.append(SweepEntry(str(i), tuple(tokens[i][start:stop]), start, capacity, wanted))
            for i, entry, output in zip(unfinished, entries, self.runner.run(entries), strict=True):
                done[i] = entry.start + len(entry.token_ids)
                if output is not None:
                    tokens[i].append(int(output[-1].argmax()))
        self.runner.drop([str(i) for i in range(len(prompts))])
        return [sequence[len(prompt) :] for sequence, prompt in zip(tokens, prompts, strict=True)]

    def _next_step(self, done: int, prompt_length: int) -> tuple[int, int]:
        """The tokens start:stop that come next, as the scheduler chooses them."""
        stop = (
            done + 1
            if done >= prompt_length
            else prompt_length
            if self.chunk is None
            else min(done + self.chunk, prompt_length)
        )
        rebuild = self.packed.facts.rebuild_length
        return (0, stop) if rebuild is not None and done <= rebuild < stop else (done, stop)

    def _read_rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        reader = self._readers.setdefault(name, RowReader(self.packed.folder, self.packed.manifest, name))
        rows = torch.from_numpy(reader.read(host_values(ids)))
        return to_device(rows.view(TORCH_DTYPES[reader.dtype]).view(len(ids), -1), self.device)

    def close(self) -> None:
        """End all threads and close all files. Raises what the loader could not cure."""
        self.table.stop()
        for loader in self.loaders:
            loader.stop()
        if isinstance(getattr(self, "stream", None), DeviceStream):  # opening it may have failed
            self.stream.close()
        if isinstance(self._ops, Closing):
            self._ops.close()
        for reader in self._readers.values():
            reader.close()
        if self._cuda is not None:
            # What is registered must be given back before it is unmapped: the driver may want the addresses.
            if (tiers := getattr(self, "kv_tiers", None)) is not None:
                tiers._pinning.join()
            disk = self.runner._kv_store if hasattr(self, "runner") else None  # opening it may have failed
            if isinstance(disk, KVDisk) and disk._copies is not None:
                disk._copies._pinning.join()
            self._cuda.synchronize()
            self._cuda.unpin_all()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        errors = [loader.error for loader in self.loaders if loader.error is not None]
        if kind is None and errors:
            raise errors[0]


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 5) -> list[list[int]]:
    """Prompts of random tokens, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def relative_errors(got: torch.Tensor, expected: torch.Tensor) -> Iterator[float]:
    """max|a-b| / max|b| per position of logits [tokens, vocabulary]."""
    difference = (got.double() - expected.double()).abs().amax(-1)
    yield from (difference / expected.double().abs().amax(-1)).tolist()
