"""Whether kernels can be compiled on this machine. Imports neither torch nor llvmlite."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Set

from pipo_ray.quant.panels import PANEL_BYTES, SMALL_PANEL_BYTES, machine_layout, processor_flags

LAYOUT = "avx512"
"""The int4 layout that the compiled kernels read."""

_NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}


def obstacle(flags: Set[str] | None = None) -> str | None:
    """Why nothing can be compiled here, in words for the user; None if it can. `flags` are those of the processor in
    /proc/cpuinfo.
    """
    missing = sorted(_NEEDED - (processor_flags() if flags is None else flags))
    if missing:
        return f"this processor has no {', '.join(name.upper() for name in missing)}"
    if flags is None and machine_layout() != LAYOUT:
        return f"ATEN_CPU_CAPABILITY is {os.environ.get('ATEN_CPU_CAPABILITY')}"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed"
    return None


def machine_panel_bytes() -> int:
    """How large panels of low-bit weights are made here: for our own kernels, or for torch's."""
    return SMALL_PANEL_BYTES if obstacle() is None else PANEL_BYTES
