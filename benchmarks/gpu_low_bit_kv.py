"""Attention of one token to a KV cache at 16, 8 and 4 bits on a GPU: the device's time, the host's, and the bandwidth.

How to run (about a minute; --tune cuts the kernel in other ways instead):

    python benchmarks/gpu_low_bit_kv.py [--quick] [--tune] [--json FILE]

Llama-3-8B's heads (32 that ask, 8 of keys, 128 channels) in bf16: one new token of each of 1, 4 and 32 sequences behind
2,048, 8,192 and 32,768 tokens, layer by layer, in so many layers that what one reads is not in the L2 cache when it is
read again. Everything goes through the run's own caches and its attention function:

    16 bits         a KV pool, torch's FlashAttention, one call for all sequences
    8, 4 unpacked   packed pages, unpacked by torch's operations and attended to chunk by chunk, sequence by sequence
    8, 4 kernel     packed pages as they are, by the Triton kernel, one launch for all sequences

For each: `device`, by events around calls that were queued while the device was busy, so that it does not wait for the
host (not for `unpacked`, which is more launches than the device's queue holds); `host`, what the thread that launches
is busy for; `whole`, a sweep's time when nothing is queued ahead, about the longer of both. All of them a layer's, the
median of five rounds. GB/s counts the bytes of pages and windows that are read, `share` is of what a copy in device
memory reads and writes. `packing` is a layer's whole time in a sweep in which a page of every sequence leaves its
window.
Outputs of `kernel` are compared with those of `unpacked` first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pipo_ray.model.attention import ragged_attention, ragged_row
from pipo_ray.model.gpu import choose_attention_kernels
from pipo_ray.model.kv_cache import KVStore, RaggedCache, Segment, SequenceKV
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_pool import KVPool, PooledCache
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.packed_rows import PackedRows
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout
from pipo_ray.quant.kv_rounding import pack_pages, views_of
from pipo_ray.triton_kernels.packed_kernels import PackedKernels, Tuning

HEADS, KV_HEADS, DIM = 32, 8, 128
COUNTS, LENGTHS = (1, 4, 32), (2048, 8192, 32768)
KINDS = ("16 bits", "8 unpacked", "8 kernel", "4 unpacked", "4 kernel")
ROOM = 256
"""Tokens that a sequence may get meanwhile."""

_IN_WINDOW = 130
_READ_BYTES = 160 << 20
_MOST_LAYERS = 48
_ROUNDS = 5
_TOLERANCE = 0.01
_CYCLES_PER_SECOND = 2.0e9

Sweep = Callable[[], Tensor]


@dataclass
class Layers:
    """Sequences with a cache in so many layers, and tensors of a new token of each of them."""

    store: KVStore
    caches: list[SequenceKV]
    num_layers: int
    row: tuple[Tensor, Tensor, Tensor]
    read_bytes: int

    def sweep(self) -> Tensor:
        """A token more of each; what came of the last layer."""
        segments = tuple(Segment(cache, at, at + 1) for at, cache in enumerate(self.caches))
        cache = RaggedCache(segments, self.store)
        query, keys, values = self.row
        cache.begin_sweep()
        module = torch.nn.Identity()
        with ragged_row(cache):
            for layer in range(self.num_layers):
                cache.update(keys, values, layer)
                output, _ = ragged_attention(module, query, keys, values)
        cache.advance()
        return output


def new_tokens(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values [1, heads, count, dim] as projections give them."""
    query, keys, values = (
        torch.randn(1, count, heads, DIM, device=device).bfloat16().transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return query, keys, values


def random_pages(bits: int, device: torch.device) -> Tensor:
    """A few pages of random tokens, uint8 [pages, page_bytes]."""
    layout = PageLayout(KV_HEADS, DIM, DIM, bits)
    pages = torch.zeros(16, layout.page_bytes, dtype=torch.uint8, device=device)
    keys, values = (torch.randn(KV_HEADS, 16 * PAGE_TOKENS, DIM, device=device) + 0.5 for _ in range(2))
    pack_pages(keys, values, views_of(pages, layout), layout)
    return pages


def random_window(device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of 130 tokens, [heads, tokens, dim]."""
    keys, values = (torch.randn(KV_HEADS, _IN_WINDOW, DIM, device=device).bfloat16() for _ in range(2))
    return keys, values


def packed_layers(
    bits: int, count: int, length: int, kernels: PackedKernels | None, row: tuple[Tensor, Tensor, Tensor],
    num_layers: int, pages: Tensor, window: tuple[Tensor, Tensor],
) -> Layers:  # fmt: skip
    """With `length` tokens of each, of which 130 are in the window."""
    few = (bits,) * num_layers
    store = LowBitStore(few, rows=None if kernels is None else PackedRows(few, kernels))
    num_pages = (length - _IN_WINDOW) // PAGE_TOKENS
    repeated = pages.repeat(-(-num_pages // len(pages)), 1)[:num_pages]
    caches: list[SequenceKV] = []
    for _ in range(count):
        cache: LowBitCache = store.open(length + ROOM)
        for layer in range(num_layers):
            memory = cache.layer_for(layer, row[1][0, :, :1], row[2][0, :, :1], AttentionRule(1.0))
            memory.put_pages(repeated)
            memory.put(*window)
        cache.advance(num_pages * PAGE_TOKENS + _IN_WINDOW)
        caches.append(cache)
    read = num_pages * pages.shape[1] + 4 * KV_HEADS * _IN_WINDOW * DIM
    return Layers(store, caches, num_layers, row, count * read)


def wide_layers(count: int, length: int, row: tuple[Tensor, Tensor, Tensor], num_layers: int) -> Layers:
    """The same at 16 bits."""
    pool = KVPool(count * (length + ROOM), row[0].device)
    caches: list[SequenceKV] = []
    for _ in range(count):
        cache: PooledCache = pool.open(length + ROOM)
        cache.advance(length)
        caches.append(cache)
    for layer in range(num_layers):
        for one in pool.layer(layer, row[1][0], row[2][0]):
            one.normal_()
    return Layers(pool, caches, num_layers, row, count * length * 4 * KV_HEADS * DIM)


def num_layers_for(count: int, length: int) -> int:
    """So many that together they read more at 4 bits than a cache holds, and at least two."""
    page_bytes = PageLayout(KV_HEADS, DIM, DIM, 4).page_bytes
    return max(2, min(_MOST_LAYERS, -(-_READ_BYTES // (count * length // PAGE_TOKENS * page_bytes))))


def seconds_of(layers: Layers, kind: str) -> dict[str, float]:
    """See above."""
    host, whole, device = [], [], []
    layers.sweep()
    torch.cuda.synchronize()
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        layers.sweep()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    if "unpacked" not in kind:
        for _ in range(_ROUNDS):
            device.append(queued_seconds(layers.sweep, 2 * median(host)))
    found = {"host": host, "whole": whole, "device": device}
    return {name: median(taken) / layers.num_layers for name, taken in found.items() if taken}


def queued_seconds(sweep: Sweep, asleep_s: float) -> float:
    """The device's, for what is queued while it sleeps."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(asleep_s * _CYCLES_PER_SECOND))
    begin.record()
    sweep()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def packing_seconds(layers: Layers) -> float:
    """Of a layer in the sweep with which a page leaves every window."""
    while (layers.caches[0].length + 1) % PAGE_TOKENS:
        layers.sweep()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    layers.sweep()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / layers.num_layers


def measure(
    device: torch.device, counts: tuple[int, ...], lengths: tuple[int, ...], rate: float
) -> list[dict[str, Any]]:
    """An entry for each number of sequences, length and kind."""
    kernels = PackedKernels(device)
    result = []
    for count, length in itertools.product(counts, lengths):
        num_layers = num_layers_for(count, length)
        row = new_tokens(count, device)
        window = random_window(device)
        outputs: dict[int, Tensor] = {}
        for kind in KINDS:
            bits = int(kind.split()[0])
            if bits == 16:
                layers = wide_layers(count, length, row, num_layers)
            else:
                torch.manual_seed(bits)
                by = kernels if "kernel" in kind else None
                layers = packed_layers(bits, count, length, by, row, num_layers, random_pages(bits, device), window)
                got = layers.sweep()
                require_equal(got, outputs.setdefault(bits, got), kind)
            entry: dict[str, Any] = {"sequences": count, "tokens": length, "kind": kind, "layers": num_layers,
                                     "read_bytes": layers.read_bytes}  # fmt: skip
            entry |= {f"{name}_s": seconds for name, seconds in seconds_of(layers, kind).items()}
            if "device_s" in entry:
                entry["bytes_per_s"] = layers.read_bytes / entry["device_s"]
                entry["share"] = entry["bytes_per_s"] / rate
            if bits != 16 and length == lengths[0]:
                entry["packing_s"] = packing_seconds(layers)
            result.append(entry)
            print(line_of(entry), flush=True)
            del layers
    return result


def require_equal(got: Tensor, wanted: Tensor, kind: str) -> None:
    """Raise ArithmeticError if they differ by more than rounding explains."""
    error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    if not error < _TOLERANCE:
        raise ArithmeticError(f"{kind} is off by {error:.2%}")


def line_of(entry: dict[str, Any]) -> str:
    """A row of the table, in microseconds and GB/s."""
    cells = [f"{entry['sequences']:4} {entry['tokens']:6} {entry['kind']:11} {entry['layers']:3}"]
    for name in ("device_s", "host_s", "whole_s"):
        cells.append(f"{entry[name] * 1e6:10.1f}" if name in entry else f"{'':10}")
    cells.append(f"{entry['bytes_per_s'] / 1e9:7.0f} {entry['share']:6.0%}" if "share" in entry else f"{'':14}")
    cells.append(f"{entry['packing_s'] * 1e6:10.1f}" if "packing_s" in entry else "")
    return " ".join(cells)


TUNINGS = (
    (Tuning(), (4, 8, 16)),
    (Tuning(registers=None), (8,)),
    (Tuning(stages=3), (8,)),
    (Tuning(rows=16, registers=None), (8,)),
    (Tuning(warps=2, registers=None), (8, 16)),
)
"""Ways to cut the kernel, each of which is compiled, and in how many programs for a multiprocessor."""


def tune(device: torch.device, rate: float) -> None:
    """Print the device's microseconds of the kernel, and the share of a copy's bandwidth, cut in other ways."""
    shapes = ((1, 2048), (1, 32768), (32, 2048), (32, 8192))
    columns = list(itertools.product((4, 8), shapes))
    print(
        f"{'programs warps stages rows registers':38}" + "".join(f"{f'{bits} {shape}':>20}" for bits, shape in columns)
    )
    window, cases = random_window(device), []
    for bits, (count, length) in columns:
        pages, num_layers, row = random_pages(bits, device), num_layers_for(count, length), new_tokens(count, device)
        kernels = PackedKernels(device)
        cases.append((kernels, packed_layers(bits, count, length, kernels, row, num_layers, pages, window)))
    for tuning, programs in TUNINGS:
        for each in programs:
            cells = []
            for kernels, layers in cases:
                kernels.tune(replace(tuning, programs=each))
                layers.sweep()
                taken = median(queued_seconds(layers.sweep, 0.02) for _ in range(_ROUNDS)) / layers.num_layers
                cells.append(f"{taken * 1e6:13.1f} {layers.read_bytes / taken / rate:5.0%} ")
            print(f"{each:8} {tuning.warps:5} {tuning.stages:6} {tuning.rows:4} {tuning.registers!s:>10}  "
                  + "".join(cells), flush=True)  # fmt: skip


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> Tensor:
        for _ in range(8):
            target.copy_(source)
        return target

    return 16 * source.nbytes / median(queued_seconds(copies, 0.01) for _ in range(_ROUNDS))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 32 sequences, 2,048 and 8,192 tokens")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    choose_attention_kernels()
    card = torch.cuda.get_device_name(device)
    with torch.inference_mode():
        rate = copy_rate(device)
        print(f"{card}, torch {torch.__version__}; a copy reads and writes {rate / 1e9:.0f} GB/s", flush=True)
        if options.tune:
            tune(device, rate)
            return
        counts, lengths = (COUNTS[::2], LENGTHS[:2]) if options.quick else (COUNTS, LENGTHS)
        print("of a layer, in microseconds")
        print(f"{'seq.':>4} {'tokens':>6} {'':11} {'of':>3} {'device':>10} {'host':>10} {'whole':>10} {'GB/s':>7} "
              f"{'share':>6} {'packing':>10}")  # fmt: skip
        entries = measure(device, counts, lengths, rate)
    if options.json:
        options.json.write_text(json.dumps({"card": card, "copy_bytes_per_s": rate, "attention": entries}, indent=1))


if __name__ == "__main__":
    main()
