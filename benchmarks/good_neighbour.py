"""What a foreground task loses beside `pipo run`, and beside `pipo run --background`.

How to run (five minutes; --quick: two, one round):

    python benchmarks/good_neighbour.py [--size 2GiB] [--rounds 3] [--seconds 3] [--quick] [--json FILE]

A random Llama of --size streams through a quarter of its size, so that both cores and the disk are busy. Three
foreground tasks, one after the other, each for --seconds:

    cpu          a process on every core that computes: rounds per second
    disk         O_DIRECT reads of 1 MiB, two at a time, of a file of 1 GiB: MB/s
    interactive  every 20 ms a burst of about 2 ms of computing, as typing makes them: 1 / the 95th percentile of the
                 time from the moment when a burst was due to its end

alone, beside a normal run and beside one in the background, in turns. Printed: the median of what is left, as a share
of "alone" in the same round (1 is nothing lost; goal beside --background: 0.90), with the spread.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_llama import LlamaShape, make_checkpoint

from pipo_ray.session.memory import format_size, parse_size

FILE_BYTES = 1 << 30
READ_BYTES = 1 << 20
CONDITIONS = ("alone", "normal", "background")


def work(rounds: int) -> int:
    """A fixed piece of computing; 1,000 rounds are about 0.1 ms."""
    total = 0
    for number in range(rounds):
        total += number * number
    return total


def _compute(seconds: float, done: Any) -> None:
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end:
        work(10_000)
        rounds += 1
    done.put(rounds / seconds)


def cpu_task(seconds: float) -> float:
    """Rounds per second, all cores together."""
    done: Any = multiprocessing.Queue()
    children = [multiprocessing.Process(target=_compute, args=(seconds, done)) for _ in os.sched_getaffinity(0)]
    for child in children:
        child.start()
    rates = [done.get() for _ in children]
    for child in children:
        child.join()
    return sum(rates)


def disk_task(seconds: float, file: Path) -> float:
    """Bytes per second."""
    end = time.perf_counter() + seconds
    counts = [0, 0]

    def read(number: int) -> None:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        memory = mmap.mmap(-1, READ_BYTES)
        offset = number * (FILE_BYTES // 2)
        while time.perf_counter() < end:
            counts[number] += os.preadv(descriptor, [memory], offset)
            offset = (offset + READ_BYTES) % FILE_BYTES
        os.close(descriptor)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def interactive_task(seconds: float) -> float:
    """One over the 95th percentile of a burst's seconds, waking up included."""
    took = []
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        time.sleep(max(0.0, due - time.perf_counter()))
        work(20_000)
        took.append(time.perf_counter() - due)
        due = max(due + 0.02, time.perf_counter())
    return 1 / statistics.quantiles(took, n=20)[-1]


class Run:
    """A `pipo run` that generates until the block is left; inside the block it is generating. None runs for "alone"."""

    def __init__(self, condition: str, model: Path, weight_memory: int) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        if condition == "alone":
            return
        command = [
            sys.executable, "-m", "pipo_ray.cli", "run", str(model), "--weight-memory", str(weight_memory),
            "--prompt-ids", "3,5,8", "--max-tokens", "4000", "--ignore-eos", "--ray-address", "local",
            *(["--background"] if condition == "background" else []),
        ]  # fmt: skip
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)

    def __enter__(self) -> Run:
        if self._child is not None:
            assert self._child.stdout is not None
            if not self._child.stdout.read(1):
                raise SystemExit("pipo run ended before its first token")
            threading.Thread(target=self._drain, daemon=True).start()
        return self

    def _drain(self) -> None:
        assert self._child is not None
        assert self._child.stdout is not None
        while self._child.stdout.read(4096):
            pass

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            if self._child.poll() is not None:
                raise SystemExit("pipo run ended while it was measured")
            self._child.send_signal(signal.SIGINT)
            self._child.wait()


def measure(arguments: argparse.Namespace, model: Path, weight_memory: int, file: Path) -> dict[str, Any]:
    """Per task and condition the figures of all rounds, and their shares of the figure alone in the same round."""
    tasks: dict[str, Callable[[], float]] = {
        "cpu": lambda: cpu_task(arguments.seconds),
        "disk": lambda: disk_task(arguments.seconds, file),
        "interactive": lambda: interactive_task(arguments.seconds),
    }
    figures: dict[str, dict[str, list[float]]] = {task: {one: [] for one in CONDITIONS} for task in tasks}
    for number in range(arguments.rounds):
        turns = CONDITIONS if number % 2 == 0 else CONDITIONS[::-1]
        for condition in turns:
            with Run(condition, model, weight_memory):
                time.sleep(1.0)
                for task, run in tasks.items():
                    figures[task][condition].append(run())
    shares = {
        task: {
            condition: [a / b for a, b in zip(by[condition], by["alone"], strict=True)] for condition in CONDITIONS[1:]
        }
        for task, by in figures.items()
    }
    return {"figures": figures, "shares": shares}


def show(result: dict[str, Any]) -> None:
    """Print the result as a person reads it."""
    print(f"{'what is left':<16}{'normal':>26}{'--background':>26}")
    for task, by in result["shares"].items():
        cells = [f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in by.values()]
        print(f"{task:<16}" + "".join(f"{cell:>26}" for cell in cells))
    alone = {task: statistics.median(by["alone"]) for task, by in result["figures"].items()}
    print(
        f"alone: cpu {alone['cpu']:.0f} rounds/s, disk {alone['disk'] / 1e6:.0f} MB/s, "
        f"interactive 95th percentile {1000 / alone['interactive']:.2f} ms"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GiB", help="size of the random model")
    parser.add_argument("--resident", type=float, default=0.25, help="weight memory, as a share of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each task")
    parser.add_argument("--quick", action="store_true", help="one round, half the model")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    size = parse_size(arguments.size, "--size")
    if arguments.quick:
        arguments.rounds, size = 1, size // 2
    folder = Path(tempfile.mkdtemp(prefix="pipo-bench-neighbour-"))
    os.environ["PIPO_CACHE"] = str(folder / "cache")
    try:
        shape = LlamaShape(1).of_at_least(size)
        make_checkpoint(folder / "model", shape)
        size = shape.num_bytes
        file = folder / "foreground"
        with open(file, "wb") as out:
            for _ in range(FILE_BYTES // READ_BYTES):
                out.write(os.urandom(READ_BYTES))
            os.fsync(out.fileno())
        print(f"model of {format_size(size)}, {len(os.sched_getaffinity(0))} cores", flush=True)
        result = measure(arguments, folder / "model", int(size * arguments.resident), file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
