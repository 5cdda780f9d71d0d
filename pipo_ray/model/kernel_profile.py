"""Which kernel multiplies low-bit weights, or 16-bit ones on the CPU: measured seconds in, a choice out.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pipo_ray.json_file import write_json

Layout = Literal["linear", "matmul", "int4", "int8", "cuda-int4", "cuda-int8"]
"""How a weight is multiplied: "linear" is `x @ weight.T` of [out, in], "matmul" is `x @ weight` of [in, out];
"int4" and "int8" are `x @ weight.T` of low-bit panels, with "cuda" in front on a CUDA device.
"""

Kernel = Literal[
    "native",
    "wide",
    "tall",
    "dots",
    "outer",
    "words",
    "amx",
    "packed",
    "compiled",
    "blocks",
    "codes",
    "vector",
    "tiles",
]
"""Torch's own 16-bit product; or float32 products of weights widened chunk by chunk, as inputs times weights or as
weights times inputs; or our own float32 products, of which "dots" widens weights in registers, for few inputs, and
"outer" in the first cache, and of int4 "words" in whole numbers of 16 bits; or one of ours by the processor's matrix
unit, of bf16 or low-bit weights; or torch's low-bit product, or one of our own, of bf16 weights as well
(`pipo_ray/compiled`), of which "blocks" unpacks a part of the weight at a time. Low-bit weights are widened to 16 bits
for the native one, and for the matrix unit. The last three are CUDA's: "codes" of int4, the others of int8, for few and
for more rows (`pipo_ray/triton_kernels`).
"""

KERNELS: Mapping[Layout, tuple[Kernel, ...]] = {
    "linear": ("native", "wide", "tall", "dots", "outer", "compiled", "amx"),
    "matmul": ("native", "wide"),
    "int4": ("packed", "compiled", "words", "amx", "native", "wide"),
    "int8": ("packed", "compiled", "blocks", "dots", "outer", "amx", "native", "wide"),
    "cuda-int4": ("codes", "native"),
    "cuda-int8": ("vector", "tiles", "native"),
}
SIXTEEN_BIT_LAYOUTS: tuple[Layout, ...] = ("linear", "matmul")

SCRATCH_BYTES = 4 << 20
"""What a chunk of weights takes in float32. Large enough that starting the threads for each chunk costs little, small
enough for the last-level cache of most processors.
"""

GPU_SCRATCH_BYTES = 64 << 20
"""What low-bit weights take on a CUDA device while they are multiplied: for sums of parts, and for weights unpacked to
16 bits, of which a product with fewer rows than this allows would leave processors idle.
"""


@dataclass(frozen=True)
class Cost:
    """A kernel's measured time: `fixed_s` seconds per call, and for each of `rows` inputs `per_element_s` seconds per
    element of the weight; and `launch_s`, what the host of a device takes to launch it once, while the device computes
    what was launched before.
    """

    fixed_s: float
    rows: tuple[int, ...]
    per_element_s: tuple[float, ...]
    launch_s: float = 0.0

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Cost:
        """From its fields by name, with lists for tuples; `launch_s` may be missing, as in older versions."""
        rows, rates = tuple(raw["rows"]), tuple(raw["per_element_s"])
        return cls(raw["fixed_s"], rows, rates, raw.get("launch_s", 0.0))

    def seconds(self, rows: int, elements: int) -> float:
        """Predicted seconds of a product of `rows` inputs with a weight of `elements` where it is computed; linear
        between what was measured and in proportion to `rows` beyond it.
        """
        return self.fixed_s + elements * self._rate(rows)

    def _rate(self, rows: int) -> float:
        for (low, low_s), (high, high_s) in pairwise(zip(self.rows, self.per_element_s, strict=True)):
            if rows <= high:
                share = max(0.0, (rows - low) / (high - low))
                return low_s + share * (high_s - low_s)
        return self.per_element_s[-1] * max(1.0, rows / self.rows[-1])


def cleaned(rates: Sequence[float]) -> tuple[float, ...]:
    """Measured rates by rising number of rows, without what disturbed them: fewer rows cannot take longer than more."""
    result: list[float] = []
    for rate in reversed(rates):
        result.append(min(rate, result[-1]) if result else rate)
    return tuple(reversed(result))


@dataclass(frozen=True)
class KernelProfile:
    """Costs of every kernel for one 16-bit dtype and one number of threads.

    The same profile chooses the same kernel for the same shapes: it is kept (`kept_profiles.py`), so that a compute
    worker that was restarted, and the next run, compute what this one would have.
    """

    dtype: str
    num_threads: int
    costs: Mapping[Layout, Mapping[Kernel, Cost]]

    def choose(
        self, layout: Layout, rows: int, elements: int, without: Collection[Kernel] = (),
        launches: Mapping[Kernel, int] = MappingProxyType({}),
    ) -> Kernel:  # fmt: skip
        """The kernel not in `without` that takes the least time, of the host or of the device, whichever is longer.
        `launches` says how often one is launched for this weight, if not once. If there is a tie the one that computes
        for less time; then the first of KERNELS.
        """

        def order(kernel: Kernel) -> tuple[float, float, int]:
            cost = self.costs[layout][kernel]
            computing = cost.seconds(rows, elements)
            launching = cost.launch_s * launches.get(kernel, 1)
            return max(computing, launching), computing, KERNELS[layout].index(kernel)

        return min((kernel for kernel in self.costs[layout] if kernel not in without), key=order)

    def save(self, file: Path) -> None:
        """Write as JSON; the file is there whole or not at all."""
        costs = {
            layout: {kernel: vars(cost) for kernel, cost in kernels.items()} for layout, kernels in self.costs.items()
        }
        write_json(file, {"dtype": self.dtype, "num_threads": self.num_threads, "costs": costs})

    @classmethod
    def load(cls, file: Path) -> KernelProfile | None:
        """What `save` wrote, in versions without `launch_s` too; None if nothing was."""
        try:
            raw = json.loads(file.read_text())
        except FileNotFoundError:
            return None
        costs: dict[Layout, dict[Kernel, Cost]] = {
            layout: {kernel: Cost.from_json(cost) for kernel, cost in kernels.items()}
            for layout, kernels in raw["costs"].items()
        }
        return cls(raw["dtype"], raw["num_threads"], costs)
