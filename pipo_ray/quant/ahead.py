"""Matrices that are rounded before the model is known. Imports no torch.

Importing torch and transformers takes longer than a fast drive needs for some billion bytes. In that time the matrices
of the first layers are read and rounded into memory, as far as they can be told by names and shapes. That is a guess:
what the model then wants in another form, or not at all, is dropped and made anew from the checkpoint. While packing
writes what is ready, it goes on, so that the drive still reads; until packing has caught up, and reads by itself.
"""

from __future__ import annotations

import mmap
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from pipo_ray.compiled.quantizer import CompiledRounding
from pipo_ray.errors import CheckpointError
from pipo_ray.quant.formats import AS_SOURCE, LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, PANEL_BYTES, Panels, divide
from pipo_ray.quant.policy import Precision
from pipo_ray.session.memory import available_memory
from pipo_ray.store.checkpoint import Checkpoint

_MOST_BYTES = 1 << 30
_MEMORY_SHARE = 8
"""No more than this part of the memory that is left."""

_CHUNK_BYTES = 8 << 20
"""Of a matrix in bf16, read at once: what most panels are made of."""
_THREADS = 2
"""One reads while another one rounds. Each asks for Python's lock, that the imports want, once a chunk or twice."""
_SWITCH_S = 0.0005
"""An import holds Python's lock for 5 ms at a time otherwise, and our threads ask for it after every read."""

_Panel = tuple[str, int]


def read_ahead_bytes() -> int:
    """What may be kept in memory ahead of packing."""
    return min(_MOST_BYTES, available_memory() // _MEMORY_SHARE)


def guessed_panels(
    checkpoint: Checkpoint, policy: Precision, layout: str, panel_bytes: int = PANEL_BYTES
) -> dict[str, Panels]:
    """The checkpoint's tensors that `policy` will most likely turn into panels, layer by layer: bf16 matrices in a
    numbered part of the model, other than experts, which models fuse.
    """
    result: dict[str, Panels] = {}
    for name in sorted(checkpoint.tensors, key=_in_numbers):
        header, rule = checkpoint.tensors[name], policy.rule_for(name)
        if rule is None or rule.format == AS_SOURCE or header.dtype != "BF16" or not checkpoint.is_plain(name):
            continue
        low_bit = LowBitFormat.parse(rule.format)
        parts = name.split(".")
        if len(header.shape) != 2 or "experts" in parts or not any(part.isdigit() for part in parts):
            continue
        rows, columns = header.shape
        if rows and columns and not columns % low_bit.columns_multiple:
            result[name] = divide(rows, columns, low_bit, layout, panel_bytes)
    return result


class PanelsAhead:
    """Reads and rounds `guesses` in their order, as long as no more than `most_bytes` of panels are there, until
    somebody wants one that is not begun. A context manager; leaving it ends its threads and gives the memory back.
    """

    def __init__(
        self, checkpoint: Checkpoint, guesses: Mapping[str, Panels], rounding: CompiledRounding, most_bytes: int
    ) -> None:
        self._checkpoint, self._guesses, self._rounding = checkpoint, dict(guesses), rounding
        self._left = most_bytes
        self._all = dict(guesses)
        self._todo = OrderedDict.fromkeys(
            (name, number) for name, panels in guesses.items() for number in range(panels.num_panels)
        )
        # A panel that is being made is there without its memory; one that could not be made is not there.
        self._panels: dict[_Panel, NDArray[np.uint8] | None] = {}
        self._changed = threading.Condition()
        self._interval = sys.getswitchinterval()
        self._threads = [
            threading.Thread(target=self._work, name=f"pack-ahead-{number}", daemon=True) for number in range(_THREADS)
        ]

    def __enter__(self) -> PanelsAhead:
        sys.setswitchinterval(_SWITCH_S)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle({})
        for thread in self._threads:
            thread.join()
        self._panels.clear()

    def settle(self, wanted: Mapping[str, Panels]) -> None:
        """The model is known: only panels of the tensors `wanted` are kept, and made from now on."""
        sys.setswitchinterval(self._interval)
        with self._changed:
            right = {name for name, panels in self._guesses.items() if wanted.get(name) == panels}
            self._guesses = {name: self._guesses[name] for name in right}
            self._todo = OrderedDict.fromkeys(panel for panel in self._todo if panel[0] in right)
            wrong = [memory for (name, _), memory in self._panels.items() if name not in right]
            self._left += sum(memory.nbytes for memory in wrong if memory is not None)
            self._panels = {panel: memory for panel, memory in self._panels.items() if panel[0] in right}
            self._changed.notify_all()

    def take(self, name: str, panels: Panels, number: int) -> NDArray[np.uint8] | None:
        """A panel, uint8 [panel_bytes], which is forgotten here; None if it is not there. Waits for one that is being
        made.
        """
        with self._changed:
            if self._guesses.get(name) != panels:
                return None
            if (name, number) in self._todo:
                self._todo.clear()  # packing has caught up, and has more threads
            self._changed.wait_for(lambda: self._panels.get((name, number), 0) is not None)
            memory = self._panels.pop((name, number), None)
            self._left += 0 if memory is None else memory.nbytes
            self._changed.notify_all()
            return memory

    def _work(self) -> None:
        while (panel := self._next()) is not None:
            memory = None
            try:
                memory = self._made(*panel)
            except CheckpointError:
                pass  # it is found again, and said, when the panel is packed
            finally:
                with self._changed:
                    kept = panel in self._panels
                    if kept and memory is not None:
                        self._panels[panel] = memory
                    else:
                        self._left += self._all[panel[0]].panel_bytes
                        self._panels.pop(panel, None)
                    self._changed.notify_all()

    def _next(self) -> _Panel | None:
        with self._changed:
            self._changed.wait_for(lambda: not self._todo or self._has_room())
            if not self._todo:
                return None
            panel, _ = self._todo.popitem(last=False)
            self._left -= self._all[panel[0]].panel_bytes
            self._panels[panel] = None
            return panel

    def _has_room(self) -> bool:
        """For the next panel."""
        name, _ = next(iter(self._todo))
        return self._all[name].panel_bytes <= self._left

    def _made(self, name: str, number: int) -> NDArray[np.uint8] | None:
        panels = self._all[name]
        memory = _fresh(panels.panel_bytes)  # zeros, where it has no row
        first, last = panels.rows_of(number, number + 1)
        row = 2 * panels.columns
        step = max(1, _CHUNK_BYTES // row // BLOCK_ROWS) * BLOCK_ROWS
        for start in range(first, last, step):
            stop = min(start + step, last)
            weight = self._checkpoint.read(name, start * row, stop * row)
            if self._rounding.round(weight, panels, memory, start - first) < stop - start:
                return None
        return memory


def _fresh(nbytes: int) -> NDArray[np.uint8]:
    """Zeros, on a page's boundary. In pages of 4 KiB: no drive reads into it, it is written and read once, and huge
    pages have to be cleared before the first byte, which takes four times as long where a host gives memory at the
    first touch.
    """
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _in_numbers(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
