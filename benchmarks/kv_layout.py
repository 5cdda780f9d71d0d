"""Why the CPU's KV cache is one range of addresses per layer and sequence: attention over four layouts.

How to run (two minutes on two cores, nothing else may run):

    python benchmarks/kv_layout.py [--quick] [--json FILE]

Attention of one sequence with Llama-3-8B's heads (32 query, 8 key/value heads of 128), by `attend`, over
contiguous  keys [heads, capacity, dim] and values apart: what `SequenceCache` keeps;
tokens      [tokens, heads * dim of keys and of values]: pages that are one transfer each, as in `KVTiers`;
padded      the same with 64 bytes more per token, so that a head's rows do not share a cache set;
gathered    pages [heads, 64, dim] copied to a contiguous scratch buffer first.
Each is timed in turn, at least seven times; printed is the median of the ratios to `contiguous`, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_cache import SequenceCache
from pipo_ray.model.kv_spans import AttentionRule

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64
Layout = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    """Parse arguments, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 up to 4,096 tokens only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cases = [(torch.float32, new, length) for new in (1, 128) for length in (512, 4096, 16384)]
    cases += [(torch.bfloat16, 1, length) for length in (512, 4096, 16384)]
    if options.quick:
        cases = [case for case in cases if case[0] == torch.float32 and case[2] <= 4096]
    rows = []
    print(f"{'dtype':9} {'new':>4} {'length':>6} {'contiguous':>11}   {'tokens':>17} {'padded':>17} {'gathered':>17}")
    for case in cases:
        row = measure(*case)
        rows.append(row)
        ratios = [f"{row[name][1]:5.2f} ({row[name][0]:.2f}-{row[name][2]:.2f})" for name in
                  ("tokens", "padded", "gathered")]  # fmt: skip
        print(
            f"{row['dtype']:9} {row['new']:4} {row['length']:6} {row['contiguous_ms']:8.2f} ms   "
            + " ".join(f"{ratio:>17}" for ratio in ratios),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def measure(dtype: torch.dtype, new: int, length: int) -> dict[str, Any]:
    """Milliseconds with contiguous keys, and the other layouts' ratios to it as quartiles."""
    query = torch.randn(HEADS, new, DIM).to(dtype)
    layouts = make_layouts(torch.randn(KV_HEADS, length, DIM).to(dtype), torch.randn(KV_HEADS, length, DIM).to(dtype))
    wanted = None
    for layout in layouts.values():
        got = attend(query, *layout(), AttentionRule(DIM**-0.5))
        wanted = got if wanted is None else wanted
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    times: dict[str, list[float]] = {name: [] for name in layouts}
    begin = time.perf_counter()
    with torch.inference_mode():
        while len(times["contiguous"]) < 7 or time.perf_counter() - begin < 4:
            for name, layout in layouts.items():
                start = time.perf_counter()
                attend(query, *layout(), AttentionRule(DIM**-0.5))
                times[name].append(time.perf_counter() - start)
    base = times.pop("contiguous")
    row: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."), "new": new, "length": length,
        "contiguous_ms": statistics.median(base) * 1e3,
    }  # fmt: skip
    for name, ours in times.items():
        row[name] = statistics.quantiles([a / b for a, b in zip(ours, base, strict=True)], n=4)
    return row


def make_layouts(keys: torch.Tensor, values: torch.Tensor) -> dict[str, Layout]:
    """Per layout what attention has to do to get at keys and values [heads, tokens, dim]."""
    heads, length, dim = keys.shape
    cache = SequenceCache(capacity=length)
    contiguous = cache.append(0, keys, values)
    pages = torch.stack([keys, values]).view(2, heads, length // PAGE, PAGE, dim).permute(2, 0, 1, 3, 4).contiguous()

    def by_tokens(padding: int) -> Layout:
        rows = torch.zeros(length, 2 * heads * dim + padding, dtype=keys.dtype)
        parts = [rows[:, at : at + heads * dim].unflatten(1, (heads, dim)).transpose(0, 1) for at in (0, heads * dim)]
        parts[0].copy_(keys)
        parts[1].copy_(values)
        return lambda: (parts[0], parts[1])

    def gathered() -> tuple[torch.Tensor, torch.Tensor]:
        whole = pages.permute(1, 2, 0, 3, 4).reshape(2, heads, length, dim)
        return whole[0], whole[1]

    return {
        "contiguous": lambda: contiguous,
        "tokens": by_tokens(0),
        "padded": by_tokens(64 // keys.itemsize),
        "gathered": gathered,
    }


if __name__ == "__main__":
    main()
