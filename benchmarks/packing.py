"""How long packing takes, against what the drive needs for the same bytes.

How to run (fio; --size of free disk, three times; five minutes):

    python benchmarks/packing.py [--size 7GiB] [--rounds 3] [--precisions 16bit,int8,int4] [--folder DIR] [--quick]
                                 [--json FILE]

A random Llama in bf16 is packed in every precision, from a cold page cache. The limit is (bytes read + bytes written)
by what fio reads and writes at the same time, in the same proportion, O_DIRECT, in the same minute: the best of blocks
of 1, 4 and 16 MiB with 4 and 16 in flight. Packing counts from its start to the last byte on the disk; what it takes
before the first byte (torch and transformers are imported, the model is looked at) is printed by itself too.
Goals: int8 at most 1.3 times the limit, int4 1.5 times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fio
from random_llama import make_checkpoint
from streaming import WIDE, options

from pipo_ray.prepare import pack_store
from pipo_ray.session.memory import parse_size

GOALS = {"int8": 1.3, "int4": 1.5}


def pack(checkpoint: Path, store: Path, precision: str) -> dict[str, float]:
    """Seconds until the store is there, and until the first byte was packed; bytes read and written."""
    first = 0.0

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal first
        if phase == "pack" and not first:
            first = time.perf_counter()

    begin = time.perf_counter()
    pack_store(checkpoint, store, precision=precision, on_progress=progress)
    seconds = time.perf_counter() - begin
    read, written = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (checkpoint, store)
    )
    shutil.rmtree(store)
    return {"seconds": seconds, "before_s": first - begin, "read_bytes": read, "written_bytes": written}


def measure(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """By precision: every round's seconds and limit. They take turns."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.precisions.split(",")}
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        for number in range(arguments.rounds):
            for precision, rounds in rows.items():
                row = pack(checkpoint, Path(scratch, "store"), precision)
                moved = row["read_bytes"] + row["written_bytes"]
                rate = fio.mixed(Path(scratch, "fio"), row["read_bytes"] / moved, 1.0 if arguments.quick else 2.0)
                row |= {"fio_bytes_per_s": rate, "limit_s": moved / rate, "ratio": row["seconds"] / (moved / rate)}
                rounds.append(row)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return {
        name: {"rounds": rounds, "ratio": statistics.median(row["ratio"] for row in rounds)}
        for name, rounds in rows.items()
    }


@contextmanager
def random_checkpoint(num_bytes: int, folder: Path | None) -> Iterator[Path]:
    """A checkpoint of at least so many bytes; in `folder`, and kept there, or in a temporary one."""
    base = folder or Path(tempfile.mkdtemp(prefix="pipo-bench-"))
    shape = WIDE.of_at_least(num_bytes)
    checkpoint = base / f"llama-{shape.layers}"
    try:
        if not checkpoint.exists():
            make_checkpoint(checkpoint, shape)
        yield checkpoint
    finally:
        if folder is None:
            shutil.rmtree(base, ignore_errors=True)


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=3, sweeps=1, quick="a smaller model, one round")
    parser.add_argument("--precisions", default="16bit,int8,int4", help="default: %(default)s")
    parser.set_defaults(size="7GiB")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds = "2GiB", 1
    with random_checkpoint(parse_size(arguments.size), arguments.folder) as checkpoint:
        result = {"fio": fio.version(), "precisions": measure(arguments, checkpoint)}
    print(f"{'precision':10} {'read GB':>8} {'written':>8} {'seconds':>8} {'before':>7} {'limit':>6} {'ratio':>6}")
    for name, row in result["precisions"].items():
        rounds = row["rounds"]
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        goal = f", goal {GOALS[name]}" if name in GOALS else ""
        print(
            f"{name:10} {middle['read_bytes'] / 1e9:8.2f} {middle['written_bytes'] / 1e9:8.2f} "
            f"{middle['seconds']:8.1f} "
            f"{middle['before_s']:7.1f} {middle['limit_s']:6.1f} {row['ratio']:6.2f}  "
            f"({min(one['ratio'] for one in rounds):.2f} to {max(one['ratio'] for one in rounds):.2f}{goal})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
