"""Models larger than the GPU budget, streamed from RAM: pipo against the limit that the link sets.

How to run (a machine with CUDA, 60 GB of RAM and of temporary disk; ten minutes):

    python benchmarks/gpu_stream.py [--shapes llama-3-8b,opt-13b] [--rows 1,4,32,prompt,disk,kv] [--gpu-memory 6GiB]
                                    [--folder FOLDER] [--json FILE] [--trace FOLDER] [--[no-]kv-on-cpu] [--quick]
                                    [--mode memory-saver] [--slots 64MiBx3]
    python benchmarks/gpu_stream.py --precision int4 --shapes opt-30b,llama-3-70b --rows 1,4,32    (100 GB of RAM)
    python benchmarks/gpu_stream.py --precision int4 --shapes opt-30b --rows 32 --no-kv-on-cpu

Checkpoints of these shapes with random bf16 weights are made and packed in --folder (a temporary one); with --precision
the bits of the checkpoint are made up as they are read (`invented_weights.py`). Decoding: 1, 4, or 32 requests with
prompts of 32 tokens; rounds of --sweeps sweeps, between them the pure copies of the pieces that a sweep moves, from
pinned memory, in another process. `prompt`: 8 prompts of 2048 tokens (or as many as the model has positions for) in one
sweep, others in every round; KV beyond the GPU's room goes to RAM as it is made, and the GPU attends whatever the
number of tokens, because nothing is decoded behind them. `disk`: one request, and 8 GiB of RAM
for everything. `kv`: 8 requests decode behind such long prompts, and what the GPU has no room for of their KV crosses
the link from RAM in every sweep, beside the weights.

    link limit   (weights without what is looked up - (GPU budget - 1 GiB)) / rate of the pure copies
    disk limit   of the row `disk`: (the same - (RAM budget - 1.5 GiB)) / the best rate of plain O_DIRECT reads, of
                 several sizes and depths, before each round (for want of fio, 3 s)
    copies' time of the row `kv`, its limit: (weights and KV that cross the link in a sweep) / rate of the pure copies
    of limit     median over the rounds of link limit / seconds per sweep
    fed          share of the sweeps in which the compute stream did not wait for a piece, by CUDA's events
    *            behind a row: the KV cache is in RAM, and the processor attends
    busy         seconds in which a kernel ran, by CUPTI in a further sweep, over those of a sweep in the compute worker
    retries      how often in the rounds torch's allocator gave memory back for want of a place, while the GPU is idle
    link         share of the time between tokens in which weights were being copied, by CUDA's events, and how fast
    GPU          most bytes that torch reserved, and the CUDA context
    start        seconds until requests are taken; pinned: from then on, until the last page of RAM that holds weights
                 is registered with CUDA, in the background
    slots        MiB of staging: in RAM, and on the GPU

`--slots`: other slots than pipo chooses, of this size, so many on the GPU and two in RAM, to compare them; as
pipo's own, they are twice as large where weights have few bits or the processor attends.
`--quick`: a model of 3 GB and a budget of 2 GiB, to see whether everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pinned_link import PinnedLink
from random_llama import LlamaShape, make_checkpoint
from random_opt import OPT_13B, OptShape

from pipo_ray import LLM, SamplingParams
from pipo_ray.plan.drive_probe import measure_drive
from pipo_ray.plan.pieces import PAGE
from pipo_ray.plan.transfer import Transfer
from pipo_ray.session.memory import format_size, parse_size

SHAPES: dict[str, LlamaShape | OptShape] = {
    "llama-3-8b": LlamaShape(32, 4096, 14336, 32, 8, vocabulary=128256, rope_theta=500000.0),
    "opt-13b": OPT_13B,
    "opt-30b": OptShape(layers=48, hidden=7168, heads=56),
    "llama-3-70b": LlamaShape(80, 8192, 28672, 64, 8, vocabulary=128256, rope_theta=500000.0),
    "small": LlamaShape(12, 4096, 14336, 32, 8),
}
PROMPT = 32
LONG, LONG_PROMPTS = 2048, 8
ROWS = ("1", "4", "32", "prompt", "disk", "kv")
BESIDE_WEIGHTS = 1 << 30
"""Bytes of the GPU budget that the link limit leaves for everything that is not weights."""


BESIDE_RAM_WEIGHTS = 3 << 29
"""The same for the RAM budget and the disk limit."""
DISK_ROW_MEMORY = 8 << 30


def settings(row: str, sweeps: int, gpu_memory: int, shape: LlamaShape | OptShape) -> dict[str, Any]:
    """The arguments of LLM for a row."""
    if row in ("prompt", "kv"):
        tokens = LONG_PROMPTS * long_prompt(shape)
        large = row == "kv" or tokens * shape.kv_bytes_per_token > gpu_memory // 2
        return {
            "max_batch_tokens": tokens, "memory": "64GiB",
            "max_kv_tokens": tokens + 16 * LONG_PROMPTS, "max_kv_sequences": LONG_PROMPTS, "kv_in_ram": large,
            "kv_on_cpu": False,
        }  # fmt: skip
    batch = 1 if row == "disk" else int(row)
    length = PROMPT + sweeps + 3
    return {
        "max_batch_tokens": max(64, min(256, batch * PROMPT)), "max_kv_tokens": batch * length,
        "memory": DISK_ROW_MEMORY if row == "disk" else "64GiB",
    }  # fmt: skip


def long_prompt(shape: LlamaShape | OptShape) -> int:
    """Tokens of a prompt that computing bounds; one more is to be generated."""
    return min(LONG, shape.positions - 16)


def prompts_for(row: str, shape: LlamaShape | OptShape, number: int) -> list[list[int]]:
    """Token ids without meaning, different in every prompt and for every `number`: nothing is there from before."""
    long = row in ("prompt", "kv")
    count = LONG_PROMPTS if long else 1 if row == "disk" else int(row)
    length = long_prompt(shape) if long else PROMPT
    generator = torch.Generator().manual_seed(1000 * number + count)
    return torch.randint(3, shape.vocabulary, (count, length), generator=generator).tolist()


def decode(llm: LLM, prompts: Sequence[Sequence[int]], sweeps: int, watched: bool = False) -> float:
    """Seconds per sweep: between the tokens of the last request, when all of them decode. With `watched` one of the
    sweeps in which they do is watched by CUPTI.
    """
    params = SamplingParams(temperature=0.0, max_tokens=sweeps + 2, ignore_eos=True)
    times: dict[str, list[tuple[float, int]]] = {}
    for output in llm.stream([list(prompt) for prompt in prompts], params):
        times.setdefault(output.request_id, []).append((time.perf_counter(), len(output.outputs[0].token_ids)))
        if watched and len(times) == len(prompts):
            watch_kernels(llm)
            watched = False
    last = times[max(times, key=lambda name: times[name][0][0])]  # the request that began last
    return (last[-1][0] - last[0][0]) / (last[-1][1] - last[0][1])


def stage_times(llm: LLM, stage: str) -> dict[str, float]:
    """What an actor reports of itself."""
    found: dict[str, float] = next(one for one in llm.report()["stages"] if one["stage"] == stage)
    return found


def worker_times(llm: LLM) -> dict[str, float]:
    """What the compute worker reports: seconds busy, waiting for pieces (its compute stream by CUDA's events), ..."""
    return stage_times(llm, "ComputeWorker")


def busy_reading(llm: LLM) -> float:
    """Seconds in which the loader had reads in flight."""
    return stage_times(llm, "NvmeLoader")["busy_s"]


def watch_kernels(llm: LLM) -> None:
    """Let the compute worker watch the kernels of its next sweep."""
    stage = llm._stage
    stage.call(stage.compute_worker, "watch_kernels")


def run_row(
    store: Path,
    name: str,
    row: str,
    gpu_memory: int,
    sweeps: int,
    rounds: int,
    shape: LlamaShape | OptShape,
    precision: str | None = None,
    trace: Path | None = None,
    kv_on_cpu: bool | None = None,
    mode: str = "performance",
    transfer: Transfer | None = None,
) -> dict[str, Any]:
    """One line of the table."""
    begin = time.perf_counter()
    options = {**settings(row, sweeps, gpu_memory, shape), "mode": mode, "transfer": transfer}
    if kv_on_cpu is not None:
        options["kv_on_cpu"] = kv_on_cpu
    prompts = prompts_for(row, shape, 0)
    with LLM(store, device="cuda", gpu_memory=gpu_memory, trace=trace, **options) as llm:
        started = time.perf_counter() - begin
        pinned = Pinned(llm)
        print(*llm.describe(), sep="\n", flush=True)
        plan = llm._plan
        kept = set(plan.placement.gpu_residents)
        sizes = [plan.sweep.pieces[i].read_bytes for i in plan.sweep.order if i not in kept]
        one = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        warm_up = time.perf_counter()
        if row == "prompt":
            llm.generate(prompts, one)
        else:
            decode(llm, prompts, 2)
        warm_up = time.perf_counter() - warm_up
        pinned_s = pinned.seconds()
        worker = worker_times(llm)
        seconds, limits, fed, links, copying, in_worker, kv_bytes = [], [], [], [], [], [], [0.0]
        drives, reading = list[float](), list[float]()
        with PinnedLink() as link:
            link.rate(sizes)
            streamable = plan.model_bytes
            if precision is None:
                streamable = shape.num_bytes - shape.embedding_bytes
            for number in range(1, rounds + 1):
                prompts = prompts_for(row, shape, number)
                links.append(link.rate(sizes))
                drive = drive_rate(store) if row == "disk" else 0.0
                read_before, begin_s = busy_reading(llm), time.perf_counter()
                before, sweeps_before = worker_times(llm), llm.report()["sweeps"]
                if row == "kv":  # the same with fewer sweeps, to know what one of them loads
                    decode(llm, prompts, 2)
                    short = before
                    before, sweeps_before = worker_times(llm), llm.report()["sweeps"]
                if row == "prompt":
                    begin_s = time.perf_counter()
                    llm.generate(prompts, one)
                    seconds.append(time.perf_counter() - begin_s)
                else:
                    seconds.append(decode(llm, prompts, sweeps))
                if row == "disk":
                    drives.append(drive)
                    reading.append((busy_reading(llm) - read_before) / (time.perf_counter() - begin_s))
                after = worker_times(llm)
                spent = {name: after[name] - before[name] for name in ("busy_s", "waiting_s", "weight_copies_s")}
                fed.append(spent["busy_s"] / (spent["busy_s"] + spent["waiting_s"]))
                # A round has sweeps over the prompts besides, and the first copies of the next one.
                count = llm.report()["sweeps"] - sweeps_before
                copying.append(spent["weight_copies_s"] / (count if row == "prompt" else count + 1))
                in_worker.append((spent["busy_s"] + spent["waiting_s"]) / count)
                left = streamable - max(0, gpu_memory - BESIDE_WEIGHTS)
                if row == "kv":
                    moved = [one["kv_loaded_bytes"] for one in (short, before, after)]
                    kv_bytes.append((moved[2] - 2 * moved[1] + moved[0]) / (sweeps - 2))
                    limits.append((sum(sizes) + kv_bytes[-1]) / links[-1])
                elif row == "disk":
                    limits.append((left - (DISK_ROW_MEMORY - BESIDE_RAM_WEIGHTS)) / drive)
                else:
                    limits.append(left / links[-1])
            retries = worker_times(llm)["gpu_alloc_retries"] - worker["gpu_alloc_retries"]
        for number in (rounds + 1, rounds + 2):  # the first one starts CUPTI, which takes seconds
            prompts = prompts_for(row, shape, number)
            if row == "prompt":
                watch_kernels(llm)
                llm.generate(prompts, one)
            else:
                decode(llm, prompts, min(sweeps, 4), watched=True)
        kernels_s = worker_times(llm)["kernels_s"]
    shares = [limit / took for limit, took in zip(limits, seconds, strict=True)]
    return {
        "shape": name, "row": row, "kv_on_cpu": plan.kv_on_cpu,
        "seconds": statistics.median(seconds), "limit_s": statistics.median(limits),
        "share": statistics.median(shares), "shares": shares, "fed": statistics.median(fed),
        "kernels_s": kernels_s, "busy": kernels_s / statistics.median(in_worker if row == "prompt" else seconds),
        "sweep_in_worker_s": statistics.median(in_worker), "alloc_retries": retries,
        "link_gb_s": statistics.median(links) / 1e9, "copied_gb": sum(sizes) / 1e9, "model_gb": shape.num_bytes / 1e9,
        "copy_s": sum(sizes) / statistics.median(links), "copying_s": statistics.median(copying),
        "tokens": sum(map(len, prompts)) if row == "prompt" else len(prompts),
        "gpu_reserved_gb": worker["gpu_reserved_bytes"] / 1e9, "gpu_context_gb": worker["gpu_context_bytes"] / 1e9,
        "gpu_budget_gb": gpu_memory / 1e9, "pinned_gb": worker["pinned_bytes"] / 1e9,
        "unpinned_gb": worker["unpinned_bytes"] / 1e9, "start_s": started, "warm_up_s": warm_up, "pinned_s": pinned_s,
        "mode": mode, "slots_mib": plan.placement.num_slots * plan.placement.slot_bytes / 2**20,
        "gpu_slots_mib": plan.placement.num_gpu_slots * plan.placement.slot_bytes / 2**20,
        "disk_gb_per_sweep": plan.streamed_bytes_per_sweep / 1e9,
        "drive_gb_s": statistics.median(drives or [0.0]) / 1e9,
        "reading": statistics.median(reading or [0.0]), "kv_gb_per_sweep": kv_bytes[-1] / 1e9,
    }  # fmt: skip


def drive_rate(store: Path) -> float:
    """Bytes per second of plain O_DIRECT reads of the store's largest file, as many at a time as is best."""
    file = max(store.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    return max(point.bytes_per_s for point in measure_drive(file, 3.0, 6.0))


class Pinned:
    """Watches how the resident pieces are registered in the background, from now on."""

    def __init__(self, llm: LLM, patience_s: float = 60.0) -> None:
        self._llm, self._begin, self._patience_s = llm, time.perf_counter(), patience_s
        self._end = 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def seconds(self) -> float:
        """Wait until all are registered: how long after the beginning that was."""
        self._thread.join()
        return self._end - self._begin

    def _watch(self) -> None:
        arena_bytes = sum(self._llm._plan.placement.arena_bytes)
        while time.perf_counter() < self._begin + self._patience_s:
            worker = worker_times(self._llm)
            self._end = time.perf_counter()
            if worker["pinned_bytes"] + worker["unpinned_bytes"] >= arena_bytes:
                return
            time.sleep(0.25)


def show(row: dict[str, Any]) -> None:
    """A line."""
    name = row["row"] + "*" * row["kv_on_cpu"]
    print(
        f"{row['shape']:>11}{name:>7}{row['seconds']:9.3f} s{row['tokens'] / row['seconds']:10.1f} tok/s"
        f"{row['limit_s']:9.3f} s{100 * row['share']:7.1f} %{100 * row['fed']:7.1f} %{100 * row['busy']:7.1f} %"
        f"{100 * row['copying_s'] / row['seconds']:6.1f} %{row['copied_gb'] / row['copying_s']:6.1f}"
        f"{row['link_gb_s']:8.1f}{row['copied_gb']:8.2f}{row['gpu_reserved_gb'] + row['gpu_context_gb']:8.2f}"
        f"{row['alloc_retries']:8}{row['start_s']:7.1f}{row['warm_up_s']:7.1f}{row['pinned_s']:7.1f}"
        f"{row['slots_mib']:6.0f} +{row['gpu_slots_mib']:4.0f}",
        flush=True,
    )
    if row["row"] == "disk":
        rate, plain = row["disk_gb_per_sweep"] / row["seconds"], row["drive_gb_s"]
        print(
            f"{'':11}from the drive {rate:.2f} GB/s of {plain:.2f} ({100 * rate / plain:.1f} %), "
            f"with reads in flight {100 * row['reading']:.1f} % of the time",
            flush=True,
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3-8b,opt-13b", help="default: %(default)s")
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--gpu-memory", default="6GiB")
    parser.add_argument("--precision", help="of the weights, for example int4 (default: 16 bits)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweeps", type=int, default=12, help="in a round")
    parser.add_argument("--folder", type=Path, help="for checkpoints and stores, which are kept there")
    parser.add_argument("--keep-checkpoints", action="store_true", help="for `gpu_peers/`")
    parser.add_argument(
        "--kv-on-cpu",
        action=argparse.BooleanOptionalAction,
        help="KV in RAM, the processor attends; default: pipo's choice",
    )
    parser.add_argument("--mode", choices=("performance", "memory-saver"), default="performance")
    parser.add_argument("--slots", help="SIZExNUMBER, of the slots on the GPU (default: what pipo chooses)")
    parser.add_argument("--quick", action="store_true", help="a small model and a small budget")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--trace", type=Path, help="a folder for a trace of each row, which costs speed")
    options = parser.parse_args()
    names, gpu_memory = options.shapes.split(","), parse_size(options.gpu_memory, "--gpu-memory")
    transfer = None
    if options.slots:
        size, number = options.slots.split("x")
        slot = parse_size(size, "--slots")
        transfer = Transfer(min(slot, 8 << 20), 4, slot + 2 * PAGE, 2, int(number))
    if options.quick:
        names, gpu_memory = ["small"], 2 << 30
    rows: list[dict[str, Any]] = []
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pipo-bench-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            store = make_store(folder, name, options.precision, options.keep_checkpoints)
            for row in options.rows.split(","):
                trace = options.trace / f"{name}-{row}.json" if options.trace else None
                rows.append(
                    run_row(
                        store, name, row, gpu_memory, options.sweeps, options.rounds, SHAPES[name], options.precision,
                        trace, options.kv_on_cpu, options.mode, transfer,
                    )
                )  # fmt: skip
                show(rows[-1])
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
            if options.folder is None:
                shutil.rmtree(store)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(torch.cuda.get_device_name(0), torch.__version__)
    print(
        f"{'shape':>11}{'batch':>7}{'a sweep':>11}{'':>16}{'limit':>11}{'of it':>9}{'fed':>9}{'busy':>9}{'link':>8}"
        f"{'GB/s':>6}{'limit':>8}{'GB':>8}{'GPU GB':>8}{'retries':>8}{'start':>7}{'first':>7}"
        f"{'pinned':>7}{'slots':>12}"
    )
    for one in rows:
        show(one)
    return 0


def make_store(folder: Path, name: str, precision: str | None, keep_checkpoint: bool) -> Path:
    """The packed store of a shape; its checkpoint is deleted unless it is to be kept."""
    from pipo_ray.prepare import pack_store

    store = folder / (f"{name}.store" if precision is None else f"{name}-{precision}.store")
    begin = time.perf_counter()
    if precision is not None and not store.exists():
        script = Path(__file__).with_name("invented_weights.py")
        subprocess.run([sys.executable, str(script), name, str(store), precision], check=True)
        print(f"{name} in {precision}: made up and packed in {time.perf_counter() - begin:.0f} s", flush=True)
    if not store.exists():
        make_checkpoint(folder / name, SHAPES[name])
        made = time.perf_counter()
        pack_store(folder / name, store)
        if not keep_checkpoint:
            shutil.rmtree(folder / name)
        print(
            f"{name}: {format_size(SHAPES[name].num_bytes)} made in {made - begin:.0f} s, packed in "
            f"{time.perf_counter() - made:.0f} s",
            flush=True,
        )
    return store


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
