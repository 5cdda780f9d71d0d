"""A program that uses LLM, for the tests that kill it: `driver.py CHECKPOINT MODE`. It says on stdout how far it is."""

from __future__ import annotations

import os
import signal
import sys
import time

from pipo_ray import LLM, SamplingParams
from pipo_ray.session import processes

_packers: list[int] = []
_packing = False


def on_progress(phase: str, done: int, total: int) -> None:
    """Say that packing has begun, and stop whoever packs: else it may be done before the test has looked."""
    global _packing
    if phase == "inspect":
        # Before there is anything to pack: to look through all processes takes about as long as to pack does.
        _packers[:] = processes.descendants([os.getpid()])
    if phase == "pack" and not _packing:
        _packing = True
        for pid in _packers:
            os.kill(pid, signal.SIGSTOP)
        print("packing", flush=True)


def main() -> None:
    """MODE is "generate" (for ever), "idle" or "end"."""
    folder, mode = sys.argv[1:]
    print("begun", flush=True)
    with LLM(folder, memory="3GiB", weight_memory="400KiB", ray_address="local", on_progress=on_progress) as llm:
        print("started", flush=True)
        params = SamplingParams(temperature=0.0, max_tokens=3 if mode == "end" else 400, ignore_eos=True)
        while mode != "idle":
            for _ in llm.stream([[5, 6, 7], [9] * 20], params):
                print("generating", flush=True)
            if mode == "end":
                return
        time.sleep(300)


if __name__ == "__main__":
    main()
