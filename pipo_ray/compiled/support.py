"""Whether kernels can be compiled on this machine. Imports neither torch nor llvmlite."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from collections.abc import Set
from typing import Literal

from pipo_ray.quant.panels import INT4_LAYOUTS, PANEL_BYTES, SMALL_PANEL_BYTES, machine_layout, processor_flags

LAYOUT = "avx512"
"""The int4 layout that the compiled kernels read."""

InstructionSet = Literal["avx512", "avx2"]
"""Of those that kernels over rows in bf16 are compiled for; the first one with instructions for bf16."""

_NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}

_FLOATS_NEEDED = {"avx2", "fma", "f16c"}

_AMX_NEEDED = {"amx_tile", "amx_bf16"}
# arch/x86/include/uapi/asm/prctl.h and Documentation/arch/x86/xstate.rst: a process asks for the tiles' registers.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILE_DATA = 158, 0x1023, 18


def obstacle(flags: Set[str] | None = None) -> str | None:
    """Why kernels for AVX512 with bf16 cannot be compiled here, in words for the user; None if they can. `flags` are
    those of the processor in /proc/cpuinfo.
    """
    if (missing := _missing(_NEEDED, flags)) is not None:
        return missing
    if flags is None and machine_layout() != LAYOUT:
        return f"ATEN_CPU_CAPABILITY is {os.environ.get('ATEN_CPU_CAPABILITY')}"
    return compiler_obstacle()


def floats_obstacle(flags: Set[str] | None = None) -> str | None:
    """Why weights of 16 bits and less cannot be multiplied by kernels for AVX2 that are compiled here, in words for
    the user; None if they can. `flags` are those of the processor in /proc/cpuinfo.
    """
    if (missing := _missing(_FLOATS_NEEDED, flags)) is not None:
        return missing
    if flags is None and machine_layout() == "plain":
        return f"ATEN_CPU_CAPABILITY is {os.environ.get('ATEN_CPU_CAPABILITY')}"
    return compiler_obstacle()


def instruction_set() -> InstructionSet | None:
    """The best of this processor; None if nothing can be compiled for either."""
    if obstacle() is None:
        return "avx512"
    return "avx2" if floats_obstacle() is None else None


def row_instructions() -> InstructionSet:
    """The same where something can be. Raises RuntimeError where nothing can."""
    found = instruction_set()
    if found is None:
        raise RuntimeError(f"nothing can be compiled: {floats_obstacle()}")
    return found


def amx_obstacle(flags: Set[str] | None = None) -> str | None:
    """Why the matrix unit cannot be used here, in words for the user; None if it can, now that Linux was asked for it.
    `flags` are those of the processor in /proc/cpuinfo.
    """
    if (missing := _missing(_AMX_NEEDED, flags)) is not None:
        return missing
    reason = obstacle()
    if reason is None and platform.machine() == "x86_64":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILE_DATA):
            return f"Linux does not let this process use AMX (arch_prctl: error {ctypes.get_errno()})"
    return reason


def low_bit_support() -> tuple[tuple[str, ...], str | None]:
    """The layouts of int4 that are multiplied on this machine as they are, torch's first; and why none of our own
    kernels does, in words for the user, None if one does.
    """
    machine, reason = machine_layout(), obstacle()
    if reason is None:
        return (machine,), None
    if (in_floats := floats_obstacle()) is not None:
        return (machine,), reason if _missing(_FLOATS_NEEDED) else in_floats
    ours = (name for name, order in INT4_LAYOUTS.items() if order.stride == 1 and name != machine)
    return (machine, *ours), None


def machine_panel_bytes() -> int:
    """How large panels of low-bit weights are made here: for our own kernels, or for torch's."""
    return SMALL_PANEL_BYTES if obstacle() is None or floats_obstacle() is None else PANEL_BYTES


def _missing(needed: Set[str], flags: Set[str] | None = None) -> str | None:
    missing = sorted(needed - (processor_flags() if flags is None else flags))
    return f"this processor has no {', '.join(name.upper() for name in missing)}" if missing else None


def compiler_obstacle() -> str | None:
    """Why nothing at all can be compiled here, in words for the user; None if something can."""
    return "llvmlite is not installed" if importlib.util.find_spec("llvmlite") is None else None
