"""From the disk to the compute worker through the actors, against fio on the same file.

How to run (fio; --size of free disk, twice that while it is made; three minutes):

    python benchmarks/disk_to_compute.py [--size 4GiB] [--rounds 5] [--sweeps 4] [--folder DIR] [--quick] [--json FILE]

A random Llama in bf16 with Llama-3-8B's layers decodes at batch 1, most of it streaming, so that a sweep takes as long
as its bytes take: bytes that stream in a sweep, by the seconds between tokens. fio is the best of libaio with O_DIRECT,
blocks of 1, 4 and 16 MiB, 1, 4 and 16 in flight; the best setting then takes turns with ours. While fio reads, our
slots are full and our loader is asleep. fio reads into ordinary pages, our slots lie in huge ones, which a virtual
drive fills faster; so there is a third in turns, the drive's own limit for us: nothing but reads as the loader makes
them, in one process, without Ray, into 64 MiB of huge pages. Printed: the rates, and the medians of the paired ratios
with their spread (goal: 0.95 of fio).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import fio
import huge_pages
from streaming import options, random_store, store_files, sweep_seconds

from pipo_ray import LLM
from pipo_ray.session.huge_pages import use_huge_pages
from pipo_ray.session.memory import parse_size


def measure(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """The figures of all rounds."""
    files = store_files(store)
    best = fio.sweep(files, 1.0 if arguments.quick else 2.0)[0]
    memory = huge_pages.touched()
    huge_bytes = use_huge_pages([memory])
    weight_memory = parse_size(arguments.weight_memory)
    with LLM(store, weight_memory=weight_memory, device="cpu", ray_address="local", max_kv_tokens=512) as llm:
        for line in llm.describe():
            print(line, file=sys.stderr)
        streamed = llm.report()["streamed_bytes_per_sweep"]
        sweep_seconds(llm, 1)  # residents are loaded, checksums checked
        setup = llm._stage._setup
        rows = []
        for _ in range(arguments.rounds):
            limit = fio.read(files, best.block_mib, best.depth, 2.0).bytes_per_s
            bare = bare_reads(files[0], memory, setup.transfer_bytes, setup.read_threads, 2.0)
            rows.append({"fio": limit, "bare": bare, "ours": streamed / sweep_seconds(llm, arguments.sweeps)})
        stages = llm.report()["stages"]
    ratios = [row["ours"] / row["fio"] for row in rows]
    bare_ratios = [row["ours"] / row["bare"] for row in rows]
    return {
        "fio": fio.version(), "fio_setting": {"block_mib": best.block_mib, "depth": best.depth},
        "streamed_bytes_per_sweep": streamed, "rounds": rows, "huge_bytes": huge_bytes,
        "ratio": statistics.median(ratios), "ratios": ratios,
        "bare_ratio": statistics.median(bare_ratios), "bare_ratios": bare_ratios, "stages": stages,
    }  # fmt: skip


def bare_reads(file: Path, memory: Any, transfer_bytes: int, threads: int, seconds: float) -> float:
    """Bytes per second of the loader's reads and nothing else."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        return huge_pages.read(descriptor, memory, transfer_bytes // 4096 * 4096, threads, seconds)
    finally:
        os.close(descriptor)


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=5, sweeps=4, quick="a smaller model, three rounds")
    parser.add_argument("--weight-memory", default="700MiB", help="slots and what stays")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds = "2GiB", 3
    with random_store(parse_size(arguments.size), arguments.folder) as store:
        result = measure(arguments, store)
    print(f"{'GB/s':>8} {'fio':>7} {'bare':>7} {'ours':>7} {'of fio':>7} {'of bare':>7}")
    for number, row in enumerate(result["rounds"], 1):
        ours = row["ours"]
        print(
            f"{number:8} {row['fio'] / 1e9:7.2f} {row['bare'] / 1e9:7.2f} {ours / 1e9:7.2f} {ours / row['fio']:7.3f} "
            f"{ours / row['bare']:7.3f}"
        )
    for name, goal in (("ratio", ", goal 0.95"), ("bare_ratio", f"; {result['huge_bytes'] >> 20} MiB in huge pages")):
        low, high = min(result[name + "s"]), max(result[name + "s"])
        of = "fio" if name == "ratio" else "bare reads"
        print(f"median of the paired ratios, over {of}, {result[name]:.3f} ({low:.3f} to {high:.3f}){goal}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
