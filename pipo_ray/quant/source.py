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

import torch

from pipo_ray.errors import CheckpointError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.codec import PanelViews, views_of, write_rows
from pipo_ray.quant.panels import BLOCK_ROWS, Panels
from pipo_ray.quant.rounding import Rounded, round_to_nearest

_CHUNK_ELEMENTS = 1 << 18
"""What a thread quantizes at once, if 64 rows are not more: 1 MiB in float32, and several times that on the way."""

_MOST_THREADS = 16
"""Each takes memory."""

_WAITING = 4
"""Threads beyond one for each core: they wait for the drive, which wants several reads at a time."""


class TensorReader(Protocol):
    """What gives the unquantized tensors, to several threads at a time: see TensorSource."""

    def require(self, blocks: Sequence[BlockSpec]) -> None: ...

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor: ...


class CodeReader(Protocol):
    """What gives codes that a checkpoint has already: see ForeignCodes."""

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> Callable[[], Rounded] | None: ...


class QuantizedSource:
    """A `BlockSource` that answers tensors with `panels` by quantizing those of `source`, and others with them. What
    `codes` has in the format asked for is not quantized, but taken. A context manager; leaving it ends its threads.
    """

    def __init__(self, source: TensorReader, num_threads: int | None = None, codes: CodeReader | None = None) -> None:
        self._source = source
        self._codes = codes
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
        result = torch.zeros(row_stop - row_start, panels.panel_bytes, dtype=torch.uint8)
        pending: deque[Future[None]] = deque()
        step = max(1, _CHUNK_ELEMENTS // panels.columns // BLOCK_ROWS) * BLOCK_ROWS
        try:
            for panel in range(row_start, row_stop):
                views = views_of(result[panel - row_start], panels)
                first, last = panels.rows_of(panel, panel + 1)
                for start in range(first, last, step):
                    while len(pending) > self._num_threads:
                        pending.popleft().result()
                    stop = min(start + step, last)
                    job = None if self._codes is None else self._codes.read(spec, start, stop)
                    if job is None:
                        job = partial(self._rounded, plain, start, stop, panels)
                    pending.append(self._threads.submit(_write, job, views, panels, start - first))
            while pending:
                pending.popleft().result()
        finally:
            for future in pending:
                if not future.cancel():
                    future.exception()  # nobody may still be writing when the caller cleans up
        return result

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


def _write(job: Callable[[], Rounded], views: PanelViews, panels: Panels, start: int) -> None:
    with torch.inference_mode():
        write_rows(views, panels, start, job())


def require_finite(values: torch.Tensor, name: str, format: str) -> None:
    """Raise CheckpointError for a tensor that has an infinite value, by its extremes or scales."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"tensor {name!r} holds an infinite value and cannot be {format}; use --precision 16bit")
