"""A soak: sweeps by the thousand through the four actors, and what every process of the session grows by.

How to run (no GPU, no network; about two minutes for 2,000 sweeps on two idle cores):

    python benchmarks/soak.py [--sweeps 2000] [--join] [--kv-tokens 2048] [--json FILE] [--quick]

The bundled model streams (weight memory is less than the model has). Every 25 sweeps the PSS and the open descriptors
and threads of each process are noted: driver, watcher, gcs_server, raylet, its stand-ins, the four actors. Over the
last three quarters of the sweeps a line is fitted to each process's PSS by least squares; its slope is KB per sweep,
its standard error assumes independent samples. The limit is 1 KB per sweep; descriptors and threads must not grow.
Request after request runs, of up to 200 sweeps each; with --join requests of random lengths join and leave all the
time, some of them aborted. What has ended stays in the KV cache as long as there is room, so with --join that is small
enough (--kv-tokens) to be full before growth is counted. The exit status is 1 if a limit was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipo_ray import LLM, SamplingParams

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
SAMPLE_SWEEPS = 25
WARM_SHARE = 0.25
LIMIT_KB = 1.0
REQUEST_SWEEPS = 200


def slope(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of `ys` over `xs` and its standard error."""
    count = len(xs)
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    spread = sum((x - mean_x) ** 2 for x in xs)
    result = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - mean_y - result * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return result, math.sqrt(rest / max(1, count - 2) / spread)


class Processes:
    """The session's processes under names that a person knows, and what each has taken over the sweeps."""

    def __init__(self, llm: LLM) -> None:
        actors = {pid: name for name, pid in llm.pids().items()}
        own = os.getpid()
        self.names: dict[int, str] = {}
        for pid in llm._session.pids():
            name = "driver" if pid == own else actors.get(pid) or program(pid)
            taken = sum(one == name or one.startswith(name + " ") for one in self.names.values())
            self.names[pid] = name if not taken else f"{name} {taken + 1}"
        self.sweeps: list[int] = []
        self.pss: dict[int, list[float]] = {pid: [] for pid in self.names}
        self.descriptors: dict[int, list[int]] = {pid: [] for pid in self.names}
        self.threads: dict[int, list[int]] = {pid: [] for pid in self.names}

    def note(self, sweeps: int) -> None:
        """So many sweeps are done."""
        self.sweeps.append(sweeps)
        for pid in self.names:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            self.pss[pid].append(
                next(float(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            )
            self.descriptors[pid].append(len(os.listdir(f"/proc/{pid}/fd")))
            self.threads[pid].append(_threads(pid))

    def rows(self) -> list[dict[str, Any]]:
        """Per process: KB of PSS per sweep over the last part with standard error, and counts at its two ends."""
        first = next(i for i, sweeps in enumerate(self.sweeps) if sweeps >= WARM_SHARE * self.sweeps[-1])
        rows = []
        for pid, name in self.names.items():
            kb, error = slope(self.sweeps[first:], self.pss[pid][first:])
            # The least of a few samples at each end: a descriptor that is open for a moment is none that has leaked.
            few = max(1, (len(self.sweeps) - first) // 5)
            ends = {
                what: (min(values[pid][first : first + few]), min(values[pid][-few:]))
                for what, values in (("descriptors", self.descriptors), ("threads", self.threads))
            }
            rows.append(
                {
                    "process": name, "kb_per_sweep": kb, "standard_error": error, **ends,
                    "pss_kb": self.pss[pid], "sweeps": self.sweeps,
                    "wrong": [
                        *([f"grows by {kb:.2f} KB per sweep"] if kb >= LIMIT_KB else []),
                        *(f"{what}: {a} have become {b}" for what, (a, b) in ends.items() if b > a),
                    ],
                }
            )  # fmt: skip
        return rows


def _threads(pid: int) -> int:
    """All but gRPC's one timer, which starts when it is first needed."""
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            count += (task / "comm").read_text().strip() != "grpc_global_tim"
    return count


def program(pid: int) -> str:
    """The file name of what the process runs."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    script = next((one for one in arguments[1:] if one.endswith(".py")), arguments[0])
    return Path(script.split(" ")[0]).name


def one_after_another(llm: LLM) -> Iterator[None]:
    """Yields once per sweep, for ever."""
    params = SamplingParams(temperature=0.0, max_tokens=REQUEST_SWEEPS, ignore_eos=True)
    while True:
        for _ in llm.stream("Once upon a time", params):
            yield


def joining_and_leaving(llm: LLM) -> Iterator[None]:
    """Requests of random lengths, four at a time, some left in the middle; yields with every output of the first."""
    chance = random.Random(1)
    streams: list[Iterator[Any]] = []
    while True:
        while len(streams) < 4:
            params = SamplingParams(temperature=1.0, seed=3, max_tokens=chance.randrange(2, 60), ignore_eos=True)
            streams.append(llm.stream("The dog " * chance.randrange(1, 20), params))
        for stream in list(streams):
            if next(stream, None) is None:
                streams.remove(stream)
            elif chance.random() < 0.01:
                stream.close()  # type: ignore[attr-defined]
                streams.remove(stream)
        yield


def soak(llm: LLM, sweeps: int, join: bool) -> list[dict[str, Any]]:
    """Run it. See `Processes.rows`."""
    work = joining_and_leaving(llm) if join else one_after_another(llm)
    for _ in range(3):
        next(work)
    processes = Processes(llm)
    while (done := llm._sweeps_before + llm._sweeps) < sweeps:
        if not processes.sweeps or done >= processes.sweeps[-1] + SAMPLE_SWEEPS:
            processes.note(done)
        next(work)
    processes.note(done)
    work.close()  # type: ignore[attr-defined]
    return processes.rows()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=2000)
    parser.add_argument("--join", action="store_true", help="requests join and leave all the time")
    parser.add_argument("--kv-tokens", type=int, default=2048, help="of the KV cache with --join; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="600 sweeps")
    parser.add_argument("--model", default=str(BUNDLED))
    parser.add_argument("--weight-memory", default="6MiB", help="less than the model, so that it streams")
    parser.add_argument("--json", type=Path, help="write the result here, every sample included")
    arguments = parser.parse_args()
    sweeps = 600 if arguments.quick else arguments.sweeps
    begin = time.perf_counter()
    with LLM(
        arguments.model, memory="3GiB", weight_memory=arguments.weight_memory, device="cpu", ray_address="local",
        max_kv_tokens=arguments.kv_tokens if arguments.join else None,
    ) as llm:  # fmt: skip
        rows = soak(llm, sweeps, arguments.join)
    took_s = time.perf_counter() - begin
    print(f"{sweeps} sweeps in {took_s:.0f} s, the first {WARM_SHARE:.0%} left out\n")
    print(f"{'process':<24}{'KB/sweep':>10}{'+-':>8}{'PSS MB':>9}{'descriptors':>14}{'threads':>12}")
    for row in rows:
        counts = [f"{a} -> {b}" for a, b in (row["descriptors"], row["threads"])]
        print(
            f"{row['process']:<24}{row['kb_per_sweep']:>10.3f}{row['standard_error']:>8.3f}"
            f"{row['pss_kb'][-1] / 1024:>9.1f}{counts[0]:>14}{counts[1]:>12}  {'; '.join(row['wrong'])}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"sweeps": sweeps, "took_s": took_s, "rows": rows}, indent=1))
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
