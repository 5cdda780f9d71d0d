"""What a disk gives: fio's O_DIRECT reads through libaio, on the files that a benchmark reads itself.

Benchmarks import it; by hand it prints all block sizes and depths (needs the package fio):

    python benchmarks/fio.py STORE/*.safetensors
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCKS_MIB = (1, 4, 16)
DEPTHS = (1, 4, 16)


@dataclass(frozen=True)
class Reading:
    """A sequential read: bytes per second with this block size in MiB and so many reads in flight."""

    bytes_per_s: float
    block_mib: int
    depth: int

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:.2f} GB/s with blocks of {self.block_mib} MiB, {self.depth} in flight"


def version() -> str:
    """fio's own name for itself. Ends the program with what to do if there is no fio."""
    if shutil.which("fio") is None:
        raise SystemExit("fio is missing: install the package fio, which gives the disk limit")
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def read(files: Sequence[Path], block_mib: int, depth: int, seconds: float = 2.0) -> Reading:
    """Read `files` one after the other, and again, for so many seconds."""
    command = [
        "fio", "--name=read", "--rw=read", "--readonly", "--direct=1", "--ioengine=libaio", f"--bs={block_mib}M",
        f"--iodepth={depth}", f"--filename={':'.join(map(str, files))}", "--file_service_type=sequential",
        "--time_based", f"--runtime={seconds}", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return Reading(float(job["read"]["bw_bytes"]), block_mib, depth)


def sweep(files: Sequence[Path], seconds: float = 2.0) -> list[Reading]:
    """BLOCKS_MIB x DEPTHS, the fastest first."""
    readings = [read(files, block_mib, depth, seconds) for block_mib in BLOCKS_MIB for depth in DEPTHS]
    return sorted(readings, key=lambda reading: -reading.bytes_per_s)


def mixed(file: Path, read_share: float, seconds: float = 2.0) -> float:
    """Bytes per second, read and written together, of which `read_share` are read: the best of blocks of BLOCKS_MIB
    with 4 and 16 in flight. `file`, of 2 GiB, is made first and stays.
    """
    rates = []
    for block_mib in BLOCKS_MIB:
        for depth in (4, 16):
            command = [
                "fio", "--name=mixed", "--rw=rw", f"--rwmixread={round(100 * read_share)}", "--direct=1",
                "--ioengine=libaio", f"--bs={block_mib}M", f"--iodepth={depth}", f"--filename={file}", "--size=2G",
                "--time_based", f"--runtime={seconds}", "--output-format=json",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
            rates.append(float(job["read"]["bw_bytes"]) + float(job["write"]["bw_bytes"]))
    return max(rates)


if __name__ == "__main__":
    print(version(), *sweep([Path(name) for name in sys.argv[1:]]), sep="\n")
