"""From the disk to the compute worker through the actors, against fio on the same file.

How to run (fio; --size of free disk, twice that while it is made; three minutes):

    python benchmarks/disk_to_compute.py [--size 4GiB] [--rounds 5] [--sweeps 4] [--folder DIR] [--quick] [--json FILE]

A random Llama in bf16 with Llama-3-8B's layers decodes at batch 1, most of it streaming, so that a sweep takes as long
as its bytes take: bytes that stream in a sweep, by the seconds between tokens. fio is the best of libaio with O_DIRECT,
blocks of 1, 4 and 16 MiB, 1, 4 and 16 in flight; the best setting then takes turns with ours. While fio reads, our
slots are full and our loader is asleep. Printed: both rates, and the median of the paired ratios with its spread
(goal: 0.95).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import fio
from streaming import options, random_store, store_files, sweep_seconds

from pipo_ray import LLM
from pipo_ray.session.memory import parse_size


def measure(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """The figures of all rounds."""
    files = store_files(store)
    best = fio.sweep(files, 1.0 if arguments.quick else 2.0)[0]
    weight_memory = parse_size(arguments.weight_memory)
    with LLM(store, weight_memory=weight_memory, device="cpu", ray_address="local", max_kv_tokens=512) as llm:
        for line in llm.describe():
            print(line, file=sys.stderr)
        streamed = llm.report()["streamed_bytes_per_sweep"]
        sweep_seconds(llm, 1)  # residents are loaded, checksums checked
        rows = []
        for _ in range(arguments.rounds):
            limit = fio.read(files, best.block_mib, best.depth, 2.0).bytes_per_s
            rows.append((limit, streamed / sweep_seconds(llm, arguments.sweeps)))
        stages = llm.report()["stages"]
    ratios = [ours / limit for limit, ours in rows]
    return {
        "fio": fio.version(), "fio_setting": {"block_mib": best.block_mib, "depth": best.depth},
        "streamed_bytes_per_sweep": streamed, "rounds": [{"fio": limit, "ours": ours} for limit, ours in rows],
        "ratio": statistics.median(ratios), "ratios": ratios, "stages": stages,
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=5, sweeps=4, quick="a smaller model, three rounds")
    parser.add_argument("--weight-memory", default="700MiB", help="slots and what stays")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds = "2GiB", 3
    with random_store(parse_size(arguments.size), arguments.folder) as store:
        result = measure(arguments, store)
    print(f"{'GB/s':>8} {'fio':>7} {'ours':>7} {'ratio':>7}")
    for number, row in enumerate(result["rounds"], 1):
        print(f"{number:8} {row['fio'] / 1e9:7.2f} {row['ours'] / 1e9:7.2f} {row['ours'] / row['fio']:7.3f}")
    low, high = min(result["ratios"]), max(result["ratios"])
    print(f"median of the paired ratios {result['ratio']:.3f} ({low:.3f} to {high:.3f}), goal 0.95")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
