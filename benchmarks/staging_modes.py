"""How much staging memory speed needs: the sweep over sizes, and --mode memory-saver against performance.

How to run (--size of free disk, twice that while it is made; a quarter of an hour):

    python benchmarks/staging_modes.py [--size 4GiB] [--rounds 5] [--sweeps 3] [--sizes 0.5,2,4] [--modes]
        [--folder DIR] [--quick] [--json FILE]

The settings keep the same amount of weights resident (--resident), and have what staging takes on top; and once more
("all") every size with as much memory in all as `performance`: what staging takes then is not resident, as on a PC
whose memory is what there is. They take turns, every second round backwards, so that what else happens on the machine
meets all of them. Which memory the slots lie in changes a virtual drive's rate by 5 % and more, and sessions that
follow each other would get the same: so in every turn this process holds a random amount of memory, up to 1 GiB.
--modes leaves out all but the two modes. Printed: staging, resident bytes, seconds per sweep, and the speed relative to
`performance` in the same round: median and spread, and the geometric mean with its standard error. Goals: `performance`
within 1 % of the best; `memory-saver` 75 % less staging, at most 8 % slower.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from streaming import options, random_store, sweep_seconds

from pipo_ray import LLM
from pipo_ray.plan.drive_probe import drive_profile
from pipo_ray.plan.transfer import WITHOUT_PROFILE, Transfer, choose_transfer
from pipo_ray.prepare import cache_folder
from pipo_ray.session.memory import format_size, parse_size
from pipo_ray.store.manifest import Manifest

MIB = 1 << 20
MOST_BALLAST_MIB = 1024


def settings(store: Path, sizes: tuple[float, ...], resident: int) -> dict[str, tuple[Transfer, int]]:
    """By name: the two modes, and `performance` with slots that take these multiples of its memory; each with the
    memory that weights and slots may take.
    """
    profile = drive_profile(store, cache_folder())
    # As a run of this model chooses it, which has so much memory for weights.
    sizes_of = {
        "model_bytes": Manifest.load(store).total_bytes,
        "weight_bytes": resident + WITHOUT_PROFILE.staging_bytes,
    }
    chosen = choose_transfer(profile, **sizes_of)
    saver = choose_transfer(profile, "memory-saver", **sizes_of)
    total = resident + chosen.staging_bytes
    result = {"performance": (chosen, total), "memory-saver": (saver, resident + saver.staging_bytes)}
    for factor in sizes:
        slots = max(3, round(chosen.num_slots * factor))
        other = Transfer(chosen.transfer_bytes, chosen.read_threads, chosen.slot_bytes, slots)
        result[f"x {factor:g}"] = other, resident + other.staging_bytes
        result[f"x {factor:g}, all"] = other, total
    return result


def measure(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Seconds per sweep of every setting, by rounds. One session at a time: Ray allows one per process."""
    resident = parse_size(arguments.resident)
    rows: dict[str, dict[str, Any]] = {}
    sizes = () if arguments.quick or arguments.modes else tuple(map(float, arguments.sizes.split(",")))
    chosen = settings(store, sizes, resident)
    chance = random.Random(1)
    for number in range(arguments.rounds):
        for name, (transfer, weights) in list(chosen.items())[:: -1 if number % 2 else 1]:
            ballast = np.ones(chance.randrange(MOST_BALLAST_MIB) * MIB, np.uint8)
            with LLM(
                store, weight_memory=weights, device="cpu", ray_address="local", max_kv_tokens=512, transfer=transfer
            ) as llm:
                sweep_seconds(llm, 1)
                seconds = sweep_seconds(llm, arguments.sweeps)
                placement, report = llm._plan.placement, llm.report()
            del ballast
            row = rows.setdefault(name, {"seconds": []})
            row |= {
                "staging_bytes": placement.num_slots * placement.slot_bytes,
                "resident_bytes": report["resident_bytes"], "transfer_bytes": transfer.transfer_bytes,
                "read_threads": transfer.read_threads, "slots": placement.num_slots,
            }  # fmt: skip
            row["seconds"].append(seconds)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    base = rows["performance"]["seconds"]
    for row in rows.values():
        row["speeds"] = [of / mine for of, mine in zip(base, row["seconds"], strict=True)]
        row["speed"] = statistics.median(row["speeds"])
        row["mean"], row["error"] = geometric_mean(row["speeds"])
    return rows


def geometric_mean(ratios: list[float]) -> tuple[float, float]:
    """Of `ratios`, and its standard error."""
    logarithms = [math.log(ratio) for ratio in ratios]
    mean = math.exp(statistics.fmean(logarithms))
    spread = statistics.stdev(logarithms) if len(ratios) > 1 else math.nan
    return mean, mean * spread / math.sqrt(len(ratios))


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=5, sweeps=3, quick="a smaller model, the two modes, two rounds")
    parser.add_argument("--resident", default="1GiB", help="weights that stay")
    parser.add_argument("--sizes", default="0.5,2,4", help="of staging, as multiples; default: %(default)s")
    parser.add_argument("--modes", action="store_true", help="nothing but the two modes")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds = "2GiB", 2
    with random_store(parse_size(arguments.size), arguments.folder) as store:
        rows = measure(arguments, store)
    print(f"{'setting':14} {'staging':>10} {'slots':>6} {'reads':>12} {'resident':>10} {'s/sweep':>8} {'speed':>6}")
    for name, row in rows.items():
        reads = f"{row['read_threads']} x {row['transfer_bytes'] / MIB:g} MiB"
        print(
            f"{name:14} {format_size(row['staging_bytes']):>10} {row['slots']:6} {reads:>12} "
            f"{format_size(row['resident_bytes']):>10} {statistics.median(row['seconds']):8.3f} {row['speed']:6.3f}"
            f"  ({min(row['speeds']):.3f} to {max(row['speeds']):.3f}), mean {row['mean']:.3f} +- {row['error']:.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
