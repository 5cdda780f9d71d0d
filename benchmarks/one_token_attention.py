"""Attention of one token to its sequence's keys and values: the compiled kernels beside torch's, in bf16 and with a KV
cache of 8 and 4 bits.

How to run (some minutes; half a minute with --quick; needs a processor with AVX2):

    python benchmarks/one_token_attention.py [--quick] [--threads N] [--rounds 10] [--json FILE]

Llama-3-8B's heads (32, 8 for keys, of 128) and contexts of 64 to 32,768 tokens; --quick: up to 512. One call appends
the token and attends, as a layer of a run does. In each round one after the other, each time in another of several
caches, so that what is read comes from memory as it does in a run. Medians; GB/s counts keys and values, and of a
low-bit cache scales, zeros, and the window in bf16. "unpacked" is the way of a low-bit cache without a compiler: pages
become float32, and torch attends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the compute worker

import torch
from cpu_compute import seconds

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import floats_obstacle, instruction_set
from pipo_ray.model.kv_cache import SequenceCache, SequenceKV
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule

HEADS, KV_HEADS, DIM = 32, 8, 128
LENGTHS = (64, 512, 2048, 8192, 32768)
LOW_BIT_LENGTHS = (1024, 8192, 32768)
_UNCACHED_BYTES = 80 << 20
_SHORTER = 32
"""So many tokens less there are at first: no page is packed while it is measured, which is every 64th token."""
_CHUNK = 1024


def attention(
    length: int, rounds: int, bits: int, compiled: CompiledAttention | None, shorter: int = _SHORTER
) -> tuple[Callable[[], object], int]:
    """A call that attends to about `length` tokens in the next of several caches, and the bytes that it reads."""
    nbytes = 4 * KV_HEADS * DIM * length * bits // 16
    caches: list[SequenceKV] = []
    count = max(2, _UNCACHED_BYTES // nbytes)
    memory = torch.randn(2, KV_HEADS, length, DIM).bfloat16()
    queries = torch.zeros(HEADS, _CHUNK, DIM, dtype=torch.bfloat16)
    for _ in range(count):
        capacity = length + rounds
        cache: SequenceKV
        cache = (
            SequenceCache(capacity, compiled=compiled) if bits == 16 else LowBitStore((bits,), compiled).open(capacity)
        )
        for start in range(0, length - shorter, _CHUNK):
            part = memory[:, :, start : min(start + _CHUNK, length - shorter)]
            # They see hardly anything: what is attended to here does not matter.
            cache.attend(0, queries[:, : part.shape[2]], part[0], part[1], AttentionRule(1.0, sliding_window=1))
            cache.advance(part.shape[2])
        caches.append(cache)
    turn = itertools.cycle(caches)
    query, new = torch.randn(HEADS, 1, DIM).bfloat16(), torch.randn(2, KV_HEADS, 1, DIM).bfloat16()
    rule = AttentionRule(DIM**-0.5)

    def call() -> None:
        cache = next(turn)
        cache.attend(0, query, new[0], new[1], rule)
        cache.advance(1)

    return call, caches[0].nbytes * length // caches[0].capacity


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            took = seconds(call, "wall")
            if number:  # the first call compiles
                taken[name].append(took)
    return {name: statistics.median(times) for name, times in taken.items()}


def wide(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """16 bits: torch and the kernel."""
    rows: list[dict[str, Any]] = []
    print(f"{'tokens':>8}{'torch us':>12}{'compiled us':>14}{'times':>8}{'GB/s':>8}")
    for length in lengths:
        calls = {
            name: attention(length, rounds, 16, one, 1)[0]
            for name, one in (("torch", None), ("compiled", CompiledAttention()))
        }
        took = medians(calls, rounds)
        torch_s, ours_s = took["torch"], took["compiled"]
        rate = 4 * KV_HEADS * DIM * length / ours_s
        rows.append({"tokens": length, "torch_s": torch_s, "compiled_s": ours_s, "bytes_per_s": rate})
        print(
            f"{length:>8}{torch_s * 1e6:>12.0f}{ours_s * 1e6:>14.0f}{torch_s / ours_s:>8.1f}{rate / 1e9:>8.1f}",
            flush=True,
        )
    return rows


def low_bit(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """16, 8 and 4 bits, compiled, and the low-bit ones unpacked."""
    rows: list[dict[str, Any]] = []
    print(f"{'tokens':>8}{'bits':>6}{'unpacked us':>13}{'compiled us':>13}{'of 16 bits':>12}{'GB/s':>8}")
    for length in lengths:
        made = {f"{bits}": attention(length, rounds, bits, CompiledAttention()) for bits in (16, 8, 4)}
        made |= {f"{bits} unpacked": attention(length, rounds, bits, None) for bits in (8, 4)}
        took = medians({name: call for name, (call, _) in made.items()}, rounds)
        for bits in ("16", "8", "4"):
            unpacked_s, rate = took.get(f"{bits} unpacked"), made[bits][1] / took[bits]
            rows.append(
                {
                    "tokens": length,
                    "bits": int(bits),
                    "unpacked_s": unpacked_s,
                    "compiled_s": took[bits],
                    "bytes_per_s": rate,
                }
            )
            before = "" if unpacked_s is None else f"{unpacked_s * 1e6:.0f}"
            ours_us, share = took[bits] * 1e6, took[bits] / took["16"]
            print(f"{length:>8}{bits:>6}{before:>13}{ours_us:>13.0f}{share:>12.2f}{rate / 1e9:>8.1f}", flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if instruction_set() is None:
        parser.error(str(floats_obstacle()))
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads")
    with torch.inference_mode():
        result = {
            "16 bits": wide(LENGTHS[:2] if options.quick else LENGTHS, options.rounds),
            "low bit": low_bit(LOW_BIT_LENGTHS[:1] if options.quick else LOW_BIT_LENGTHS, options.rounds),
        }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
