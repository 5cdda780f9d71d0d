"""What huge pages under the slots are worth: the same reads into shared memory with and without them.

How to run (a file of 1 GB or more on the drive in question, half a minute; --quick: a third of it):

    python benchmarks/huge_pages.py FILE [--rounds 8] [--quick] [--json FILE]

O_DIRECT reads of 1 and of 4 MiB, 2 and 8 in flight, into 64 MiB of shared memory, in turns, in a random order in every
round. Printed: the median of each with its spread, the size of a request as it reached the drive (/proc/diskstats; of
all programs), and the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipo_ray.session.huge_pages import use_huge_pages

MIB = 1 << 20
MEMORY_BYTES = 64 * MIB
POINTS = ((1 * MIB, 2), (4 * MIB, 2), (1 * MIB, 8), (4 * MIB, 8))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="read, never written (default: a new one of 1 GiB)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each read")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    made = None
    if arguments.file is None:
        made = arguments.file = Path.cwd() / f".huge-pages-{os.getpid()}"
        made.write_bytes(os.urandom(16 * MIB) * 64)
    try:
        result = measure(arguments.file, rounds, arguments.seconds)
    finally:
        if made is not None:
            made.unlink()
    print(f"{'read':>8} {'in flight':>10} {'memory':>12} {'GB/s':>6} {'spread':>13} {'KiB/request':>12} {'ratio':>6}")
    for row in result["rows"]:
        low, high = min(row["rates"]) / 1e9, max(row["rates"]) / 1e9
        ratio = f"{row['ratio']:6.2f}" if "ratio" in row else ""
        print(
            f"{row['transfer_bytes'] // MIB:4} MiB {row['in_flight']:10} {row['memory']:>12} "
            f"{statistics.median(row['rates']) / 1e9:6.2f} {low:6.2f} - {high:.2f} {row['request_kib']:12.0f} {ratio}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


def measure(file: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Rates in bytes per second of every point and kind of memory."""
    memories = {"small pages": touched(), "huge pages": touched()}
    huge = use_huge_pages([memories["huge pages"]])
    print(f"{huge // MIB} of {MEMORY_BYTES // MIB} MiB in huge pages")
    cases = [(name, *point) for point in POINTS for name in memories]
    rates: dict[Any, list[float]] = {case: [] for case in cases}
    requests: dict[Any, list[float]] = {case: [] for case in cases}
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    device = os.stat(file).st_dev
    try:
        for _ in range(rounds):
            for case in random.sample(cases, len(cases)):
                name, transfer, in_flight = case
                before = _drive_reads(device)
                rates[case].append(read(descriptor, memories[name], transfer, in_flight, seconds))
                count, nbytes = (after - earlier for after, earlier in zip(_drive_reads(device), before, strict=True))
                requests[case].append(nbytes / max(count, 1) / 1024)
    finally:
        os.close(descriptor)
    rows = []
    for case in cases:
        name, transfer, in_flight = case
        row: dict[str, Any] = {
            "memory": name, "transfer_bytes": transfer, "in_flight": in_flight, "rates": rates[case],
            "request_kib": statistics.median(requests[case]),
        }  # fmt: skip
        if name == "huge pages":
            small = rates["small pages", transfer, in_flight]
            row["ratio"] = statistics.median(a / b for a, b in zip(rates[case], small, strict=True))
        rows.append(row)
    return {"huge_bytes": huge, "rows": rows}


def touched() -> npt.NDArray[np.uint8]:
    """Memory to read into, that is there."""
    memory = np.frombuffer(mmap.mmap(-1, MEMORY_BYTES), np.uint8)
    memory[:: mmap.PAGESIZE] = 1
    return memory


def _drive_reads(device: int) -> tuple[int, int]:
    """Requests that the drive has read, and their bytes."""
    for line in Path("/proc/diskstats").read_text().splitlines():
        major, minor, _, count, _, sectors = line.split()[:6]
        if (int(major), int(minor)) == (os.major(device), os.minor(device)):
            return int(count), 512 * int(sectors)
    return 0, 0


def read(descriptor: int, memory: npt.NDArray[np.uint8], transfer: int, in_flight: int, seconds: float) -> float:
    """Bytes per second of so many reads in flight into `memory`, round and round."""
    size = os.fstat(descriptor).st_size // transfer * transfer
    lock = threading.Lock()
    position, done = random.randrange(size // transfer), 0
    begin = time.perf_counter()

    def work() -> None:
        nonlocal position, done
        while time.perf_counter() - begin < seconds:
            with lock:
                number, position = position, position + 1
            at = number * transfer % MEMORY_BYTES
            got = os.preadv(descriptor, [memory[at : at + transfer].data], number * transfer % size)
            with lock:
                done += got

    threads = [threading.Thread(target=work) for _ in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done / (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
