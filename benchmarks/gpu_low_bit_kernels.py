"""Products with int4 and int8 weights on a CUDA device: bandwidth at one row, arithmetic at many, for every kernel.

How to run (a minute; --quick two weights in int4-g64, less than 20 s; --tune tries other cuts of the int4 kernel
instead):

    python benchmarks/gpu_low_bit_kernels.py [--quick] [--tune] [--json FILE]

Weights [14336, 4096] and [4096, 14336] (of a feed-forward layer of Llama-3-8B), [8192, 8192] and [28672, 8192] (of
Llama-3-70B) times 1 to 2048 rows of input; so many weights in turn that none is in the L2 cache. `codes`, and of int8
`vector` and `tiles`, multiply from the panels as they are, `native` unpacks up to 64 MiB for torch's bf16 product,
`torch` is what there is without Triton: operations that unpack 4 MiB at a time (int4 in groups of 64, one row and 32;
not with --quick).
`torch int4` is torch's own kernel with the same values, put into its order of codes beforehand (`torch_int4.py`), which
a streamed weight would have to be in every sweep: that is not in its time, the least of three widths of its tiles.
Beside them torch's product with a bf16 weight, and a copy from device memory to device memory. Every kernel's products
are compared with float64 first: one of ours that is off ends the run; torch's int4 then gets a line with the reason
instead, as it does for what it refuses.

The device's own time, by events around calls that were queued together while it was busy, least of three: what the host
needs to launch is not in it. GB/s counts the panels' bytes once, scales and zeros too, for the copy the bytes read and
written; TFLOP/s counts 2 for each weight and row. Behind the table, how long torch's int4 kernel takes over the fastest
of ours (more than 1: ours is faster), what launching takes the host, and the seconds of it all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch_int4 import NAME, comparisons, timed

from pipo_ray.model.kernel_profile import KERNELS, Kernel, KernelProfile
from pipo_ray.model.low_bit import LowBitProducts
from pipo_ray.model.streamed import LinearProduct
from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import Panels, divide, machine_layout
from pipo_ray.quant.rounding import values_of
from pipo_ray.triton_kernels.measure import device_seconds
from pipo_ray.triton_kernels.products import MOST_INPUTS, TritonProducts, Tuning, layout_of

SHAPES = ((14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
NAMES = ("int4-g32", "int4-g64", "int4-g128", "int8")
ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 2048)
QUICK_SHAPES = ((28672, 8192), (4096, 14336))
QUICK_NAMES = ("int4-g64",)
QUICK_ROWS = (1, 4, 8, 16, 32, 64, 512)
CHECKED_ROWS = (1, 3, 32, 100)
LARGEST = {**MOST_INPUTS, "codes": 512, "tiles": 512, "torch": 32}
TOLERANCE = 0.006  # of the norm, bf16 weights and results; 0.002 where weights are not rounded
_ROTATING_BYTES = 160 << 20
_ROUNDS = 3
_LEAST_CALLS = 4

Product = Callable[[torch.Tensor], torch.Tensor]


def random_panels(panels: Panels, device: torch.device) -> torch.Tensor:
    """Several weights one after the other, uint8 [weights, panels, panel_bytes], more than the L2 cache holds."""
    count = max(2, _ROTATING_BYTES // (panels.num_panels * panels.panel_bytes))
    memory = torch.randint(0, 256, (count, *panels.shape), dtype=torch.uint8, device=device)
    for weight in memory:
        for panel in weight:
            scales = views_of(panel, panels).scales
            scales.copy_(torch.randn(scales.shape, device=device) / 64)
    return memory


def values(memory: torch.Tensor, panels: Panels) -> torch.Tensor:
    """The float64 weight, on the device."""
    rows = [values_of(read_rows(views_of(panel, panels), panels), panels.low_bit) for panel in memory]
    return torch.cat(rows)[: panels.rows].double()


def least(calls: Sequence[Product], inputs: torch.Tensor) -> float:
    """Seconds of the device for one of `calls`."""
    calls = [*calls] * -(-_LEAST_CALLS // len(calls))
    device_seconds(calls[:1], inputs)
    return min(device_seconds(calls, inputs) for _ in range(_ROUNDS))


def calls_of(products: TritonProducts, memory: torch.Tensor, panels: Panels, kernel: Kernel, n: int) -> list[Product]:
    """A call for each weight in `memory`."""
    return [products.product(weight, panels, panels.rows, n, kernel) for weight in memory]


def require_near(product: Product, n: int, wanted_weight: torch.Tensor, tolerance: float, name: str) -> None:
    """Raise ArithmeticError if `product` of n random rows is further than that from float64's, over the norm of it."""
    inputs = torch.randn(n, wanted_weight.shape[1], device=wanted_weight.device).bfloat16()
    wanted = inputs.double() @ wanted_weight.T
    error = float((product(inputs).double() - wanted).norm() / wanted.norm())
    if not error < tolerance:
        raise ArithmeticError(f"{name}, {n} rows: off by {error:.4f}")


