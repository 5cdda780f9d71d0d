"""A model over two drives against the same model on one of them, each drive held to a rate.

How to run (root, loop devices, the blkio controller of cgroup v1; --folder on a disk that reads faster than all drives
together, with four times --size free; five minutes, --quick: two):

    python benchmarks/striping.py [--size 1GiB] [--rate 200MB] [--drives 2] [--rounds 3] [--sweeps 3] [--folder DIR]
        [--quick] [--json FILE]

The drives are files behind loop devices, each with an ext4 of its own. A control group holds what its processes read
from each device to `--rate` per second (blkio.throttle.read_bps_device); everything else of the machine is as fast as
ever. In it a random Llama in bf16 with Llama-3-8B's layers decodes at batch 1, from a store in one folder and from one
that is striped, in turns, each time with all processes new. Printed: seconds per sweep and rate of both, what the
drives gave when they were probed, and the median of the paired ratios of seconds with its spread (goal: close to the
number of drives).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from random_llama import make_checkpoint
from streaming import WIDE, options, sweep_seconds
from throttle import obstacle, throttled

from pipo_ray import LLM
from pipo_ray.prepare import pack_store
from pipo_ray.session.memory import format_size, parse_size

MIB = 1 << 20


def command(*words: str | Path) -> str:
    """What the program printed. Ends the benchmark with its error."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def loop_drive(image: Path, num_bytes: int) -> Iterator[tuple[Path, str]]:
    """A file system on a loop device: where it is mounted, and the device's number ("7:0")."""
    with open(image, "wb") as file:
        file.truncate(num_bytes)
    command("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
    device = command("losetup", "--direct-io=on", "--find", "--show", image)
    place = image.with_suffix(".mounted")
    place.mkdir()
    try:
        command("mount", device, place)
        try:
            yield place, Path("/sys/block", Path(device).name, "dev").read_text().strip()
        finally:
            command("umount", place)
    finally:
        command("losetup", "--detach", device)
        image.unlink()


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def run(store: Path, weight_memory: int, sweeps: int) -> dict[str, Any]:
    """One start: seconds per sweep and bytes streamed in it."""
    with LLM(store, weight_memory=weight_memory, device="cpu", ray_address="local", max_kv_tokens=512) as llm:
        drives = next((line for line in llm.describe() if line.startswith("drive")), "")
        sweep_seconds(llm, 1)  # residents are loaded, checksums checked
        seconds = sweep_seconds(llm, sweeps)
        report, pids = llm.report(), llm.pids()
        loaders = {name: pid for name, pid in pids.items() if name.startswith("NvmeLoader")}
        memory = {name: private_bytes(pid) for name, pid in loaders.items()}
    return {
        "seconds": seconds, "streamed": report["streamed_bytes_per_sweep"], "drives": drives,
        "bytes_per_s": report["streamed_bytes_per_sweep"] / seconds,
        "loaders": memory,
        "stages": report["stages"],
    }  # fmt: skip


def measure(arguments: argparse.Namespace, base: Path) -> dict[str, Any]:
    """The figures of all rounds."""
    shape = WIDE.of_at_least(parse_size(arguments.size))
    os.environ["PIPO_CACHE"] = str(base / "cache")
    with contextlib.ExitStack() as stack:
        sizes = [2 * shape.num_bytes + 256 * MIB] + [shape.num_bytes] * (arguments.drives - 1)
        drives = [stack.enter_context(loop_drive(base / f"drive{n}.img", size)) for n, size in enumerate(sizes)]
        checkpoint = base / "checkpoint"
        make_checkpoint(checkpoint, shape)
        one, several = (drives[0][0] / name for name in ("one", "striped"))
        pack_store(checkpoint, one)
        pack_store(checkpoint, several, stripes=[place / "stripe" for place, _ in drives[1:]])
        shutil.rmtree(checkpoint)
        rows = []
        with throttled([number for _, number in drives], arguments.rate):
            for number in range(1, arguments.rounds + 1):
                pair = [run(store, arguments.weight_memory, arguments.sweeps) for store in (one, several)]
                rows.append(dict(zip(("one", "striped"), pair, strict=True)))
                print(f"round {number}: {pair[0]['drives']} | {pair[1]['drives']}", file=sys.stderr)
    ratios = [row["one"]["seconds"] / row["striped"]["seconds"] for row in rows]
    return {
        "model_bytes": shape.num_bytes, "rate": arguments.rate, "drives": arguments.drives, "rounds": rows,
        "ratio": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=3, sweeps=3, quick="one round of two sweeps")
    parser.set_defaults(size="1GiB")
    parser.add_argument("--rate", type=parse_size, default=parse_size("200MB"), help="bytes per second of each drive")
    parser.add_argument("--drives", type=int, default=2)
    parser.add_argument("--weight-memory", type=parse_size, default=parse_size("400MiB"), help="slots and what stays")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.sweeps = 1, 2
    if reason := obstacle():
        print(reason, file=sys.stderr)
        return 2
    base = Path(tempfile.mkdtemp(prefix="pipo-bench-", dir=arguments.folder))
    try:
        result = measure(arguments, base)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(f"{'':>8} {'one drive':>20} {f'{arguments.drives} drives':>20} {'ratio':>7}")
    print(f"{'':>8} {'s/sweep':>9} {'MB/s':>10} {'s/sweep':>9} {'MB/s':>10}")
    for number, (row, ratio) in enumerate(zip(result["rounds"], result["ratios"], strict=True), 1):
        cells = "".join(f" {row[k]['seconds']:9.2f} {row[k]['bytes_per_s'] / 1e6:10.0f}" for k in ("one", "striped"))
        print(f"{number:8}{cells} {ratio:7.2f}")
    low, high = min(result["ratios"]), max(result["ratios"])
    print(f"median of the paired ratios {result['ratio']:.2f} ({low:.2f} to {high:.2f}), {arguments.drives} drives of "
          f"{arguments.rate / 1e6:.0f} MB/s")  # fmt: skip
    loaders = result["rounds"][-1]["striped"]["loaders"]
    print(
        "private memory of the loaders: " + ", ".join(f"{name} {format_size(size)}" for name, size in loaders.items())
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
