"""Rounds bf16 weights into panels by the kernels in `rounding.py`."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipo_ray.compiled import rounding
from pipo_ray.compiled.machine import MachineCode, context_of, run_here
from pipo_ray.quant.panels import Panels


class CompiledRounding:
    """Rounds to nearest on the calling thread, without the GIL; any number of threads may call it.

    Compiled for each format and layout when it is first used; `folder` is where machine code is kept (see
    `MachineCode`). Raises ImportError where llvmlite is not installed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if importlib.util.find_spec("llvmlite") is None:
            raise ImportError("llvmlite is not installed")
        self._folder = folder
        self._codes: dict[tuple[str, str], MachineCode] = {}
        self._lock = threading.Lock()

    def round(self, weight: NDArray[np.uint8], panels: Panels, panel: NDArray[np.uint8], start: int) -> int:
        """Round rows of bf16, given as bytes, into `panel`, uint8 [panel_bytes], as its rows from `start` (a multiple
        of BLOCK_ROWS) on. The number of rows that were rounded: those that do not fill a block of the layout are not,
        and none is, though the panel may be written to, where `round_to_nearest` has to look at the values.
        """
        at_once = rounding.rows_at_once(panels.low_bit, panels.layout)
        blocks = len(weight) // (2 * panels.columns) // at_once
        if not blocks:
            return 0
        memory = panel.ctypes.data
        first = start * panels.columns * panels.low_bit.bits // 8
        words = {
            "source": weight.ctypes.data, "codes": memory + first,
            "scales": memory + panels.code_bytes + start * (4 if panels.low_bit.group else 2),
            "columns": panels.columns, "blocks": blocks, "scales_bytes": 4 * panels.panel_rows,
        }  # fmt: skip
        context = context_of([words.get(field, 0) for field in rounding.FIELDS])
        run_here(self._code(panels).address(rounding.NAME), ctypes.addressof(context))
        return 0 if context[_FLAGS] else blocks * at_once

    def _code(self, panels: Panels) -> MachineCode:
        key = panels.format, panels.layout
        with self._lock:
            code = self._codes.get(key)
            if code is None:
                code = self._codes[key] = MachineCode(rounding.module(panels.low_bit, panels.layout), self._folder)
            return code


_FLAGS = rounding.FIELDS.index("flags")
