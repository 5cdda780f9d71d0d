"""How long Triton's products take on this device, by its own clock; and whether they are right. Needs triton."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from pipo_ray.model.kernel_profile import KERNELS, Cost, Kernel, KernelProfile, Layout, cleaned
from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.panels import BLOCK_ROWS, Panels, divide
from pipo_ray.quant.rounding import values_of
from pipo_ray.triton_kernels.products import MOST_INPUTS, RowsProduct, TritonProducts, layout_of

_MEASURED_ROWS = (1, 4, 16, 64, 256)
_MEASURED_SHAPE = (8192, 4096)
"""About what a slot of the usual size holds. Of a weight with fewer rows `codes` and `tiles` make more parts, each of
which has less to do: at one row [4096, 4096] takes `codes` twice as long for an element as [8192, 8192].
"""
_CHECKED_ROWS = 4, 16
"""Rows of inputs: each is for another variant of `codes`, and what does not compile is to be found at the start."""
_ROTATING_BYTES = 48 << 20
"""Weights in turn are more, so that none is in a cache: 57 MB of int4, 67 of int8. When this is measured the 96 MiB and
more that every plan has for activations are free.
"""
_TIMES = 3
_LAUNCHES = 32
_SLOWER_IN_A_RUN = 3.0
"""A launch takes longer where other threads want Python's lock and the processor's cache: in sweeps of OPT-30B in int4
80 us instead of 27 for a kernel, 350 instead of 80 - 95 for `native` in two chunks (H200, 16 cores, 2026-11-26).
"""
_SLEEP_CYCLES = 2_000_000  # about a millisecond: longer than launching what is timed
_TOLERANCE = 0.02


def check(products: TritonProducts, panels: Panels, device: torch.device) -> None:
    """Raise ArithmeticError if a kernel multiplies panels of this kind wrongly; a kernel that does not compile raises
    what Triton raises.
    """
    small = divide(BLOCK_ROWS + 8, 4 * max(64, panels.low_bit.group), panels.low_bit, panels.layout, panel_bytes=1)
    generator = torch.Generator().manual_seed(0)
    memory = torch.randint(0, 256, small.shape, dtype=torch.uint8, generator=generator)
    for panel in memory:
        scales = views_of(panel, small).scales
        scales.copy_(torch.randn(scales.shape, generator=generator))
        if small.low_bit.bits == 4 and small.low_bit.symmetric:
            scales[..., 1] = 0
    weight = torch.cat([values_of(read_rows(views_of(panel, small), small), small.low_bit) for panel in memory])
    for rows in _CHECKED_ROWS:
        inputs = torch.randn(rows, small.columns, generator=generator).bfloat16()
        wanted = inputs.double() @ weight[: small.rows].double().T
        for kernel in KERNELS[layout_of(panels)]:
            if rows > MOST_INPUTS.get(kernel, rows):
                continue
            product = products.product(memory.to(device), small, small.rows, rows, kernel)
            got = product(inputs.to(device)).double().cpu()
            error = float((got - wanted).norm() / wanted.norm())
            if not error < _TOLERANCE:
                raise ArithmeticError(f"the kernel {kernel} for {panels.format} is off by {error:.1%}")


def measure(products: TritonProducts, kinds: Collection[Panels], device: torch.device) -> KernelProfile:
    """Costs of every kernel for panels like `kinds`, one of int4 and one of int8 at most."""
    with torch.inference_mode():
        costs = {layout_of(panels): _costs(products, panels, device) for panels in kinds}
    return KernelProfile("bfloat16", torch.get_num_threads(), costs)


def _costs(products: TritonProducts, kind: Panels, device: torch.device) -> dict[Kernel, Cost]:
    layout: Layout = layout_of(kind)
    panels = divide(*_MEASURED_SHAPE, kind.low_bit, kind.layout)
    nbytes = panels.num_panels * panels.panel_bytes
    weights = torch.zeros(max(2, -(-_ROTATING_BYTES // nbytes)), *panels.shape, dtype=torch.uint8, device=device)
    small = divide(BLOCK_ROWS, max(64, kind.low_bit.group), kind.low_bit, kind.layout)
    nothing = torch.zeros(2, *small.shape, dtype=torch.uint8, device=device)
    launching = {
        kernel: _SLOWER_IN_A_RUN * _host_seconds(products, nothing[0], small, kernel) for kernel in KERNELS[layout]
    }
    # One launch each: what they take the host differs by chance, which must not decide.
    one_launch = [kernel for kernel in launching if kernel != "native"]
    launching.update(dict.fromkeys(one_launch, min(launching[kernel] for kernel in one_launch)))
    result: dict[Kernel, Cost] = {}
    for kernel in KERNELS[layout]:
        fixed = _seconds(products, nothing, small, 1, kernel)
        counts = [rows for rows in _MEASURED_ROWS if rows <= MOST_INPUTS.get(kernel, rows)]
        taken = [_seconds(products, weights, panels, rows, kernel) for rows in counts]
        elements = panels.rows * panels.columns
        rates = cleaned([max(0.0, seconds - fixed) / elements for seconds in taken])
        result[kernel] = Cost(fixed, tuple(counts), rates, launching[kernel])
    return result


def _seconds(products: TritonProducts, weights: torch.Tensor, panels: Panels, rows: int, kernel: Kernel) -> float:
    """Of the device, for a product with one of `weights`, which are taken in turns: the least of several times."""
    inputs = torch.ones(rows, panels.columns, dtype=torch.bfloat16, device=weights.device)
    calls = [products.product(memory, panels, panels.rows, rows, kernel) for memory in weights]
    device_seconds(calls, inputs)  # compiles
    return min(device_seconds(calls, inputs) for _ in range(_TIMES))


def _host_seconds(products: TritonProducts, memory: torch.Tensor, panels: Panels, kernel: Kernel) -> float:
    """Of the host, for a product with a small weight: one launch, or one that unpacks and torch's product."""
    inputs = torch.ones(1, panels.columns, dtype=torch.bfloat16, device=memory.device)
    call = products.product(memory, panels, panels.rows, 1, kernel)
    call(inputs)  # compiles
    times = []
    for _ in range(_TIMES):
        torch.cuda.synchronize()  # so few calls never wait for room in the device's queue
        begin = time.perf_counter()
        for _ in range(_LAUNCHES):
            call(inputs)
        times.append((time.perf_counter() - begin) / _LAUNCHES)
    return min(times)


def device_seconds(calls: Collection[RowsProduct], inputs: torch.Tensor) -> float:
    """The device's time for one of `calls`, which it gets all together so that it does not wait for the host."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_SLEEP_CYCLES)
    begin.record()
    for call in calls:
        call(inputs)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / len(calls)
