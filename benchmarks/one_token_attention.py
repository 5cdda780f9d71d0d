"""Attention of one token to its sequence's keys and values in bf16: the compiled kernel beside torch's.

How to run (a quarter of a minute; a few seconds with --quick; needs a processor with AVX512-BF16):

    python benchmarks/one_token_attention.py [--quick] [--threads N] [--rounds 50] [--json FILE]

Llama-3-8B's heads (32, 8 for keys, of 128) and contexts of 64 to 32,768 tokens; --quick: up to 512. One call appends
the token and attends, as a layer of a run does. In each round one after the other, each time in another of several
caches, so that what is read comes from memory as it does in a run. Medians; GB/s counts keys and values.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the compute worker

import torch
from cpu_compute import seconds

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import obstacle
from pipo_ray.model.kv_cache import SequenceCache
from pipo_ray.model.kv_spans import AttentionRule

HEADS, KV_HEADS, DIM = 32, 8, 128
LENGTHS = (64, 512, 2048, 8192, 32768)
_UNCACHED_BYTES = 128 << 20


def attention(length: int, compiled: CompiledAttention | None) -> Callable[[], object]:
    """A call that attends to `length` tokens in the next of several caches."""
    nbytes = 4 * KV_HEADS * DIM * length
    memory = torch.randn(2, KV_HEADS, length, DIM).bfloat16()
    caches = []
    for _ in range(max(2, _UNCACHED_BYTES // nbytes)):
        cache = SequenceCache(length, compiled=compiled)
        cache.append(0, memory[0], memory[1])
        cache.length = length - 1  # so that each call writes the last token again
        caches.append(cache)
    turn = itertools.cycle(caches)
    query, new = torch.randn(HEADS, 1, DIM).bfloat16(), torch.randn(2, KV_HEADS, 1, DIM).bfloat16()
    rule = AttentionRule(DIM**-0.5)
    return lambda: next(turn).attend(0, query, new[0], new[1], rule)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := obstacle():
        parser.error(reason)
    torch.set_num_threads(options.threads)
    result: list[dict[str, Any]] = []
    print(f"{options.threads} threads\n{'tokens':>8}{'torch us':>12}{'compiled us':>14}{'times':>8}{'GB/s':>8}")
    with torch.inference_mode():
        for length in LENGTHS[:2] if options.quick else LENGTHS:
            calls = {"torch": attention(length, None), "compiled": attention(length, CompiledAttention())}
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for number in range(options.rounds + 1):
                for name, call in calls.items():
                    took = seconds(call, "wall")
                    if number:  # the first call compiles
                        taken[name].append(took)
            torch_s, ours_s = (statistics.median(taken[name]) for name in ("torch", "compiled"))
            rate = 4 * KV_HEADS * DIM * length / ours_s
            result.append({"tokens": length, "torch_s": torch_s, "compiled_s": ours_s, "bytes_per_s": rate})
            print(f"{length:>8}{torch_s * 1e6:>12.0f}{ours_s * 1e6:>14.0f}{torch_s / ours_s:>8.1f}{rate / 1e9:>8.1f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
