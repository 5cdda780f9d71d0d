"""Measuring a drive: how fast it reads with how much in flight. At most 8.7 seconds, once per machine and drive.

What was measured is kept as JSON in the cache folder, `profiles/drive-<key>.json`; the key names machine and drive.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import xxhash

from pipo_ray.json_file import write_json
from pipo_ray.pipeline.drive import PAGE, Drive
from pipo_ray.plan.transfer import ReadRate, Transfer
from pipo_ray.session.huge_pages import scratch_memory
from pipo_ray.session.memory import MIB, format_size

LEAST_FILE_BYTES = 256 * MIB
"""A smaller file says nothing about a drive, and what is in it is read in no time."""

GRID = tuple(
    (size * MIB, threads)
    for size, threads in (
        (1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (4, 2), (2, 8), (4, 4), (4, 8), (8, 8), (16, 8), (16, 16)
    )
)  # fmt: skip
"""Up to 256 MiB in flight: no drive by itself wants that much, but one behind a virtual machine's limiter may."""
_MOST_MEMORY_BYTES = 64 * MIB
"""What is read into in turns at most. Each point has as much as its staging is in a run: a virtual drive, whose reads
are copies, is faster where a cache still has what is written over (2 reads of 2 MiB gave 1.71 GB/s into 8 MiB and 1.46
into 16 and more, 2 cores of an Intel Xeon; 8 of 1 MiB 3.3 into the same memory always and 2.6 into 64 MiB, 2 cores AMD
EPYC).
"""
_ROUNDS = 3
_READING_S = 7.6
_DEADLINE_S = 8.7
"""Of the ten seconds that a machine's first configuration may take. The compute worker has the rest for its kernels:
those of 16-bit, int4 and int8 weights together take 1.2 s, compiling included, once (2 cores AMD EPYC).
"""


def drive_profiles(
    folders: Sequence[Path], cache: Path, on_progress: Callable[[str, int, int], None] | None = None
) -> list[tuple[ReadRate, ...]]:
    """The profile of each folder's drive, see `drive_profile`; all together are measured as long as one would be."""
    return [drive_profile(folder, cache, on_progress, 1 / len(folders)) for folder in folders]


def drive_profile(
    folder: Path,
    cache: Path,
    on_progress: Callable[[str, int, int], None] | None = None,
    share: float = 1.0,
) -> tuple[ReadRate, ...]:
    """The profile of the drive that the block store in `folder` is on: from the cache, else measured now, in `share` of
    8.7 seconds, of which `on_progress("measure", 0, 0)` hears.

    Empty for a store that is too small to measure with.
    """
    file = _largest_file(folder)
    if file is None or file.stat().st_size < LEAST_FILE_BYTES:
        return ()
    kept = cache / "profiles" / f"drive-{_key(file)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return tuple(ReadRate(**point) for point in json.loads(kept.read_text(encoding="utf-8"))["points"])
    if on_progress is not None:
        on_progress("measure", 0, 0)
    points = measure_drive(file, share * _READING_S, share * _DEADLINE_S)
    with contextlib.suppress(OSError):  # without a cache it is measured every time
        write_json(kept, {"file": str(file), "points": [asdict(point) for point in points]})
    return points


