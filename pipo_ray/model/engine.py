"""The compute worker's engine: a sweep request in, tokens and text out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.pack import CompiledPacking
from pipo_ray.compiled.support import floats_obstacle, instruction_set
from pipo_ray.errors import DriveError
from pipo_ray.messages import (
    ComputeSetup,
    KVDiskSetup,
    LostCache,
    SequenceSpec,
    SequenceStep,
    StageSetup,
    StageTimes,
    StepResult,
    SweepRequest,
    SweepResult,
)
from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.binding import Binder
from pipo_ray.model.compiled_layers import compile_model
from pipo_ray.model.cpu_linear import HALF_DTYPES, CpuProducts
from pipo_ray.model.gpu import (
    check_device,
    choose_attention_kernels,
    gpu_memory_in_use,
    limit_gpu_memory,
    open_device_stream,
)
from pipo_ray.model.graph import DTYPES, build_graph, load_config
from pipo_ray.model.heap import Heap
from pipo_ray.model.host_values import host_values, to_device
from pipo_ray.model.inspect import trace_of
from pipo_ray.model.kept_profiles import ProfilePlaces
from pipo_ray.model.kernel_times import KernelTimes
from pipo_ray.model.kv_cache import KVStore
from pipo_ray.model.kv_disk import KVDisk, KVPagesLostError
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_pool import KVPool
from pipo_ray.model.kv_tiers import KVTiers
from pipo_ray.model.layer_graphs import LayerGraphs
from pipo_ray.model.layout import TORCH_DTYPES
from pipo_ray.model.low_bit_choice import products_for
from pipo_ray.model.packed_choice import rows_for
from pipo_ray.model.packed_rows import PackedRows
from pipo_ray.model.row_staging import RowStaging
from pipo_ray.model.runner import ModelRunner
from pipo_ray.model.sampling import SampledToken, SequenceSampling, sample_tokens
from pipo_ray.model.seen_tokens import SeenTokens
from pipo_ray.model.settled_layers import SettledLayers
from pipo_ray.model.text import SequenceText, decode_logprobs
from pipo_ray.model.tokenizer import shared_tokenizer
from pipo_ray.pipeline.checksums import LookupChecksums
from pipo_ray.pipeline.cuda_graph import CudaGraphs
from pipo_ray.pipeline.device_ops import CudaOps
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.host_functions import HostFunctions
from pipo_ray.pipeline.stage_memory import KVMemory, StageMemory
from pipo_ray.pipeline.tracing import TraceWriter
from pipo_ray.pipeline.weight_stream import HostStream, WeightStream
from pipo_ray.plan.activations import bytes_per_token
from pipo_ray.store.manifest import Manifest
from pipo_ray.store.rows import RowReader


class _Running:
    """A sequence as the compute worker knows it: enough to sample its next token and to write its text."""

    def __init__(self, spec: SequenceSpec, text: SequenceText) -> None:
        self.spec = spec
        self.generated = list(spec.generated_token_ids)
        self.text = text
        self.seen = SeenTokens(spec.prompt_token_ids) if spec.params.penalizes else None
        self.ended = False
        text.resume(self.generated)


class ComputeEngine:
    """Graph, weight stream, runner, sampler and text of one stage. `notes` are lines for the user."""

    def __init__(self, setup: StageSetup, compute: ComputeSetup, memory: StageMemory) -> None:
        torch.set_num_threads(compute.num_threads)
        self._facts = compute.facts
        self._device = torch.device("cuda", 0) if compute.device == "cuda" else torch.device("cpu")
        check_device(compute.device)
        if compute.device == "cuda":
            limit_gpu_memory(compute, self._device)
            choose_attention_kernels()
        dtype = DTYPES[compute.dtype]
        config = load_config(setup.store)
        manifest = Manifest.load(setup.store)
        self._lookup_checksums = self._check_lookups(setup, manifest)  # read while the graph is built
        graph = self._build(config, dtype)
        self._tokenizer = shared_tokenizer(setup.store)
        trace_file = f"{setup.trace_folder}/ComputeWorker-{os.getpid()}.jsonl" if setup.trace_folder else None
        self._trace = TraceWriter(trace_file, "ComputeWorker")
        self._stream: WeightStream
        self._ops: CudaOps | None = None
        self._kv_tiers: KVTiers | None = None
        self._kv_disk: KVDisk | None = None
        kv_store: KVStore | HostKV | None = None
        code_folder = Path(compute.code_folder) if compute.code_folder else None
        notes: list[str] = []
        if self._device.type == "cuda":
            self._ops = CudaOps(self._device, self._trace)
            if setup.kv_disk is not None:
                kv_store = self._kv_disk = self._open_kv_disk(setup.kv_disk, memory, dtype)
            elif compute.kv is not None:
                kv_store = self._kv_tiers = KVTiers(compute.kv, dtype, self._ops, self._trace)
            elif compute.kv_on_cpu:
                kv_store = self._host_kv(dtype, compute.kv_bits, code_folder, notes)
            elif self._facts.ragged and compute.kv_tokens and compute.kv_bits is None:
                kv_store = KVPool(compute.kv_tokens, self._device)
            self._stream = open_device_stream(setup, memory, self._ops, self._trace)
        else:
            self._stream = HostStream(
                setup.plan, memory.load_order(setup), memory.table,
                [torch.from_numpy(slot) for slot in memory.slots],
                [torch.from_numpy(piece) for piece in memory.residents],
                trace=self._trace,
            )  # fmt: skip
            if setup.kv_disk is not None:
                kv_store = self._kv_disk = self._open_kv_disk(setup.kv_disk, memory, dtype)
        self._readers: dict[str, tuple[RowReader, torch.dtype, tuple[int, ...]]] = {}
        for unit in self._facts.units:
            if unit.kind == "lookup":
                for name in unit.tensors:
                    stored = manifest.aliases.get(name, name)
                    _, tensor = manifest.find(stored)
                    self._readers[stored] = (
                        RowReader(setup.store, manifest, stored, keep_all=compute.tables_in_ram),
                        TORCH_DTYPES[tensor.dtype],
                        tensor.shape,
                    )
        self._row_staging = RowStaging(self._device)
        products = None
        if self._device.type == "cpu" and dtype in HALF_DTYPES:
            products = CpuProducts.for_run(dtype, _profile_places(compute, "kernels.json"), code_folder)
        places = _profile_places(compute, "low-bit-kernels.json")
        low_bit = products_for(setup.plan, places, self._device, code_folder)
        if low_bit is not None and low_bit.obstacle is not None:
            notes.append(_unpacked_note(low_bit.obstacle))
        attention: CompiledAttention | None = None
        layers: SettledLayers | None = None
        self._graphs: LayerGraphs | None = None
        if any(used is not None and used.compiles for used in (products, low_bit)):
            attention = CompiledAttention(code_folder)
            layers = compile_model(graph, products, low_bit, attention, code_folder)
        if compute.kv_bits is not None and not compute.kv_on_cpu:
            compiled = attention or self._attention_to_pages(dtype, code_folder, notes)
            rows = self._rows_of_pages(compute.kv_bits, dtype, code_folder, notes)
            kv_store = LowBitStore(compute.kv_bits, compiled, self._kv_disk or self._kv_tiers, rows)
        self.notes = tuple(notes)
        if self._device.type == "cuda" and self._facts.ragged and compute.graph_bytes > 0:
            graphs = CudaGraphs(self._device, compute.graph_bytes)
            layers = self._graphs = LayerGraphs(graph, self._facts, dtype, graphs)
        binder = Binder(
            graph, trace_of(self._facts), setup.plan, manifest.aliases, self._stream, self._read_rows, products,
            low_bit, layers,
        )  # fmt: skip
        self._runner = ModelRunner(
            graph, binder, self._device, ragged=self._facts.ragged, kv_store=kv_store, attention=attention,
            layers=layers, heap=self._heap(graph, dtype),
        )  # fmt: skip
        self._sequences: dict[str, _Running] = {}
        self._lost: dict[str, DriveError | None] = {}  # caches that the request before has lost
        self._computing_s = self._waited_s = self._copying_s = 0.0
        self._watches_kernels = False
        self._kernel_times: KernelTimes | None = None
        self._started = self._idle_since = time.perf_counter()

    def _heap(self, graph: torch.nn.Module, dtype: torch.dtype) -> Heap | None:
        if self._device.type != "cpu":
            return None
        return Heap(graph, bytes_per_token(self._facts, dtype.itemsize, "cpu"))

    def _host_kv(
        self, dtype: torch.dtype, bits: tuple[int, ...] | None, code_folder: Path | None, notes: list[str]
    ) -> HostKV:
        reason = _not_compiled(dtype)
        if reason is not None:
            notes.append(f"attention on the processor is torch's, which is slower: {reason}")
        compiled = CompiledAttention(code_folder) if reason is None else None
        low_bit = None if bits is None else LowBitStore(bits, compiled)
        calls = None if compiled is None else HostFunctions(self._device)
        packing = None if compiled is None or bits is None else CompiledPacking(code_folder)
        return HostKV(self._device, compiled, calls, low_bit, packing)

    def _attention_to_pages(
        self, dtype: torch.dtype, code_folder: Path | None, notes: list[str]
    ) -> CompiledAttention | None:
        if self._device.type != "cpu":
            return None
        reason = _not_compiled(dtype)
        if reason is not None:
            notes.append(f"the KV cache is unpacked for every token, which is slower: {reason}")
            return None
        return CompiledAttention(code_folder)

    def _rows_of_pages(
        self, bits: tuple[int, ...], dtype: torch.dtype, code_folder: Path | None, notes: list[str]
    ) -> PackedRows | None:
        if self._device.type != "cuda" or self._kv_disk is not None or self._kv_tiers is not None:
            return None
        rows = rows_for(bits, self._facts, dtype, self._device, code_folder)
        if isinstance(rows, PackedRows):
            return rows
        notes.append(f"the KV cache is unpacked for every token, which is slower: {rows}")
        return None

    def _open_kv_disk(self, setup: KVDiskSetup, memory: StageMemory, dtype: torch.dtype) -> KVDisk:
        kv = KVMemory.attach(setup, memory.table)
        kv.table.trace = self._trace
        return KVDisk(setup.placement, kv.pages, kv.table, dtype, self._ops, shared=setup.shared)

    def run_sweep(self, request: SweepRequest) -> SweepResult:
        """Run one sweep. If it raises, the sequences in it are forgotten and must be sent from their first token."""
        if not self._watches_kernels or not request.steps:
            return self._sweep(request)
        self._watches_kernels = False
        with KernelTimes() as self._kernel_times:
            return self._sweep(request)

    def watch_kernels(self) -> None:
        """Watch the GPU's kernels in the next sweep; `times` tells of them then."""
        self._watches_kernels = self._device.type == "cuda"

    def _sweep(self, request: SweepRequest) -> SweepResult:
        begin = time.perf_counter()
        self.forget(request.drop)
        gone, lost = self._lost, dict[str, DriveError | None]()  # who sent the request may not have heard of `gone`
        self._lost = lost
        self._runner.cut([(name, count) for name, count in request.cut if name not in gone])
        for name, _ in request.cut:
            self._sequences.pop(name, None)
        steps, entries = [], []
        for step in request.steps:
            token_ids = self._following(step) if step.follows else step.token_ids
            points = {point.name: None for point in step.keep}
            if token_ids is None or (step.spec is None and step.sequence not in self._sequences):
                lost |= points  # of a sequence that has ended, or that was lost
                continue
            if any(part.sequence in gone or part.sequence in lost for part in step.prefix):
                lost |= {step.sequence: None, **points}
                continue
            if step.spec is not None:
                gone.pop(step.sequence, None)
                text = SequenceText(
                    self._tokenizer,
                    step.spec.prompt_token_ids,
                    step.spec.params,
                    self._facts.eos_token_ids,
                    step.spec.max_tokens,
                )
                self._sequences[step.sequence] = _Running(step.spec, text)
            steps.append(step)
            entries.append(
                SweepEntry(step.sequence, token_ids, step.start, step.capacity, step.logits, step.prefix, step.keep)
            )
        if not steps:
            return SweepResult(
                request.number, tuple(_left_out(step) for step in request.steps), 0.0, 0.0, 0, _told(lost)
            )
        self._trace.add("no sweep", self._idle_since, begin, {})
        waited, streamed = self._waited(), self._stream.times.streamed_bytes
        try:
            logits = self._run(steps, entries, lost)
        except BaseException:
            for step in steps:
                self._sequences.pop(step.sequence, None)
            self._idle_since = time.perf_counter()
            raise
        if self._ops is not None:
            self._ops.look_at_clocks()  # now, while the GPU works on what it was given; behind the sweep it would wait
        made = {result.sequence: result for result in self._finish(steps, logits)}
        lost |= self._runner.take_lost()
        for name in lost:
            self._sequences.pop(name, None)
        results = [made.get(step.sequence) or _left_out(step) for step in request.steps]
        end = time.perf_counter()
        waited = self._waited() - waited
        if self._ops is not None:
            waited += self._ops.stalled_s()
            self._copying_s += self._ops.weight_copies_s()
        self._waited_s += waited
        self._computing_s += end - begin - waited
        tokens = sum(step.num_tokens for step in steps)
        self._idle_since = end
        self._trace.add(
            "sweep", begin, end,
            {"piece": f"sweep {request.number}", "tokens": tokens, "waited_s": waited,
             "starts": [step.start for step in steps]},
        )  # fmt: skip
        return SweepResult(
            request.number, tuple(results), end - begin, waited, self._stream.times.streamed_bytes - streamed,
            _told(lost),
        )  # fmt: skip

    def _run(
        self, steps: list[SequenceStep], entries: list[SweepEntry], lost: dict[str, DriveError | None]
    ) -> list[torch.Tensor | None]:
        """Logits of each of `steps`. Those whose KV pages are lost are taken out, and told in `lost`; for the others
        the sweep is done again.
        """
        again = False
        while entries:
            try:
                return self._runner.run(entries, again=again)
            except KVPagesLostError:
                again = True
                lost |= self._runner.undo()
                steps[:] = [step for step in steps if step.sequence not in lost]
                entries[:] = [entry for entry in entries if entry.sequence not in lost]
        return []

    def _waited(self) -> float:
        """Seconds without a piece, or a KV page."""
        return self._stream.times.waited_s + (self._kv_disk.waited_s if self._kv_disk is not None else 0.0)

    def forget(self, sequences: tuple[str, ...]) -> None:
        """These sequences' caches and texts are no longer needed."""
        self._runner.drop(sequences)
        for name in sequences:
            self._sequences.pop(name, None)

    def leave_out(self, sequences: Sequence[str]) -> None:
        """Steps of these sequences that follow are left out. Any thread may ask for it."""
        for name in sequences:
            if (running := self._sequences.get(name)) is not None:
                running.ended = True

    def forget_all(self) -> None:
        """Forget every sequence: a new scheduler begins."""
        self._runner.drop_all()
        self._sequences.clear()
        self._lost.clear()

    def times(self) -> StageTimes:
        """Busy: computing. Waiting: for a piece."""
        total = time.perf_counter() - self._started
        details = {"cache_bytes": self._runner.cache_bytes, **gpu_memory_in_use(self._device)}
        if self._ops is not None:
            details |= {"pinned_bytes": self._ops.pinned_bytes, "unpinned_bytes": self._ops.refused_bytes}
            details["weight_copies_s"] = self._copying_s
        if self._kernel_times is not None:
            details |= {"kernels_s": self._kernel_times.busy_s, "watched_sweep_s": self._kernel_times.total_s}
        if self._graphs is not None:
            details["graph_sweeps"] = self._graphs.sweeps
        if self._kv_tiers is not None:
            details["kv_loaded_bytes"] = self._kv_tiers.loaded_bytes
            details["kv_saved_bytes"] = self._kv_tiers.saved_bytes
        if self._kv_disk is not None:
            details["kv_waited_s"] = self._kv_disk.waited_s
        return StageTimes("ComputeWorker", self._computing_s, self._waited_s, total, details)

    def _build(self, config, dtype: torch.dtype):  # type: ignore[no-untyped-def]
        return build_graph(config, dtype, attention=self._facts.attention, device=self._device)

    def _check_lookups(self, setup: StageSetup, manifest: Manifest) -> LookupChecksums | None:
        """Of the blocks that are looked up; one that streams as well (a tied embedding) is the loader's to check."""
        names = [name for unit in self._facts.units if unit.kind == "lookup" for name in unit.tensors]
        blocks = {block.name: block for block, _ in (manifest.find(name) for name in names)}
        for piece in setup.plan.pieces:
            blocks.pop(piece.block, None)
        return LookupChecksums(tuple(blocks.values()), Drive(setup.store)) if setup.verify_checksums else None

    def _read_rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        if self._lookup_checksums is not None:
            self._lookup_checksums.wait()
        reader, dtype, shape = self._readers[name]
        values = host_values(ids)
        if reader.whole is not None:
            reader.check(values)
            rows = self._row_staging.gather(torch.from_numpy(reader.whole), torch.from_numpy(values))
        else:
            rows = to_device(torch.from_numpy(reader.read(values)), self._device)
        return rows.view(dtype).view(len(ids), *shape[1:])

    def _following(self, step: SequenceStep) -> tuple[int, ...] | None:
        """The token that was chosen for the sequence last; None if it was the sequence's end, or is not known."""
        running = self._sequences.get(step.sequence)
        if running is None or running.ended or self._runner.length(step.sequence) != step.start:
            return None
        return (running.generated[-1],)

    def _finish(self, steps: Sequence[SequenceStep], logits: list[torch.Tensor | None]) -> list[StepResult]:
        sampled_rows: list[torch.Tensor] = []
        sampled: list[tuple[int, _Running]] = []
        results: list[StepResult] = []
        for step, rows in zip(steps, logits, strict=True):
            result = StepResult(step.sequence)
            if step.sample and rows is not None:
                running = self._sequences[step.sequence]
                sampled.append((len(results), running))
                sampled_rows.append(rows[-1])
            elif step.logits == "all" and rows is not None:
                result = StepResult(step.sequence, logits=rows.float().cpu().numpy())
            results.append(result)
        if sampled:
            choices = sample_tokens(sampled_rows, [self._sampling(running) for _, running in sampled])
            for (index, running), choice in zip(sampled, choices, strict=True):
                results[index] = self._write(steps[index].sequence, running, choice)
        return results

    def _sampling(self, running: _Running) -> SequenceSampling:
        spec = running.spec
        return SequenceSampling(
            spec.params,
            spec.seed,
            spec.prompt_token_ids,
            running.generated,
            spec.sample_index,
            self._facts.eos_token_ids,
            running.seen,
        )

    def _write(self, sequence: str, running: _Running, choice: SampledToken) -> StepResult:
        running.generated.append(choice.token_id)
        delta = running.text.push(choice.token_id)
        running.ended |= delta.finish_reason is not None
        wants = running.spec.params.logprobs is not None
        return StepResult(
            sequence, choice.token_id, delta.text, choice.logprob,
            decode_logprobs(self._tokenizer, choice) if wants else None, delta.finish_reason, delta.stop_reason,
        )  # fmt: skip


def _left_out(step: SequenceStep) -> StepResult:
    return StepResult(step.sequence, left_out=True)


def _told(lost: dict[str, DriveError | None]) -> tuple[LostCache, ...]:
    return tuple(LostCache(name, error) for name, error in lost.items())


def _profile_places(compute: ComputeSetup, name: str) -> ProfilePlaces:
    session = Path(compute.kernel_profile).with_name(name) if compute.kernel_profile else None
    return ProfilePlaces(session, Path(compute.profile_folder) if compute.profile_folder else None)


def _not_compiled(dtype: torch.dtype) -> str | None:
    """Why attention on the processor is not compiled, in words for the user; None if it is."""
    if dtype is not torch.bfloat16:
        return f"the model is computed in {str(dtype)[6:]}"
    return floats_obstacle() if instruction_set() is None else None


def _unpacked_note(obstacle: str) -> str:
    return f"low-bit weights are unpacked by torch for every product, because {obstacle}: Triton's kernels are faster"
