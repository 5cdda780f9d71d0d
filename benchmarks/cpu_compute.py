"""Products with bf16 weights on the CPU: ours against torch's own, and against what memory and cores allow.

How to run (about two minutes; a few seconds with --quick):

    python benchmarks/cpu_compute.py [--quick] [--clock wall|processor] [--threads N] [--rounds 7] [--json FILE]

Weights [14336, 4096] (of a feed-forward layer of Llama-3-8B; --quick: [2048, 2048]) times 1 to 512 rows of input.
Four weights in turn, so that none is in the cache. In each round, one after the other: a plain read of the weight's
bytes (an integer sum), ours, torch's `F.linear`, and a float32 product of the same size with weights that are float32
already. Two limits: reading the weight once at the plain read's speed, and the fastest product of any kind that was
seen. The greater of the two times is the limit. Ratios are medians over the rounds; [least - greatest] follows.

--clock processor counts seconds of processor time over the number of threads instead of seconds on the wall: for a
machine on which something else is running.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the compute worker

import torch
import torch.nn.functional as F

from pipo_ray.model.cpu_kernels import OwnKernels
from pipo_ray.model.cpu_linear import CpuProducts, measure_profile

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
TORCH_ROWS = 64
"""Torch's own product is measured up to so many rows, and taken to be in proportion beyond: it would take minutes."""


def seconds(call: Callable[[], object], clock: str) -> float:
    """Seconds of one call."""
    now = time.perf_counter if clock == "wall" else time.process_time
    begin = now()
    call()
    return (now() - begin) / (1 if clock == "wall" else torch.get_num_threads())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def measure(rows: Sequence[int], shape: tuple[int, int], rounds: int, clock: str) -> dict[str, Any]:
    """One entry per number of rows."""
    own = OwnKernels.of(torch.bfloat16)
    profile = measure_profile(torch.bfloat16, own)
    products = CpuProducts(profile, own)
    weights = [(torch.randn(shape) * 0.02).bfloat16() for _ in range(4)]
    bound = [products.bind(weight) for weight in weights]
    wide = weights[0].float()
    taken: dict[int, list[dict[str, float]]] = {count: [] for count in rows}
    for turn in range(rounds + 1):  # the first warms up
        weight, ours = weights[turn % 4], bound[turn % 4]
        for count in rows:
            inputs = torch.randn(count, shape[1]).bfloat16()
            few, inputs32 = inputs[:TORCH_ROWS], inputs.float()
            plain = weights[(turn + 2) % 4].view(torch.int64)
            times = {
                "read": seconds(plain.sum, clock),
                "ours": seconds(partial(F.linear, inputs, ours), clock),
                "torch": seconds(partial(F.linear, few, weight), clock) * count / len(few),
                "float32": seconds(partial(F.linear, inputs32, wide), clock),
            }
            if turn:
                taken[count].append(times)
    flops = {count: 2 * count * shape[0] * shape[1] for count in rows}
    peaks = {
        name: max(flops[count] / times[name] for count in counted for times in taken[count])
        for name, counted in (("ours", rows), ("torch", [r for r in rows if r <= TORCH_ROWS]), ("float32", rows))
    }
    peak = max(peaks.values())
    table = []
    for count in rows:
        limits = [max(times["read"], flops[count] / peak) for times in taken[count]]
        ours_s = [times["ours"] for times in taken[count]]
        table.append(
            {
                "rows": count,
                "kernel": profile.choose("linear", count, shape[0] * shape[1]),
                "ours_s": spread(ours_s),
                "weight_gb_s": weights[0].nbytes / statistics.median(ours_s) / 1e9,
                "gflop_s": flops[count] / statistics.median(ours_s) / 1e9,
                "ours_over_limit": spread([a / b for a, b in zip(ours_s, limits, strict=True)]),
                "torch_over_ours": spread([times["torch"] / times["ours"] for times in taken[count]]),
                "float32_over_ours": spread([times["float32"] / times["ours"] for times in taken[count]]),
            }
        )
    reads = [weights[0].nbytes / times["read"] / 1e9 for count in rows for times in taken[count]]
    return {"shape": shape, "read_gb_s": statistics.median(reads), "peak_gflop_s": peak / 1e9, "table": table}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows, shape = ((1, 4, 16, 128), (2048, 2048)) if options.quick else (ROWS, (14336, 4096))
    with torch.inference_mode():
        result = measure(rows, shape, options.rounds, options.clock)
    print(
        f"weights {shape[0]} x {shape[1]} in bf16, {options.threads} threads, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {options.clock} clock\n"
        f"plain read {result['read_gb_s']:.1f} GB/s, fastest product {result['peak_gflop_s']:.0f} GFLOP/s\n"
        "rows  kernel          ms  GB/s of weights  GFLOP/s   ours/limit            torch/ours            float32/ours"
    )
    for row in result["table"]:
        ratios = "  ".join(
            f"{row[key]['median']:6.2f} [{row[key]['least']:.2f} - {row[key]['greatest']:.2f}]".ljust(20)
            for key in ("ours_over_limit", "torch_over_ours", "float32_over_ours")
        )
        print(
            f"{row['rows']:4d}  {row['kernel']:8s} {row['ours_s']['median'] * 1e3:9.2f}  {row['weight_gb_s']:15.2f}"
            f"  {row['gflop_s']:7.1f}   {ratios}"
        )
    if options.json:
        facts = {"threads": options.threads, "clock": options.clock, "torch": torch.__version__, "time": time.time()}
        options.json.write_text(json.dumps({**facts, **result}, indent=1))


if __name__ == "__main__":
    main()
