"""Speed against total memory: from the least that runs to everything resident, in both modes, as a picture.

How to run (twice --size of free disk while the model is made; ten minutes; the picture needs the extra `bench`):

    python benchmarks/memory_curve.py [--size 4GiB] [--rounds 3] [--sweeps 3] [--points 7] [--folder DIR]
                                      [--picture docs/memory.svg] [--quick] [--json FILE]

Each point is a run with `--memory` and nothing else but the mode; points take turns. Printed: the budget, the most that
was really in use (sum of PSS), what was resident, and seconds per sweep. Beside them the least that the bytes allow:
what is streamed at the rate of the point that streams fastest ("drive").
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from streaming import options, random_store, sweep_seconds

from pipo_ray import LLM
from pipo_ray.errors import BudgetError
from pipo_ray.session.memory import format_size, parse_size

MIB = 1 << 20
MODES = ("performance", "memory-saver")
_KV_TOKENS = 512


def least_memory(store: Path) -> int:
    """The budget that a refusal names."""
    try:
        with LLM(store, memory=MIB, device="cpu", ray_address="local", max_kv_tokens=_KV_TOKENS):
            raise AssertionError("a run in 1 MiB")
    except BudgetError as error:
        found = re.search(r"at least (\S+ \S+) would do", str(error))
        assert found
        return parse_size(found[1])


def measure(store: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per budget and mode."""
    least = least_memory(store)
    model = sum(file.stat().st_size for file in store.glob("*.safetensors"))
    most = least + model + 256 * MIB
    budgets = [least + (most - least) * step // (arguments.points - 1) for step in range(arguments.points)]
    rows = [{"mode": mode, "memory": budget, "seconds": []} for mode in MODES for budget in budgets]
    for number in range(arguments.rounds):
        for row in rows:
            with LLM(
                store,
                memory=row["memory"],
                device="cpu",
                ray_address="local",
                max_kv_tokens=_KV_TOKENS,
                max_batch_tokens=64,
                mode=row["mode"],
            ) as llm:
                sweep_seconds(llm, 1)
                row["seconds"].append(sweep_seconds(llm, arguments.sweeps))
                report = llm.report()
            row |= {
                "peak": report["peak_memory_bytes"], "resident": report["resident_bytes"],
                "streamed": report["streamed_bytes_per_sweep"],
            }  # fmt: skip
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return rows


def draw(rows: list[dict[str, Any]], rate: float, path: Path) -> None:
    """Both modes and the drive's limit."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for mode in MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        seconds = [statistics.median(row["seconds"]) for row in chosen]
        panel.plot([row["memory"] / 2**30 for row in chosen], seconds, "o-", label=mode)
    limit = [row for row in rows if row["mode"] == MODES[0]]
    panel.plot([row["memory"] / 2**30 for row in limit], [row["streamed"] / rate for row in limit], "--", label="drive")
    panel.set_xlabel("memory budget, GiB")
    panel.set_ylabel("seconds per sweep")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=3, sweeps=3, quick="a smaller model, three points, one round")
    parser.add_argument("--points", type=int, default=7, help="budgets")
    parser.add_argument("--picture", type=Path, help="write the picture here (.svg or .png)")
    arguments = parser.parse_args()
    if arguments.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib, or leave --picture out")
    if arguments.quick:
        arguments.size, arguments.rounds, arguments.points = "1GiB", 1, 3
    with random_store(parse_size(arguments.size), arguments.folder) as store:
        rows = measure(store, arguments)
    rate = max(row["streamed"] / statistics.median(row["seconds"]) for row in rows)
    print(f"{'mode':13}{'memory':>10}{'in use':>10}{'resident':>10}{'streamed':>10}{'s/sweep':>9}{'drive, s':>9}")
    for row in rows:
        sizes = "".join(f"{format_size(row[name]):>10}" for name in ("memory", "peak", "resident", "streamed"))
        print(f"{row['mode']:13}{sizes}{statistics.median(row['seconds']):9.3f}{row['streamed'] / rate:9.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if arguments.picture:
        draw(rows, rate, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
