"""Measured costs of kernels, kept: for a run in its session folder, for the machine in the cache folder.

Two runs that choose by different costs may multiply the same shape by different kernels, whose sums are rounded
differently. So what a machine measured once holds until something changes that a cost depends on. Each layout has a
file of its own, `kernels-<key>.json`; the key is made of what the costs depend on, which stands in the file, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipo_ray.json_file import keep_first, key_of
from pipo_ray.model.kernel_profile import Cost, Kernel, KernelProfile, Layout
from pipo_ray.quant.panels import processor_flags

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "compiled/*.py", "triton_kernels/*.py", "model/cpu_linear.py", "model/cpu_kernels.py", "model/low_bit.py",
    "model/kernel_profile.py", "quant/codec.py",
)  # fmt: skip
"""Our kernels, what hands products to them, and what measures them."""

Costs = Mapping[Kernel, Cost]


@dataclass(frozen=True)
class ProfilePlaces:
    """`session` is a file, for the compute workers that take another's place in a run; `machine` a folder that outlives
    the run. Without one nothing is kept there.
    """

    session: Path | None = None
    machine: Path | None = None


@dataclass(frozen=True)
class Measurable:
    """The `kernels` of a layout that can be measured here; `facts` are what their costs depend on besides the
    processor, torch and our own code.
    """

    kernels: Collection[Kernel]
    facts: Mapping[str, Any] = field(default_factory=dict)


def kept_profile(
    places: ProfilePlaces,
    dtype: torch.dtype,
    wanted: Mapping[Layout, Measurable],
    measure: Callable[[Collection[Layout]], Mapping[Layout, Costs]],
) -> KernelProfile:
    """The profile of the `wanted` layouts: the session's, else put together from what the machine has kept and what
    `measure` finds of the others. Of runs that measure at the same time all take what the first of them has kept.
    """
    name, num_threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    kept = None if places.session is None else KernelProfile.load(places.session)
    if kept is not None and (kept.dtype, kept.num_threads) == (name, num_threads) and set(wanted) <= set(kept.costs):
        return kept
    files = {layout: _MachineFile.of(places.machine, layout, name, num_threads, one) for layout, one in wanted.items()}
    costs = {layout: found for layout, file in files.items() if (found := file.read()) is not None}
    if missing := [layout for layout in wanted if layout not in costs]:
        measured = measure(missing)
        costs |= {layout: files[layout].keep(measured[layout]) for layout in missing}
    profile = KernelProfile(name, num_threads, costs)
    if places.session is not None:
        profile.save(places.session)
    return profile


@dataclass(frozen=True)
class _MachineFile:
    path: Path | None
    facts: Mapping[str, Any]
    kernels: frozenset[Kernel]

    @classmethod
    def of(
        cls, folder: Path | None, layout: Layout, dtype: str, num_threads: int, measurable: Measurable
    ) -> _MachineFile:
        facts = {"layout": layout, "dtype": dtype, "threads": num_threads, **machine_facts(), **measurable.facts}
        facts["kernels"] = sorted(measurable.kernels)
        path = None if folder is None else folder / f"kernels-{key_of(facts)}.json"
        return cls(path, facts, frozenset(measurable.kernels))

    def read(self) -> Costs | None:
        """None if nothing is kept, or nothing that can be used; then it is measured anew."""
        if self.path is None:
            return None
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))["costs"]
            costs: dict[Kernel, Cost] = {kernel: Cost.from_json(cost) for kernel, cost in raw.items()}
            usable = costs.keys() == self.kernels and all(map(_usable, costs.values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return costs if usable else None

    def keep(self, costs: Costs) -> Costs:
        """What is kept from now on: `costs`, or what another run has kept meanwhile. Without a folder that can be
        written to it is measured every time.
        """
        if self.path is None:
            return costs
        value = {"facts": self.facts, "costs": {kernel: vars(cost) for kernel, cost in costs.items()}}
        return keep_first(self.path, value, self.read) or costs


def _usable(cost: Cost) -> bool:
    numbers = (cost.fixed_s, cost.launch_s, *cost.per_element_s)
    rising = all(low < high for low, high in zip(cost.rows, cost.rows[1:], strict=False))
    return (
        bool(cost.rows) and len(cost.rows) == len(cost.per_element_s) and cost.rows[0] > 0 and rising
        and all(math.isfinite(number) and number >= 0 for number in numbers)
    )  # fmt: skip


def machine_facts() -> dict[str, Any]:
    """What every kernel's cost depends on: processor, torch, LLVM and our code."""
    flags = hashlib.sha256(" ".join(sorted(processor_flags())).encode()).hexdigest()[:16]
    return {
        "processor": processor_name(), "flags": flags, "cores": os.cpu_count(), "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(), "llvmlite": _version("llvmlite"),
        "code": code_digest(),
    }  # fmt: skip


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the cost of a kernel on a CUDA device depends on besides."""
    properties = torch.cuda.get_device_properties(device)
    driver = ""
    with suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return {
        "device": properties.name, "memory": properties.total_memory, "units": properties.multi_processor_count,
        "driver": driver, "cuda": torch.version.cuda, "triton": _version("triton"),
    }  # fmt: skip


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first processor's name, family, model and stepping, as far as the kernel says them."""
    wanted = {"model name", "cpu family", "model", "stepping"}
    with suppress(OSError):
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return ", ".join(value.strip() for name, _, value in pairs if name.strip() in wanted)
    return ""


@cache
def code_digest() -> str:
    """Of the source text that a cost depends on: a changed kernel is measured anew."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for file in sorted(_PACKAGE.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None