def require_right(products: TritonProducts, memory: torch.Tensor, panels: Panels, wanted_weight: torch.Tensor) -> None:
    """Raise ArithmeticError if a kernel of ours is off by more than rounding explains."""
    for kernel in KERNELS[layout_of(panels)]:
        for n in CHECKED_ROWS:
            if n <= LARGEST.get(kernel, n):
                product = products.product(memory[0], panels, panels.rows, n, kernel)
                tolerance = 0.002 if kernel in ("codes", "vector") else TOLERANCE
                require_near(product, n, wanted_weight, tolerance, f"{kernel}, {panels}")


def require_torch_right(product: Product, wanted_weight: torch.Tensor) -> None:
    """The same of torch's int4 kernel, which rounds weights to bf16."""
    for n in CHECKED_ROWS:
        require_near(product, n, wanted_weight, TOLERANCE, NAME)


def measure(
    device: torch.device, shapes: Sequence[tuple[int, int]], names: Sequence[str], rows: Sequence[int], unpacked: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """An entry per shape, format, kernel and number of rows, and a line for what torch's int4 kernel does not compute.
    `unpacked` is whether torch's operations that unpack are among them.
    """
    products = TritonProducts(device)
    unpacking = LowBitProducts(KernelProfile("bfloat16", 1, {}), machine_layout(), device)
    result: list[dict[str, Any]] = []
    refused: list[str] = []

    def add(shape: tuple[int, int], name: str, kernel: str, n: int, nbytes: int, seconds: float) -> None:
        operations = 2 * n * shape[0] * shape[1]
        result.append(
            {"shape": shape, "format": name, "kernel": kernel, "rows": n, "bytes": nbytes, "seconds": seconds,
             "bytes_per_s": nbytes / seconds, "flops": operations / seconds}
        )  # fmt: skip

    for shape in shapes:
        weights = torch.randn(max(2, _ROTATING_BYTES // (2 * shape[0] * shape[1])), *shape, device=device).bfloat16()
        for n in rows:
            inputs = torch.randn(n, shape[1], device=device).bfloat16()
            calls: list[Product] = [lambda x, weight=weight: torch.mm(x, weight.t()) for weight in weights]
            add(shape, "bf16", "torch", n, weights[0].nbytes, least(calls, inputs))
        del weights, calls
        for name in names:
            panels = divide(*shape, LowBitFormat.parse(name), machine_layout())
            memory = random_panels(panels, device)
            wanted_weight = values(memory[0], panels)
            require_right(products, memory, panels, wanted_weight)
            for n in rows:
                inputs = torch.randn(n, shape[1], device=device).bfloat16()
                for kernel in KERNELS[layout_of(panels)]:
                    if n <= LARGEST.get(kernel, n):
                        seconds = least(calls_of(products, memory, panels, kernel, n), inputs)
                        add(shape, name, kernel, n, memory[0].nbytes, seconds)
                if unpacked and name == "int4-g64" and n in (1, 32):
                    before: list[Product] = [
                        partial(_unpacked, unpacking.product(weight, panels, panels.rows)) for weight in memory[:2]
                    ]
                    add(shape, name, "torch", n, memory[0].nbytes, least(before, inputs))
            if panels.low_bit.bits == 4:
                theirs, reasons = timed(
                    memory, panels, rows, partial(require_torch_right, wanted_weight=wanted_weight), least
                )
                refused += reasons
                for n, (seconds, tiles) in theirs.items():
                    add(shape, name, NAME, n, panels.num_panels * panels.panel_bytes, seconds)
                    result[-1]["inner_k_tiles"] = tiles
    return result, refused


def _unpacked(product: LinearProduct, inputs: torch.Tensor) -> torch.Tensor:
    return product(inputs, None)


def tune(device: torch.device) -> None:
    """Print bandwidths of the int4 kernel, cut in other ways."""
    for n in (1, 8, 16, 32, 64):
        for stages in (2, 3, 4):
            for programs in (4, 8, 16):
                products = TritonProducts(device, tuning=Tuning(codes_stages=stages, codes_programs=programs))
                _print_rates(f"{n} rows: {stages} stages, {programs} programs", products, device, "codes", n)


def _print_rates(title: str, products: TritonProducts, device: torch.device, kernel: Kernel, n: int) -> None:
    line = f"{title:75}"
    for name in ("int4-g32", "int4-g64"):
        for shape in ((4096, 4096), (14336, 4096), (28672, 8192)):
            panels = divide(*shape, LowBitFormat.parse(name), machine_layout())
            if (name, shape) not in _TUNED:
                _TUNED[name, shape] = random_panels(panels, device)
            memory = _TUNED[name, shape]
            inputs = torch.randn(n, shape[1], device=device).bfloat16()
            seconds = least(calls_of(products, memory, panels, kernel, n), inputs)
            line += f"{memory[0].nbytes / seconds / 1e9:8.0f}"
    print(line, flush=True)


_TUNED: dict[tuple[str, tuple[int, int]], torch.Tensor] = {}


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / least([lambda _: target.copy_(source)], source)


def host_seconds(device: torch.device) -> float:
    """What a call of the kernel "codes" takes the host, with a small weight."""
    panels = divide(64, 64, LowBitFormat.parse("int4"), machine_layout())
    memory = torch.zeros(panels.shape, dtype=torch.uint8, device=device)
    call = TritonProducts(device).product(memory, panels, 64, 1, "codes")
    inputs = torch.zeros(1, 64, dtype=torch.bfloat16, device=device)
    call(inputs)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(200):
        call(inputs)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin = time.perf_counter()
    device = torch.device("cuda", 0)
    card = torch.cuda.get_device_name(device)
    print(f"{card}, torch {torch.__version__}, int4 layout {machine_layout()}")
    with torch.inference_mode():
        if options.tune:
            tune(device)
            return
        shapes, names, rows = (QUICK_SHAPES, QUICK_NAMES, QUICK_ROWS) if options.quick else (SHAPES, NAMES, ROWS)
        copied, launched = copy_rate(device), host_seconds(device)
        entries, refused = measure(device, shapes, names, rows, unpacked=not options.quick)
    for shape in shapes:
        print(f"\n{list(shape)}: GB/s of weights, and TFLOP/s")
        print(f"{'rows':24}" + "".join(f"{n:>16}" for n in rows))
        kinds = dict.fromkeys((one["format"], one["kernel"]) for one in entries if one["shape"] == shape)
        for name, kernel in kinds:
            found = {one["rows"]: one for one in entries
                     if (one["shape"], one["format"], one["kernel"]) == (shape, name, kernel)}  # fmt: skip
            cells = [f"{found[n]['bytes_per_s'] / 1e9:8.0f} {found[n]['flops'] / 1e12:7.1f}" if n in found else ""
                     for n in rows]  # fmt: skip
            print(f"{name + ' ' + kernel:24}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"\n{NAME} / the fastest of ours, seconds, by rows")
    print("\n".join(comparisons(entries, KERNELS["cuda-int4"]) + [f"not computed: {line}" for line in refused]))
    print(f"\ncopy in device memory: {copied / 1e9:.0f} GB/s read and written; a launch takes the host "
          f"{launched * 1e6:.0f} us; {time.perf_counter() - begin:.0f} s in all")  # fmt: skip
    if options.json:
        report = {"card": card, "copy_bytes_per_s": copied, "launch_s": launched, "products": entries,
                  "not_computed": refused}  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
