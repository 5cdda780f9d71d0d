"""Products with int4, int8 and bf16 weights on the CPU: bandwidth at one row, arithmetic at many, for every kernel.

How to run (about two minutes; a few seconds with --quick):

    python benchmarks/low_bit_kernels.py [--quick] [--clock wall|processor] [--threads N] [--rounds 7] [--json FILE]

Weights [14336, 4096] (of a feed-forward layer of Llama-3-8B; --quick: [2048, 2048]) times 1 to 512 rows of input. So
many weights in turn that none is in the cache. In each round one after the other: every kernel of int4 in groups of 64
and of int8 (`packed` is torch's low-bit kernel; `compiled`, `blocks` and `amx` are the project's own, where the
processor has what they need, `amx` by its matrix unit; `dots`, `outer` and `words`, too, where it has AVX2 only;
`native` and `wide` unpack 4 MiB at a time for torch's bf16 and float32 product; what takes eight times as long as what
was chosen is left out with more rows), what the measured profile chooses, bf16 as a run would multiply it, and a plain
read of 128 MiB with as many threads. Medians over the rounds; GB/s counts the bytes of weights with scales and zeros,
and the share of the memory's bandwidth is that over the plain read in the same rounds. Then torch's int4 kernel and the
project's own at one row with panels of up to 1 to 16 MiB: what a smaller panel costs in starting threads.

--clock processor counts seconds of processor time over the number of threads instead of seconds on the wall: for a
machine on which something else is running. It leaves out what threads wait for each other, so the last table needs
the wall.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the compute worker

import torch
from cpu_compute import seconds

from pipo_ray.model.cpu_kernels import OwnKernels
from pipo_ray.model.cpu_linear import CpuProducts, measure_profile
from pipo_ray.model.kernel_profile import KERNELS
from pipo_ray.model.low_bit import (
    LowBitProducts,
    always_low_bit,
    compiled_low_bit,
    float_low_bit,
    layout_of,
    measure_low_bit,
)
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import PANEL_BYTES, divide, machine_layout

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PANEL_MIB = (1, 2, 4, 8, 16)
_HOPELESS = 8.0
_UNCACHED_BYTES = 128 << 20
READ = "plain read"

Product = Callable[[], object]


def low_bit_product(
    products: LowBitProducts, inputs: torch.Tensor, shape: tuple[int, int], name: str, panel_bytes: int = PANEL_BYTES
) -> tuple[Product, int]:
    """A call that multiplies with the next of several weights, and the bytes of one."""
    panels = divide(*shape, LowBitFormat.parse(name), machine_layout(), panel_bytes)
    nbytes = panels.num_panels * panels.panel_bytes
    count = max(2, _UNCACHED_BYTES // nbytes)
    memory = itertools.cycle(torch.zeros(count, *panels.shape, dtype=torch.uint8))
    return lambda: products.linear(inputs, next(memory), panels, panels.rows, None), nbytes


def own_kernels() -> dict[str, Any]:
    """Those that a run would have, by the arguments that take them."""
    compiled = compiled_low_bit()
    return {"compiled": compiled, "floats": float_low_bit() if compiled is None else None}


def measure(rows: Sequence[int], shape: tuple[int, int], rounds: int, clock: str) -> list[dict[str, Any]]:
    """One entry per number of rows and kind of product: median seconds, bytes of the weight, floating point operations
    per second.
    """
    machine, own_low_bit = machine_layout(), own_kernels()
    low_bit = measure_low_bit(["int4", "int8"], **own_low_bit)
    plain = torch.ones(_UNCACHED_BYTES // 8, dtype=torch.int64)
    own = OwnKernels.of(torch.bfloat16)
    sixteen = CpuProducts(measure_profile(torch.bfloat16, own), own)
    weights = itertools.cycle([sixteen.bind(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(3)])
    result: list[dict[str, Any]] = []
    hopeless: set[str] = set()
    for number in rows:
        inputs = torch.randn(number, shape[1]).bfloat16()
        calls: dict[str, tuple[Product, int]] = {
            READ: (plain.sum, plain.nbytes),
            "bf16": (lambda inputs=inputs: sixteen.linear(inputs, next(weights)), 2 * shape[0] * shape[1]),
        }
        for name in ("int4", "int8"):
            layout = layout_of(LowBitFormat.parse(name))
            calls[name] = low_bit_product(LowBitProducts(low_bit, machine, **own_low_bit), inputs, shape, name)
            for kernel in KERNELS[layout]:
                if kernel not in low_bit.costs[layout] or f"{name} {kernel}" in hopeless:
                    continue
                products = LowBitProducts(always_low_bit(kernel), machine, **own_low_bit)
                calls[f"{name} {kernel}"] = low_bit_product(products, inputs, shape, name)
        taken: dict[str, list[float]] = {kind: [] for kind in calls}
        for _ in range(rounds):
            for kind, (call, _) in calls.items():
                taken[kind].append(seconds(call, clock))
        for kind, (_, nbytes) in calls.items():
            median = statistics.median(taken[kind])
            operations = 2 * number * shape[0] * shape[1]
            result.append(
                {"rows": number, "product": kind, "seconds": median, "least_s": min(taken[kind]),
                 "bytes": nbytes, "bytes_per_s": nbytes / median, "flops": operations / median}
            )  # fmt: skip
            name, _, kernel = kind.partition(" ")
            if kernel and kind != READ and median > _HOPELESS * statistics.median(taken[name]):
                hopeless.add(kind)
    return result


def measure_panels(shape: tuple[int, int], rounds: int, clock: str) -> dict[str, dict[int, float]]:
    """Of torch's int4 kernel and of the project's own, at one row: bytes per second by MiB of a panel."""
    own = own_kernels()
    kernels = ["packed", *(["compiled"] if own["compiled"] is not None else []),
               *(["words"] if own["floats"] is not None else [])]  # fmt: skip
    inputs = torch.randn(1, shape[1]).bfloat16()
    calls = {
        (kernel, mib): low_bit_product(
            LowBitProducts(always_low_bit(kernel), machine_layout(), **own),
            inputs, shape, "int4", mib << 20,
        )
        for kernel in kernels for mib in PANEL_MIB
    }  # fmt: skip
    taken: dict[tuple[str, int], list[float]] = {call: [] for call in calls}
    for _ in range(4 * rounds):
        for name, (call, _) in calls.items():
            taken[name].append(seconds(call, clock))
    rates = {name: nbytes / statistics.median(taken[name]) for name, (_, nbytes) in calls.items()}
    return {kernel: {mib: rates[kernel, mib] for mib in PANEL_MIB} for kernel in kernels}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, rows, rounds = ((2048, 2048), (1, 16, 128), 3) if options.quick else ((14336, 4096), ROWS, options.rounds)
    with torch.inference_mode():
        products = measure(rows, shape, rounds, options.clock)
        panels = measure_panels(shape, rounds, options.clock)
    print(f"weight {list(shape)}, {options.threads} threads, int4 layout {machine_layout()}, clock {options.clock}")
    kinds = list(dict.fromkeys(entry["product"] for entry in products))
    read = {entry["rows"]: entry["bytes_per_s"] for entry in products if entry["product"] == READ}
    titles: dict[str, Callable[[dict[str, Any]], float]] = {
        "GB/s of weights": lambda entry: entry["bytes_per_s"] / 1e9,
        "% of plain read": lambda entry: 100 * entry["bytes_per_s"] / read[entry["rows"]],
        "GFLOP/s": lambda entry: entry["flops"] / 1e9,
    }
    for title, value in titles.items():
        print(f"\n{title:16}" + "".join(f"{number:>8}" for number in rows))
        for kind in kinds:
            if title != "GFLOP/s" or kind != READ:
                values = {entry["rows"]: value(entry) for entry in products if entry["product"] == kind}
                print(f"{kind:16}" + "".join(f"{values[one]:8.1f}" if one in values else f"{'-':>8}" for one in rows))
    for kernel, rates in panels.items():
        print(f"\nint4 {kernel}, one row, panels of MiB: "
              + ", ".join(f"{mib}: {rate / 1e9:.1f} GB/s" for mib, rate in rates.items()))  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"products": products, "panels": panels}, indent=1))


if __name__ == "__main__":
    main()
