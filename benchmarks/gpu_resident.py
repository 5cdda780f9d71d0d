"""Models that a GPU holds as a whole: how close a token comes to reading all weights once, with CUDA graphs or not.

How to run (a machine with CUDA, 40 GB of RAM and of temporary disk; five minutes; --quick a small model, one):

    python benchmarks/gpu_resident.py [--shapes llama-3-8b] [--precisions 16bit,int4] [--batches 1,4,32] [--rounds 5]
                                      [--folder DIR] [--quick] [--json FILE]

Decoding `batch` requests with prompts of 32 tokens, 24 tokens each, random weights. `limit`: the bytes of all weights
but the embedding table / the rate at which the GPU copies within its memory (bytes read and written), in the same run.
`kernels`: how long kernels ran in one sweep (CUPTI). With graphs and without are two processes of workers, one behind
the other; rounds are medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_stream import SHAPES, decode, make_store, prompts_for, settings, worker_times

import pipo_ray.llm
from pipo_ray import LLM
from pipo_ray.messages import ComputeSetup
from pipo_ray.session.memory import parse_size

SWEEPS = 24


def without_graphs(*arguments: Any, **options: Any) -> ComputeSetup:
    """A setup that leaves no memory to graphs."""
    return replace(ComputeSetup(*arguments, **options), graph_bytes=0)


def run_row(store: Path, shape: Any, batch: int, graphs: bool, rounds: int, gpu_memory: int) -> dict[str, Any]:
    """Seconds of a sweep, those of its kernels, and how many of the sweeps were graphs'."""
    options = settings(str(batch), SWEEPS, gpu_memory, shape)
    made = ComputeSetup if graphs else without_graphs
    with (
        mock.patch.object(pipo_ray.llm, "ComputeSetup", made),
        LLM(store, device="cuda", gpu_memory=gpu_memory, **options) as llm,
    ):
        plan = llm._plan
        if plan.copied_bytes_per_sweep:
            raise SystemExit(f"{store}: {plan.copied_bytes_per_sweep} bytes would stream; raise --gpu-memory")
        for number in (0, 1):
            decode(llm, prompts_for(str(batch), shape, number), 4)
        seconds = [decode(llm, prompts_for(str(batch), shape, 2 + number), SWEEPS) for number in range(rounds)]
        for number in range(2):  # the first one starts CUPTI, which takes seconds
            decode(llm, prompts_for(str(batch), shape, 2 + rounds + number), 4, watched=True)
        times = worker_times(llm)
        return {
            "batch": batch, "graphs": graphs, "seconds": statistics.median(seconds), "rounds": seconds,
            "kernels_s": times["kernels_s"], "graph_sweeps": times.get("graph_sweeps", 0),
            "graph_bytes": plan.graph_bytes, "model_bytes": plan.model_bytes,
            "reserved_bytes": times["gpu_reserved_bytes"], "context_bytes": times["gpu_context_bytes"],
        }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """A line."""
    print(
        f"{row['shape']:>12}{row['precision']:>9}{row['batch']:>7}{'yes' if row['graphs'] else 'no':>8}"
        f"{1e3 * row['seconds']:9.2f} ms{1e3 * row['kernels_s']:8.2f} ms{1e3 * row['limit_s']:8.2f} ms"
        f"{row['batch'] / row['seconds']:9.1f}",
        flush=True,
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3-8b")
    parser.add_argument("--precisions", default="16bit,int4")
    parser.add_argument("--batches", default="1,4,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu-memory", default="40GiB")
    parser.add_argument("--folder", type=Path, help="for stores, which are kept there")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    from gpu_low_bit_kernels import copy_rate  # it needs triton

    names, batches = options.shapes.split(","), [int(one) for one in options.batches.split(",")]
    if options.quick:
        names, batches = ["small"], [1]
    gpu_memory = parse_size(options.gpu_memory, "--gpu-memory")
    rate, rows = copy_rate(torch.device("cuda")), list[dict[str, Any]]()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pipo-bench-gpu-"))
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; copies at {rate / 1e9:.0f} GB/s")
    print(
        f"{'shape':>12}{'weights':>9}{'batch':>7}{'graphs':>8}{'a sweep':>12}{'kernels':>11}{'limit':>11}{'tok/s':>9}"
    )
    try:
        for name in names:
            for precision in options.precisions.split(","):
                store = make_store(folder, name, None if precision == "16bit" else precision, False)
                for batch in batches:
                    for graphs in (True, False):
                        row = run_row(store, SHAPES[name], batch, graphs, options.rounds, gpu_memory)
                        rows.append(row | {"shape": name, "precision": precision, "limit_s": row["model_bytes"] / rate})
                        show(rows[-1])
                        if options.json:
                            options.json.write_text(json.dumps(rows, indent=1))
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
