"""What self-configuration leaves on the table: a run without flags against 20 settings of the transfer's knobs.

How to run (twice --size of free disk while the model is made; a quarter of an hour):

    python benchmarks/self_configuration.py [--size 4GiB] [--weights 1.5GiB] [--rounds 5] [--sweeps 4] [--folder DIR]
                                            [--quick] [--json FILE]

All runs have --weights for weights: what one takes for staging it cannot keep resident. First every setting runs once;
then the FINALISTS that were fastest take turns with the run that chose for itself (a probe of the drive, at most 10 s,
kept per machine, is not counted). Printed: seconds per sweep, and the share of the best one's speed that the
self-configured run has, by rounds. Goal: at least 0.90.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from streaming import options, random_store, sweep_seconds

from pipo_ray import LLM
from pipo_ray.plan.transfer import Transfer
from pipo_ray.session.memory import parse_size

MIB = 1 << 20
OWN = "self-configured"
FINALISTS = 3
SETTINGS = [
    Transfer(transfer * MIB, threads, slot * MIB + 8192, slots)
    for (transfer, threads), (slot, slots) in itertools.product(
        ((1, 8), (2, 4), (2, 8), (4, 4), (4, 16)), ((4, 2), (8, 2), (16, 2), (16, 8))
    )
]


def name_of(transfer: Transfer) -> str:
    """The knobs in a word."""
    return (
        f"{transfer.read_threads} x {transfer.transfer_bytes // MIB} MiB, "
        f"{transfer.num_slots} x {transfer.slot_bytes // MIB} MiB"
    )


def run(store: Path, weights: int, transfer: Transfer | None, sweeps: int) -> tuple[float, Transfer]:
    """Seconds per sweep, and the transfer that was used."""
    with LLM(
        store, weight_memory=weights, device="cpu", ray_address="local", max_kv_tokens=512, transfer=transfer
    ) as llm:
        sweep_seconds(llm, 1)  # residents are loaded, checksums verified
        return sweep_seconds(llm, sweeps), llm._plan.transfer


def measure(store: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All settings once, and the best beside what chose for itself."""
    weights = parse_size(arguments.weights)
    tried = SETTINGS[:: 4 if arguments.quick else 1]
    once: dict[str, float] = {}
    for transfer in tried:
        once[name_of(transfer)], _ = run(store, weights, transfer, 2)
        print(f"{name_of(transfer):32} {once[name_of(transfer)]:8.3f} s", flush=True)
    best = sorted(tried, key=lambda transfer: once[name_of(transfer)])[:FINALISTS]
    seconds: dict[str, list[float]] = {OWN: [], **{name_of(transfer): [] for transfer in best}}
    for _ in range(arguments.rounds):
        took, chosen = run(store, weights, None, arguments.sweeps)
        seconds[OWN].append(took)
        for transfer in best:
            seconds[name_of(transfer)].append(run(store, weights, transfer, arguments.sweeps)[0])
    winner = min(map(name_of, best), key=lambda name: statistics.median(seconds[name]))
    speeds = [theirs / ours for ours, theirs in zip(seconds[OWN], seconds[winner], strict=True)]
    return {
        "once": once, "seconds": seconds, "chosen": name_of(chosen), "best": winner, "speeds": speeds,
        "speed": statistics.median(speeds),
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=5, sweeps=4, quick="a smaller model, 5 settings, two rounds")
    parser.add_argument("--weights", default="1.5GiB", help="for staging and residents")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds, arguments.weights = "1.5GiB", 2, "700MiB"
    with random_store(parse_size(arguments.size), arguments.folder) as store:
        result = measure(store, arguments)
    for name, found in result["seconds"].items():
        print(f"{name:32} {statistics.median(found):8.3f} s  ({min(found):.3f} to {max(found):.3f})")
    print(
        f"{OWN} ({result['chosen']}): {result['speed']:.3f} of the best, {result['best']} "
        f"({min(result['speeds']):.3f} to {max(result['speeds']):.3f})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
