"""How the CPU's compute threads should wait for each other: a decode step alone, and beside other work.

How to run (four minutes; --quick: 15 s):

    python benchmarks/cpu_threads.py [--quick] [--beside 0 1 2] [--rounds 3] [--json FILE]

A chain of eight products of one row with bf16 weights [2048, 2048], each followed by a norm, in a process of its own
per setting; the settings take turns. --beside N runs N processes that compute without pause. Printed per setting: the
median and the 90th percentile of a chain's milliseconds, and the processor time that it took, over all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 2000": {"GOMP_SPINCOUNT": "2000"},
    "default": {},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive, bound": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_PROC_BIND": "true"},
    "passive, one thread": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
}

CHAIN = """
import json, sys, time, torch, torch.nn.functional as F
weights = [(torch.randn(2048, 2048) * 0.02).bfloat16() for _ in range(8)]
start = torch.randn(1, 2048).bfloat16()
def chain():
    row = start
    for weight in weights:
        row = F.linear(row, weight)
        row = row * torch.rsqrt(row.float().pow(2).mean(-1, keepdim=True) + 1e-6).bfloat16()
with torch.inference_mode():
    chain()
    taken, end = [], time.perf_counter() + float(sys.argv[1])
    while time.perf_counter() < end:
        wall, processor = time.perf_counter(), time.process_time()
        chain()
        taken.append(((time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3))
print(json.dumps(taken))
"""


def chains(setting: str, seconds: float) -> list[tuple[float, float]]:
    """Milliseconds on the wall and of processor time of each chain."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= SETTINGS[setting]
    output = subprocess.run(
        [sys.executable, "-c", CHAIN, str(seconds)], env=environment, check=True, capture_output=True, text=True
    )
    return [(wall, processor) for wall, processor in json.loads(output.stdout)]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds, rounds = (0.3, 1) if options.quick else (1.0, options.rounds)
    rows = []
    print("beside  setting               median ms     90 % ms processor ms")
    for beside in options.beside:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            taken: dict[str, list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
            for _ in range(rounds):
                for setting in SETTINGS:
                    taken[setting] += chains(setting, seconds)
        finally:
            for other in others:
                other.kill()
                other.wait()
        for setting, pairs in taken.items():
            walls = sorted(wall for wall, _ in pairs)
            row = {
                "beside": beside, "setting": setting, "median_ms": statistics.median(walls),
                "p90_ms": walls[len(walls) * 9 // 10], "processor_ms": statistics.median(p for _, p in pairs),
            }  # fmt: skip
            rows.append(row)
            figures = "".join(f"{row[key]:12.2f}" for key in ("median_ms", "p90_ms", "processor_ms"))
            print(f"{beside:6d}  {setting:20s}{figures}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
