"""What Ray and separate processes cost: the same sweep in one process with threads and no Ray, against the four actors.

How to run (two minutes; --quick: half a minute, with the bundled model alone):

    python benchmarks/overhead.py [--size 2GiB] [--resident 0.25] [--rounds 5] [--sweeps 5] [--quick] [--json FILE]

A random Llama of --size is packed into a temporary folder. Both sides get the same sweep plan, the same slots and the
same resident pieces, and the same number of threads: what `plan_run` chose for the actors is handed to the other side,
which consists of the loader's threads, the binder and the model, and nothing else. Rounds of greedy decoding take
turns; the loader of the side that has no turn has filled its slots and waits. The time of a sweep is taken where a user
sees it: between tokens. Tokens must be equal. Goal: at most 3 % of a sweep that takes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cgroup_budget import make_checkpoint
from local_pipeline import LocalPipeline

from pipo_ray import LLM, SamplingParams
from pipo_ray.session.memory import format_size, parse_size

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
PROMPT = [3, 5, 8, 13, 21, 34]


def compare(model: Path, weight_memory: int, rounds: int, sweeps: int) -> dict[str, Any]:
    """Seconds per sweep of both sides, by rounds."""
    seconds: dict[str, list[float]] = {"one process": [], "four actors": []}
    params = SamplingParams(temperature=0.0, max_tokens=sweeps + 1, ignore_eos=True)
    with LLM(model, weight_memory=weight_memory, device="cpu", ray_address="local") as llm:
        plan, setup = llm._plan, llm._stage._setup
        threads = len(os.sched_getaffinity(0))
        with LocalPipeline(Path(setup.store), plan, threads, setup.read_threads, setup.transfer_bytes) as local:
            tokens = {}
            for number in range(rounds + 1):  # the first is a warm-up: residents are loaded, checksums checked
                for side in seconds:
                    ids, took = local.decode(PROMPT, sweeps + 1) if side == "one process" else decode(llm, params)
                    tokens[side] = ids
                    if number:
                        seconds[side].append(statistics.median(took))
    ratios = [b / a for a, b in zip(seconds["one process"], seconds["four actors"], strict=True)]
    return {
        "model": plan.model_bytes,
        "streamed": plan.streamed_bytes_per_sweep,
        "equal tokens": tokens["one process"] == tokens["four actors"],
        "seconds per sweep": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def decode(llm: LLM, params: SamplingParams) -> tuple[list[int], list[float]]:
    """Token ids, and the seconds between them."""
    times, ids = [], []
    for output in llm.stream([PROMPT], params):
        times.append(time.perf_counter())
        ids = list(output.outputs[0].token_ids)
    # Two tokens may arrive in one poll: the mean is what a sweep took.
    return ids, [(times[-1] - times[0]) / (len(ids) - 1)]


def show(name: str, row: dict[str, Any]) -> None:
    """One model's line."""
    ones, fours = (statistics.median(row["seconds per sweep"][side]) for side in ("one process", "four actors"))
    print(
        f"{name:<10}{format_size(row['model']):>10}{format_size(row['streamed']):>12}{1000 * ones:14.1f}"
        f"{1000 * fours:14.1f}{1000 * (fours - ones):10.2f}{100 * (row['ratio'] - 1):8.1f} %"
        f"  ({100 * (min(row['ratios']) - 1):.1f} to {100 * (max(row['ratios']) - 1):.1f})"
        + ("" if row["equal tokens"] else "  TOKENS DIFFER")
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GiB", help="size of the random model")
    parser.add_argument("--resident", type=float, default=0.25, help="weight memory, as a share of the model")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--sweeps", type=int, default=5, help="sweeps in a turn")
    parser.add_argument("--quick", action="store_true", help="only the bundled model")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # as the actors have it; read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    result = {"tiny": compare(BUNDLED, 3 << 20, arguments.rounds, 20)}
    if not arguments.quick:
        folder = Path(tempfile.mkdtemp(prefix="pipo-bench-overhead-"))
        os.environ["PIPO_CACHE"] = str(folder / "cache")
        try:
            size = make_checkpoint(folder / "model", parse_size(arguments.size, "--size"))
            result["random"] = compare(
                folder / "model", int(size * arguments.resident), arguments.rounds, arguments.sweeps
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{'model':<10}{'size':>10}{'a sweep':>12}{'one proc., ms':>14}{'actors, ms':>14}{'cost, ms':>10}{'cost':>10}"
    )
    for name, row in result.items():
        show(name, row)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0 if all(row["equal tokens"] for row in result.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