def measure_drive(file: Path, reading_s: float, deadline_s: float) -> tuple[ReadRate, ...]:
    """Read `file` with every point of GRID in three turns, O_DIRECT where the file system allows it; the best of each:
    whatever else reads from the drive only takes away, and most from few reads.

    `reading_s` is what all readings take together on a drive that answers at once. A slow one answers what it was asked
    for long after: of what would not be answered within `deadline_s` from the call, at the rate seen last, the points
    that say least are left out. A first page is read for a drive that sleeps. Takes 64 MiB: what is read is not looked
    at, so reads may share memory.
    """
    end = time.perf_counter() + deadline_s
    seconds = reading_s / _ROUNDS / len(GRID)
    drive = Drive(file.parent)
    size = file.stat().st_size // PAGE * PAGE
    rates: dict[tuple[int, int], list[float]] = {point: [] for point in GRID}
    offset, rate = 0, math.inf
    try:
        memory = scratch_memory(_MOST_MEMORY_BYTES).data
        drive.read_into(memory[:PAGE], file.name, 0)
        for _ in range(_ROUNDS):
            for number, point in enumerate(GRID):
                left_s = end - time.perf_counter()
                if any(rates.values()) and point not in _fitting(GRID[number:], seconds, rate, left_s):
                    continue
                own = memory[: ReadRate(*point, 0.0).staging_bytes]
                offset, rate = _read_for(drive, file.name, size, offset, own, *point, seconds)
                rates[point].append(rate)
    finally:
        drive.close()
    found = ((point, rates[point]) for point in GRID if rates[point])
    return tuple(ReadRate(*point, max(measured)) for point, measured in found)


def _fitting(
    points: Sequence[tuple[int, int]], seconds: float, bytes_per_s: float, left_s: float
) -> set[tuple[int, int]]:
    """Those of `points` that can be read in `left_s`, what says most first: the points that can be chosen, then the
    others; of both, those with little in flight before those with much, which a slow drive needs least.
    """
    fitting = set()
    for point in sorted(points, key=_rank):
        answered_s = seconds + point[0] * point[1] / bytes_per_s
        if answered_s <= left_s:
            fitting.add(point)
            left_s -= answered_s
    return fitting


def _rank(point: tuple[int, int]) -> tuple[bool, int]:
    return not ReadRate(*point, 0.0).keeps_busy, point[0] * point[1]


def _read_for(
    drive: Drive, name: str, size: int, offset: int, memory: memoryview, transfer: int, threads: int, seconds: float
) -> tuple[int, float]:
    """Go on reading at `offset` for so many seconds; the next offset, and bytes per second."""
    lock = threading.Lock()
    parts = itertools.cycle(range(0, len(memory) // transfer * transfer, transfer))
    position, done, error = offset, 0, None
    begin = time.perf_counter()

    def places() -> Iterator[tuple[int, memoryview]]:
        nonlocal position
        while True:
            with lock:
                if position + transfer > size:
                    position = 0
                at, position = position, position + transfer
                part = next(parts)
            yield at, memory[part : part + transfer]
            if time.perf_counter() - begin >= seconds:
                return

    def read() -> None:
        nonlocal done, error
        try:
            for at, part in places():
                drive.read_into(part, name, at)
                with lock:
                    done += transfer
        except Exception as failure:
            error = failure

    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if error is not None:
        raise error
    return position, done / (time.perf_counter() - begin)


def _largest_file(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    return files[-1] if files else None


def _key(file: Path) -> str:
    """Of the machine and the drive, as far as they can be told apart from user space, and of what is measured."""
    device = os.stat(file).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    block = Path("/sys/dev/block", name)
    with contextlib.suppress(OSError):
        name += os.path.realpath(block)
        name += (block / "size").read_text()
    machine = f"{platform.node()} {platform.machine()} {platform.release()} {os.cpu_count()}"
    return xxhash.xxh3_64(f"{machine} {name} {GRID} into its staging".encode()).hexdigest()


def describe_drive(profile: Sequence[ReadRate], transfer: Transfer, *others: Sequence[ReadRate]) -> str:
    """A line for the user: what the drive gave, and the `others` that the store is striped over, and what was made of
    it.
    """
    best = [max((rate.bytes_per_s for rate in one), default=0.0) / 1e9 for one in (profile, *others)]
    speeds = " and ".join(f"{one:.2f}" for one in best)
    return (
        f"{'drives' if others else 'drive'}: up to {speeds} GB/s when {'they were' if others else 'it was'} measured; "
        f"reads of {format_size(transfer.transfer_bytes)}, {transfer.read_threads} in flight"
        f"{' on each' if others else ''}"
    )
