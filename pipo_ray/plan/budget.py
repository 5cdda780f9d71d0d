"""From budgets to a placement: what a given amount of memory is spent on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipo_ray.errors import BudgetError, InputError, UnsupportedModelError
from pipo_ray.messages import Placement
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.kernel_profile import GPU_SCRATCH_BYTES
from pipo_ray.plan.activations import (
    Place,
    activation_bytes,
    default_batch_tokens,
    logits_rows,
    loose_bytes,
    scored_tokens,
)
from pipo_ray.plan.kv_budget import (
    LEAST_KV_TOKENS,
    WANTED_KV_TOKENS,
    earlier_bytes,
    in_ram_line,
    kv_room,
    kv_tiers,
    kv_tokens_of,
    least_tier_bytes,
    low_bit_line,
    tier_units,
    tiers_line,
    wanted_kv_bytes,
    wanted_kv_tokens,
    wanted_pages,
)
from pipo_ray.plan.kv_disk import KVDiskPlacement, KVOnDisk, gpu_bytes_for, least_ram_bytes, place_kv, ram_bytes_for
from pipo_ray.plan.kv_pages import (
    PAGE_TOKENS,
    KVPlacement,
    in_flight_units,
    sweep_pages,
)
from pipo_ray.plan.lookups import looked_up_bytes, lookups_line
from pipo_ray.plan.low_bit_pages import LowBitKV
from pipo_ray.plan.pieces import SweepPlan
from pipo_ray.plan.placement import (
    STAGING_SHARE,
    choose_residents,
    least_slot_bytes,
    least_weight_bytes,
    pack_arenas,
    place,
    sweep_plan,
    whole_bytes,
)
from pipo_ray.plan.transfer import WITHOUT_PROFILE, Transfer
from pipo_ray.session.memory import MIB, format_least, format_size
from pipo_ray.store.manifest import Manifest

PROCESS_BYTES = 760 * MIB
"""Driver, Ray and the four actors with torch and transformers loaded, without weights, KV, activations and tokenizer:
593 to 622 MiB for seven architectures with all mapped code counted (benchmarks/footprint.py, "alone"; 2 cores AMD
EPYC), 636 in a control group (benchmarks/cgroup_budget.py), and where products are compiled 55 to 90 more for LLVM.
"""

CUDA_PROCESS_BYTES = 2200 * MIB
"""The same with CUDA's libraries loaded in the compute worker: 1930 MiB behind a run of Llama-3-8B's shape in bf16,
1890 of OPT-30B's in int4 with Triton (an H200 with 16 cores, torch 2.11, counted as `benchmarks/footprint.py` does, by
hand).
"""

LOADER_BYTES = 60 * MIB
"""Each loader beyond the first, one for every further drive of a striped store."""

_LARGER_GPU_SLOTS = 2
"""Where the host has most orders to give for a piece, however large that is: kernels for few bits, or products, copies
and events for a processor that attends. If it is not quick, everything waits for it.
"""

_MORE_GPU_SLOTS_BESIDE_CPU = 1
"""Where the processor attends, the link goes on in each layer only as long as there is room in slots."""


@dataclass(frozen=True)
class RunPlan:
    """What the run does with its memory. All sizes in bytes.

    `weight_bytes` is slots plus resident pieces; `kv_tokens` how many tokens of KV cache `kv_bytes` hold;
    `streamed_bytes_per_sweep` what has to come from the drive for each sweep; `explanation` are lines for the user.
    `max_sequences`, `max_scored_tokens` and `state_tokens` are those of `scheduling.limits.Limits`; `max_length` is the
    longest sequence in tokens that the activations are planned for, None where any length goes. `transfer` is how
    pieces are read. `kv` are the tiers of the KV cache on a GPU, if it has two; `kv_disk` those of RAM and drive;
    `low_bit_kv` says what a KV cache of fewer than 16 bits is; with `kv_on_cpu` all of it is in RAM beside a GPU, and
    the processor attends. With `tables_in_ram` the matrices whose rows are looked up are in RAM as a whole, counted in
    `weight_bytes`. `copied_bytes_per_sweep` are the weights that cross to a GPU in each sweep. `graph_bytes` are
    what is left of a GPU that holds all weights, for CUDA graphs.
    """

    sweep: SweepPlan
    placement: Placement
    memory_bytes: int
    weight_bytes: int
    model_bytes: int
    resident_bytes: int
    kv_bytes: int
    kv_tokens: int
    max_batch_tokens: int
    activation_bytes: int
    streamed_bytes_per_sweep: int
    max_sequences: int
    max_scored_tokens: int
    state_tokens: int
    max_length: int | None
    transfer: Transfer
    explanation: tuple[str, ...]
    kv: KVPlacement | None = None
    kv_disk: KVDiskPlacement | None = None
    low_bit_kv: LowBitKV | None = None
    kv_on_cpu: bool = False
    tables_in_ram: bool = False
    copied_bytes_per_sweep: int = 0
    graph_bytes: int = 0

    @property
    def kv_page_tokens(self) -> int:
        """A sequence takes KV cache in pages of so many tokens."""
        if self.kv_disk is not None:
            return self.kv_disk.most_page_tokens
        return PAGE_TOKENS if self.kv is not None else 1


def plan_run(
    manifest: Manifest,
    facts: ModelFacts,
    *,
    memory_bytes: int,
    weight_memory_bytes: int | None = None,
    gpu_memory_bytes: int | None = None,
    gpu_context_bytes: int = 0,
    max_batch_tokens: int | None = None,
    max_model_len: int | None = None,
    max_kv_tokens: int | None = None,
    max_kv_sequences: int | None = None,
    tokenizer_bytes: int = 0,
    transfer: Transfer = WITHOUT_PROFILE,
    kv_in_ram: bool = False,
    kv_on_disk: KVOnDisk | None = None,
    low_bit_kv: LowBitKV | None = None,
    kv_on_cpu: bool = False,
) -> RunPlan:
    """Spend `memory_bytes`: processes, activations, KV cache, and the rest on weights (or `weight_memory_bytes`, if
    that is given). `max_batch_tokens` None: `default_batch_tokens`. `max_kv_tokens` are all that will be needed, in
    `max_kv_sequences` at the same time: there is room for them if at all possible, and what the KV cache does not take
    is left to the weights; of logits, too, there are no more than for those. `tokenizer_bytes` are the compute
    worker's beside the processes. `kv_in_ram` gives the KV cache of a GPU a second tier, `kv_on_disk` that of a CPU,
    and that of a GPU a second and a third; `low_bit_kv` is what it is held in; with `kv_on_cpu` a GPU leaves all of it
    to RAM and the processor.

    With `gpu_memory_bytes` the GPU computes (its CUDA context takes `gpu_context_bytes` of them): activations and KV
    cache are there, and as many pieces as fit. Raises BudgetError with the least that would do and what takes it.
    """
    if low_bit_kv is not None:
        facts = low_bit_kv.applied_to(facts)
    if gpu_memory_bytes is not None:
        if kv_on_disk is not None and kv_in_ram:
            raise InputError("--kv-on-disk uses RAM, too: leave --kv-in-ram out, or --kv-on-disk")
        if kv_on_cpu and not facts.ragged:
            raise UnsupportedModelError(
                f"--kv-on-cpu: architecture {facts.model_type!r} keeps its model's own KV cache, on the GPU; leave the "
                "option out"
            )
        return _plan_gpu_run(
            manifest,
            facts,
            memory_bytes,
            weight_memory_bytes,
            gpu_memory_bytes,
            gpu_context_bytes,
            max_batch_tokens,
            max_model_len,
            max_kv_tokens,
            max_kv_sequences,
            tokenizer_bytes,
            transfer,
            kv_in_ram,
            kv_on_disk,
            low_bit_kv,
            kv_on_cpu,
        )
    for name, wanted in (("--kv-on-cpu", kv_on_cpu), ("--kv-in-ram", kv_in_ram)):
        if wanted:
            raise InputError(f"{name} is for a GPU; without one the KV cache is in RAM already: leave it out")
    processes = PROCESS_BYTES + tokenizer_bytes + len(manifest.stripes) * LOADER_BYTES
    context = min(facts.context_length, max_model_len or facts.context_length)
    itemsize = 4 if manifest.precision == "float32" else 2
    rows = logits_rows(facts, memory_bytes, max_kv_sequences)
    if max_batch_tokens is None:
        max_batch_tokens = default_batch_tokens(facts, rows, itemsize, context, memory_bytes - processes)
    activations = activation_bytes(facts, max_batch_tokens, rows, itemsize, context)
    whole = whole_bytes(manifest, facts)
    least_weights = min(whole, least_weight_bytes(manifest, facts))
    least_kv = LEAST_KV_TOKENS * facts.kv_bytes_per_token + facts.state_bytes
    if kv_on_disk is not None:
        least_kv = least_ram_bytes(facts, low_bit_kv)
    wanted_tokens = wanted_kv_tokens(context, max_kv_tokens)
    num_sequences = rows if max_kv_tokens is None else min(rows, max_kv_sequences or 1)
    fixed = processes + activations
    if weight_memory_bytes is not None:
        if weight_memory_bytes < least_weights:
            raise BudgetError(
                f"--weight-memory {format_size(weight_memory_bytes)} is too low: at least "
                f"{format_least(least_weights)} would do: the largest matrix part that must be in memory at once, and "
                "what always stays"
            )
        # More than the whole model is never used.
        weight_memory_bytes = min(weight_memory_bytes, whole)
    wanted_weights = least_weights if weight_memory_bytes is None else weight_memory_bytes
    if memory_bytes < fixed + least_kv + wanted_weights:
        lower = "; or lower --weight-memory" if wanted_weights > least_weights else ""
        raise BudgetError(
            f"--memory {format_size(memory_bytes)} is too low: at least "
            f"{format_least(fixed + least_kv + wanted_weights)} would do: processes {format_size(processes)}, "
            f"activations {format_size(activations)}, {_least_kv_line(least_kv, kv_on_disk)}, "
            f"weights {format_size(wanted_weights)}{lower}"
        )
    spare = memory_bytes - fixed - wanted_weights
    staging = transfer.staging_bytes if weight_memory_bytes is None else 0
    wanted_kv = wanted_kv_bytes(facts, context, max_kv_tokens, max_kv_sequences or 1, low_bit_kv)
    if kv_on_disk is not None:
        wanted_kv = ram_bytes_for(facts, wanted_tokens, low_bit_kv, num_sequences)
    kv_bytes = max(least_kv, min(kv_room(spare, max_kv_tokens, staging), wanted_kv))
    weight_bytes = weight_memory_bytes if weight_memory_bytes is not None else memory_bytes - fixed - kv_bytes
    sweep, placement, used, resident, streamed = place(manifest, facts, weight_bytes, transfer)
    if weight_memory_bytes is not None:
        kv_bytes = min(spare, max(kv_bytes, 0))
    elif used < weight_bytes:  # the whole model fits: what is left may hold KV
        most = max(WANTED_KV_TOKENS, 4 * context) * facts.kv_bytes_per_token
        kv_bytes = min(memory_bytes - fixed - used, max(kv_bytes, most))
    kv_tokens, state_tokens = kv_tokens_of(facts, kv_bytes)
    kv_disk, held_bytes = None, kv_bytes
    if kv_on_disk is not None:
        kv_disk = place_kv(facts, kv_bytes, wanted_tokens, kv_on_disk, 0, low_bit_kv, num_sequences)
        kv_bytes, kv_tokens, state_tokens = kv_disk.ram_bytes + kv_disk.windows_bytes, kv_disk.kv_tokens, 0
        rows, held_bytes = min(rows, kv_disk.max_sequences), kv_disk.ram_bytes + kv_disk.disk_bytes
    model_bytes = sum(piece.read_bytes for piece in sweep.pieces)
    return RunPlan(
        sweep=sweep,
        placement=placement,
        memory_bytes=memory_bytes,
        weight_bytes=used,
        model_bytes=model_bytes,
        resident_bytes=resident,
        kv_bytes=kv_bytes,
        kv_tokens=int(kv_tokens),
        max_batch_tokens=max_batch_tokens,
        activation_bytes=activations,
        streamed_bytes_per_sweep=streamed,
        max_sequences=rows,
        max_scored_tokens=scored_tokens(facts, rows),
        state_tokens=state_tokens,
        max_length=None if facts.chunked else max_batch_tokens,
        transfer=transfer,
        explanation=(
            f"of it: weights {_weights_line(used, placement.num_slots, placement.slot_bytes, resident)}, KV cache "
            f"{format_size(kv_bytes)} ({kv_tokens} tokens{low_bit_line(held_bytes, low_bit_kv)}), activations "
            f"{format_size(activations)}, processes "
            f"{format_size(processes)}",
            f"model {format_size(manifest.total_bytes)}: "
            + (f"{format_size(streamed)} stream from the drive in every sweep" if streamed else "nothing has to stream")
            + lookups_line(manifest),
            *(() if kv_disk is None else (kv_disk.describe(low_bit_kv),)),
        ),
        kv_disk=kv_disk,
        low_bit_kv=low_bit_kv,
    )


def _plan_gpu_run(
    manifest: Manifest,
    facts: ModelFacts,
    memory_bytes: int,
    weight_memory_bytes: int | None,
    gpu_memory_bytes: int,
    gpu_context_bytes: int,
    max_batch_tokens: int | None,
    max_model_len: int | None,
    max_kv_tokens: int | None,
    max_kv_sequences: int | None,
    tokenizer_bytes: int,
    transfer: Transfer,
    kv_in_ram: bool,
    kv_on_disk: KVOnDisk | None,
    low_bit_kv: LowBitKV | None,
    kv_on_cpu: bool,
) -> RunPlan:
    processes = CUDA_PROCESS_BYTES + tokenizer_bytes + len(manifest.stripes) * LOADER_BYTES
    context = min(facts.context_length, max_model_len or facts.context_length)
    itemsize = 4 if manifest.precision == "float32" else 2
    rows = logits_rows(facts, gpu_memory_bytes, max_kv_sequences)
    if max_batch_tokens is None:
        max_batch_tokens = default_batch_tokens(facts, rows, itemsize, context, gpu_memory_bytes - gpu_context_bytes)
    wanted_tokens = wanted_kv_tokens(context, max_kv_tokens)
    num_sequences = rows if max_kv_tokens is None else min(rows, max_kv_sequences or 1)
    low_bit_weights = any(tensor.panels is not None for block in manifest.blocks for tensor in block.tensors)
    lean = not low_bit_weights and low_bit_kv is None and kv_on_disk is None
    place: Place = "lean gpu" if lean else "gpu"
    activations = activation_bytes(facts, max_batch_tokens, rows, itemsize, context, rows, place=place)
    if low_bit_weights:
        activations += GPU_SCRATCH_BYTES
    if kv_on_cpu:
        activations += earlier_bytes(facts, context, max_kv_tokens, low_bit_kv)
    least_slot = least_slot_bytes(manifest)
    least_sweep = sweep_plan(manifest, facts, least_slot)
    always = sum(p.read_bytes for p in least_sweep.pieces if p.kind == "rest")
    least_gpu = (least_sweep.max_held + 1) * least_slot + always
    least_kv = LEAST_KV_TOKENS * facts.kv_bytes_per_token + facts.state_bytes
    pages_of_sweep, sweep_kv = sweep_pages(max_batch_tokens, context), 0
    if kv_in_ram and facts.ragged and facts.kv_bytes_per_token:
        nbytes, units = tier_units(facts, low_bit_kv)
        least_kv = least_tier_bytes(facts, low_bit_kv)
        # Or of all tokens that are wanted: a layer of each, and the next one's, are on the GPU at a time.
        passing = max(pages_of_sweep, wanted_pages(max_kv_tokens, max_kv_sequences or 1))
        sweep_kv = in_flight_units(units, passing) * nbytes
    if kv_on_disk is not None:
        least_kv = gpu_bytes_for(facts, 1, low_bit_kv)
    least_host_kv = 0
    if kv_on_cpu:
        least_kv, least_host_kv, sweep_kv = 0, least_kv, 0
    fixed = gpu_context_bytes + activations
    if gpu_memory_bytes < fixed + least_kv + least_gpu:
        raise BudgetError(
            f"--gpu-memory {format_size(gpu_memory_bytes)} is too low: at least "
            f"{format_least(fixed + least_kv + least_gpu)} would do: CUDA context {format_size(gpu_context_bytes)}, "
            f"activations {format_size(activations)}, {_least_kv_line(least_kv, kv_on_disk)}, "
            f"weights {format_size(least_gpu)}; or lower --max-batch-tokens"
        )
    spare = gpu_memory_bytes - fixed - least_gpu
    loose = min(loose_bytes(facts, max_batch_tokens, itemsize, place), (spare - least_kv) // 2)
    activations, fixed, spare = activations + loose, fixed + loose, spare - loose
    wanted_kv = wanted_kv_bytes(facts, context, max_kv_tokens, max_kv_sequences or 1, low_bit_kv)
    if kv_on_disk is not None:
        # The newest pages of those that run at the same time: what is beyond them is never used, and the weights'.
        wanted_kv = gpu_bytes_for(facts, num_sequences, low_bit_kv)
    wanted_host_kv = 0
    if kv_on_cpu:
        wanted_kv, wanted_host_kv = 0, wanted_kv
        transfer = replace(transfer, num_gpu_slots=transfer.num_gpu_slots + _MORE_GPU_SLOTS_BESIDE_CPU)
    if kv_on_cpu or low_bit_weights:
        transfer = transfer.in_fewer_slots(_LARGER_GPU_SLOTS)
    # On a GPU, pages whose others are in RAM or on the drive take a share however many tokens are asked for.
    some = None if kv_in_ram or kv_on_disk is not None else max_kv_tokens
    kv_bytes = max(least_kv, min(kv_room(spare, some, transfer.num_gpu_slots * transfer.slot_bytes), wanted_kv))
    # Requests that take two sweeps for want of pages load all weights twice: more than what these pages take from them.
    kv_bytes = max(kv_bytes, min(spare // 2, sweep_kv))
    gpu_weights = gpu_memory_bytes - fixed - kv_bytes
    least_host = 2 * least_slot
    if weight_memory_bytes is not None and weight_memory_bytes < least_host:
        raise BudgetError(
            f"--weight-memory {format_size(weight_memory_bytes)} is too low: at least {format_least(least_host)} would "
            "do: two slots for the largest matrix part that must be in one"
        )
    if memory_bytes < processes + least_host + least_host_kv:
        raise BudgetError(
            f"--memory {format_size(memory_bytes)} is too low: at least "
            f"{format_least(processes + least_host + least_host_kv)} would do: processes with CUDA "
            f"{format_size(processes)}, slots {format_size(least_host)}"
            + (f", KV cache of {LEAST_KV_TOKENS} tokens {format_size(least_host_kv)}" if kv_on_cpu else "")
        )
    # Weights that were asked for have their room before keys and values in RAM, as on the CPU.
    wanted_host = max(least_host, min(weight_memory_bytes or 0, sum(p.read_bytes for p in least_sweep.pieces)))
    spare_ram = max(0, memory_bytes - processes - wanted_host)
    ram_room = kv_room(spare_ram, max_kv_tokens, transfer.staging_bytes if weight_memory_bytes is None else 0)
    kv = None
    if kv_in_ram:
        tokens_each = context if max_kv_tokens is None else min(context, -(-max_kv_tokens // num_sequences))
        kv = kv_tiers(
            manifest, facts, kv_bytes, spare_ram, context, pages_of_sweep, low_bit_kv, num_sequences, tokens_each,
            max_kv_tokens,
        )  # fmt: skip
    kv_ram_bytes = kv.ram_bytes if kv is not None else 0
    if kv_on_cpu:
        kv_ram_bytes = max(least_host_kv, min(ram_room, wanted_host_kv))
    kv_disk = None
    if kv_on_disk is not None:
        kv_ram_bytes = min(ram_room, ram_bytes_for(facts, wanted_tokens, low_bit_kv, num_windows=0))
        kv_ram_bytes = max(kv_ram_bytes, least_ram_bytes(facts, low_bit_kv, num_windows=0))
        if memory_bytes - processes - least_host < kv_ram_bytes:
            raise BudgetError(
                f"--memory {format_size(memory_bytes)} is too low: at least "
                f"{format_least(processes + least_host + kv_ram_bytes)} would do: processes with CUDA "
                f"{format_size(processes)}, slots {format_size(least_host)}, "
                f"{_least_kv_line(kv_ram_bytes, kv_on_disk)}"
            )
        kv_disk = place_kv(facts, kv_ram_bytes, wanted_tokens, kv_on_disk, kv_bytes, low_bit_kv)
        kv_ram_bytes, rows = kv_disk.ram_bytes, min(rows, kv_disk.max_sequences)
    host = memory_bytes - processes - kv_ram_bytes
    if weight_memory_bytes is not None:
        host = min(host, weight_memory_bytes)
    slot_bytes = max(least_slot, min(transfer.slot_bytes, int(gpu_weights * STAGING_SHARE) // transfer.num_gpu_slots,
                                     int(host * STAGING_SHARE) // transfer.num_slots) // 4096 * 4096)  # fmt: skip
    sweep = sweep_plan(manifest, facts, slot_bytes)
    model_bytes = sum(piece.read_bytes for piece in sweep.pieces)
    whole = model_bytes <= gpu_weights
    gpu_slots = 0 if whole else max(sweep.max_held + 1, min(transfer.num_gpu_slots, gpu_weights // slot_bytes))
    on_gpu = choose_residents(sweep.pieces, gpu_weights - gpu_slots * slot_bytes)
    off_gpu = [piece for piece in sweep.pieces if piece.index not in set(on_gpu)]
    num_slots = min(transfer.num_slots, max(2, int(host * STAGING_SHARE) // slot_bytes))
    left = host - num_slots * slot_bytes
    in_ram = choose_residents(off_gpu, left)
    arenas, places = pack_arenas(sweep.pieces, in_ram)
    resident = sum(sweep.pieces[i].read_bytes for i in in_ram)
    looked_up = looked_up_bytes(manifest, facts)
    tables_in_ram = len(in_ram) == len(off_gpu) and resident + looked_up <= left
    gpu_resident = sum(sweep.pieces[i].read_bytes for i in on_gpu)
    kept = set(on_gpu) | set(in_ram)
    streamed = sum(sweep.pieces[i].read_bytes for i in sweep.order if i not in kept)
    copied = sum(sweep.pieces[i].read_bytes for i in sweep.order if i not in set(on_gpu))
    kv_tokens, state_tokens = kv_tokens_of(facts, kv_ram_bytes if kv_on_cpu else kv_bytes)
    held_bytes = kv_ram_bytes if kv_on_cpu else kv_bytes
    if kv is not None:
        kv_tokens, held_bytes = kv.kv_tokens, kv_bytes + kv_ram_bytes
        if kv.max_sequences is not None:
            rows, state_tokens = min(rows, kv.max_sequences), 0
    if kv_disk is not None:
        kv_tokens, state_tokens, held_bytes = kv_disk.kv_tokens, 0, kv_disk.ram_bytes + kv_disk.disk_bytes
    used = num_slots * slot_bytes + resident + tables_in_ram * looked_up
    low_bit = low_bit_line(held_bytes, low_bit_kv)
    kv_line = in_ram_line(kv_on_cpu, kv_tokens, low_bit, None if kv is None else low_bit_kv)
    return RunPlan(
        sweep=sweep,
        placement=Placement(slot_bytes, num_slots, arenas, places, gpu_slots, tuple(on_gpu)),
        memory_bytes=memory_bytes,
        weight_bytes=used,
        model_bytes=model_bytes,
        resident_bytes=resident + gpu_resident,
        kv_bytes=kv_bytes + kv_ram_bytes,
        kv_tokens=int(kv_tokens),
        max_batch_tokens=max_batch_tokens,
        activation_bytes=activations,
        streamed_bytes_per_sweep=streamed,
        max_sequences=rows,
        max_scored_tokens=scored_tokens(facts, rows),
        state_tokens=state_tokens,
        max_length=None if facts.chunked else max_batch_tokens,
        transfer=transfer,
        explanation=(
            f"of it: weights {_weights_line(used, num_slots, slot_bytes, used - num_slots * slot_bytes)}, "
            + (f"KV cache {format_size(kv_ram_bytes)}{kv_line}, " if kv_ram_bytes else "")
            + f"processes with CUDA {format_size(processes)}",
            f"GPU memory budget {format_size(gpu_memory_bytes)}: weights "
            f"{_weights_line(gpu_resident + gpu_slots * slot_bytes, gpu_slots, slot_bytes, gpu_resident)}, "
            + ("" if kv_on_cpu else f"KV cache {format_size(kv_bytes)} ({kv_tokens} tokens{low_bit}{tiers_line(kv)}), ")
            + f"activations {format_size(activations)}, CUDA context {format_size(gpu_context_bytes)}",
            f"model {format_size(manifest.total_bytes)}: {format_size(copied)} cross to the GPU and "
            f"{format_size(streamed)} come from the drive in every sweep"
            + lookups_line(manifest, looked_up if tables_in_ram else None),
            *(() if kv_disk is None else (kv_disk.describe(low_bit_kv),)),
        ),
        kv=kv,
        kv_disk=kv_disk,
        low_bit_kv=low_bit_kv,
        kv_on_cpu=kv_on_cpu,
        tables_in_ram=tables_in_ram,
        copied_bytes_per_sweep=copied,
        graph_bytes=0 if copied else gpu_weights - gpu_resident,
    )


def _least_kv_line(nbytes: int, kv_on_disk: KVOnDisk | None) -> str:
    """What the least KV cache is: with a drive behind it that is no number of tokens."""
    if kv_on_disk is None:
        return f"KV cache of {LEAST_KV_TOKENS} tokens {format_size(nbytes)}"
    return f"KV pages {format_size(nbytes)} (one of each layer, and those on their way)"


def _weights_line(used: int, num_slots: int, slot_bytes: int, resident: int) -> str:
    if not num_slots:
        return f"{format_size(used)} (all resident)"
    return f"{format_size(used)} ({num_slots} slots of {format_size(slot_bytes)}, {format_size(resident)} resident)"
