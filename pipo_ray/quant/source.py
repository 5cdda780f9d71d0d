"""Quantizes what the packer reads: panels out of a checkpoint, by all cores, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipo_ray.compiled.quantizer import CompiledRounding
from pipo_ray.errors import CheckpointError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.ahead import PanelsAhead
from pipo_ray.quant.codec import views_of, write_rows
from pipo_ray.quant.panels import BLOCK_ROWS, Panels
from pipo_ray.quant.rounding import Rounded, round_to_nearest
from pipo_ray.store.read_buffers import ReadBuffers

_CHUNK_ELEMENTS = 1 << 18
"""What a thread quantizes at once, if 64 rows are not more: 1 MiB in float32, and several times that on the way."""

_COMPILED_ELEMENTS = 1 << 21
"""The same where the compiled kernel does it: 4 MiB of bf16, which the drive likes better, and nothing on the way."""

_PANELS_KEPT_BYTES = 64 << 20
"""Of panels that are not in use: as many as are read ahead."""

_MOST_THREADS = 16
"""Each takes memory."""

_WAITING = 4
"""Threads beyond one for each core: they wait for the drive, which wants several reads at a time."""


class TensorReader(Protocol):
    """What gives the unquantized tensors, to several threads at a time: see TensorSource."""

    def require(self, blocks: Sequence[BlockSpec]) -> None: ...

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor: ...

    def read_bf16(self, spec: TensorSpec, row_start: int, row_stop: int) -> NDArray[np.uint8] | None: ...

    def bf16_key(self, spec: TensorSpec) -> str | None: ...

    def reads_apart(self, spec: TensorSpec) -> bool: ...


class CodeReader(Protocol):
    """What gives codes that a checkpoint has already: see ForeignCodes."""

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> Callable[[], Rounded] | None: ...


class QuantizedSource:
    """A `BlockSource` that answers tensors with `panels` by quantizing those of `source`, and others with them. What
    `codes` has in the format asked for is not quantized, but taken. A context manager; leaving it ends its threads.
    """

    def __init__(
        self,
        source: TensorReader,
        num_threads: int | None = None,
        codes: CodeReader | None = None,
        rounding: CompiledRounding | None = None,
        ahead: PanelsAhead | None = None,
    ) -> None:
        """`rounding` does for bf16 what torch does without it, and with other dtypes. `ahead` has panels already."""
        self._ahead = ahead
        self._source = source
        self._codes = codes
        self._rounding = rounding
        self._panels = ReadBuffers(_PANELS_KEPT_BYTES)
        self._num_threads = num_threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)) + _WAITING)
        # Each computes alone: threads of torch's own in each of them would only take turns.
        self._threads = ThreadPoolExecutor(
            self._num_threads, "quantize", initializer=torch.set_num_threads, initargs=(1,)
        )

    def require(self, blocks: Sequence[BlockSpec]) -> None:
        """As the source's."""
        self._source.require(blocks)

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor:
        """Rows of what is stored: for a quantized tensor panels, uint8 [row_stop - row_start, panel_bytes].

        Raises as the source does, and CheckpointError for a weight that is not finite.
        """
        if spec.panels is None:
            return self._source.read(spec, row_start, row_stop)
        panels = spec.panels
        plain = replace(spec, shape=(panels.rows, panels.columns), dtype="F32", panels=None)
        if row_stop - row_start == 1 and (ready := self._made_ahead(spec, row_start)) is not None:
            return torch.from_numpy(ready)[None]
        memory = self._panels.take((row_stop - row_start) * panels.panel_bytes).reshape(-1, panels.panel_bytes)
        if row_stop * panels.panel_rows > panels.rows:
            memory[-1] = 0  # where it has no row
        elements = _CHUNK_ELEMENTS if self._rounding is None else _COMPILED_ELEMENTS
        step = max(1, elements // panels.columns // BLOCK_ROWS) * BLOCK_ROWS
        pending: deque[Future[None]] = deque()
        try:
            for panel, out in zip(range(row_start, row_stop), memory, strict=True):
                if (ready := self._made_ahead(spec, panel)) is not None:
                    np.copyto(out, ready)  # without the GIL
                    continue
                first, last = panels.rows_of(panel, panel + 1)
                for start in range(first, last, step):
                    while len(pending) > self._num_threads:
                        pending.popleft().result()
                    stop = min(start + step, last)
                    codes = None if self._codes is None else self._codes.read(spec, start, stop)
                    job = partial(self._write, plain, panels, out, first, start, stop, codes)
                    pending.append(self._threads.submit(job))
            while pending:
                pending.popleft().result()
        finally:
            for future in pending:
                if not future.cancel():
                    future.exception()  # nobody may still be writing when the caller cleans up
        return torch.from_numpy(memory)

    def _made_ahead(self, spec: TensorSpec, panel: int) -> NDArray[np.uint8] | None:
        assert spec.panels is not None
        key = None if self._ahead is None or self._codes is not None else self._source.bf16_key(spec)
        return None if key is None or self._ahead is None else self._ahead.take(key, spec.panels, panel)

    def reads_apart(self, spec: TensorSpec) -> bool:
        """As the source's."""
        return self._source.reads_apart(spec)

    def _write(
        self,
        spec: TensorSpec,
        panels: Panels,
        panel: NDArray[np.uint8],
        first: int,
        start: int,
        stop: int,
        codes: Callable[[], Rounded] | None,
    ) -> None:
        """Rows `start` to `stop` of the weight into `panel`, which begins with row `first`."""
        if codes is None and self._rounding is not None:
            weight = self._source.read_bf16(spec, start, stop)
            if weight is not None:
                start += self._rounding.round(weight, panels, panel, start - first)
        views = views_of(torch.from_numpy(panel), panels)
        # In smaller steps: what the kernel leaves is little, but for values that are refused here.
        step = max(1, _CHUNK_ELEMENTS // panels.columns // BLOCK_ROWS) * BLOCK_ROWS
        with torch.inference_mode():
            for row in range(start, stop, step if codes is None else stop - start):
                rounded = self._rounded(spec, row, min(row + step, stop), panels) if codes is None else codes()
                write_rows(views, panels, row - first, rounded)

    def _rounded(self, spec: TensorSpec, start: int, stop: int, panels: Panels) -> Rounded:
        rounded = round_to_nearest(self._source.read(spec, start, stop), panels.low_bit)
        require_finite(rounded.scales, spec.name, panels.format)
        return rounded

    def has_codes(self, spec: TensorSpec) -> bool:
        """Whether the checkpoint has the weight in this format already."""
        return self._codes is not None and self._codes.read(spec, 0, 1) is not None

    def __enter__(self) -> QuantizedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)


def require_finite(values: torch.Tensor, name: str, format: str) -> None:
    """Raise CheckpointError for a tensor that has an infinite value, by its extremes or scales."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"tensor {name!r} holds an infinite value and cannot be {format}; use --precision 16bit")
