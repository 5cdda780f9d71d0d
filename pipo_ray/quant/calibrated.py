"""Weights rounded with a calibration text, in one pass over the original model; kept on disk until they are packed.

The pass goes in the order of the layers, packing in that of the store; what lies between is a file without a name
beside the store. Layers behind see what the rounded ones before them give.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from transformers import PretrainedConfig

from pipo_ray.errors import InputError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.tokenizer import load_tokenizer
from pipo_ray.quant.calibration import BlockProgress, CalibrationModel
from pipo_ray.quant.calibration_text import CALIBRATION_KEY, CalibrationText
from pipo_ray.quant.codec import views_of, write_rows
from pipo_ray.quant.error_feedback import BLOCK_COLUMNS, CHUNK_BYTES, ErrorFeedback, InputMoments
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, Panels
from pipo_ray.quant.rounding import Rounded, round_to_nearest, values_of
from pipo_ray.quant.source import QuantizedSource, require_finite
from pipo_ray.session.worker_environment import num_threads
from pipo_ray.store.checkpoint import Checkpoint

LEAST_INPUTS = 128
"""Tokens that a matrix must have been multiplied with: fewer say less about its inputs than no weighting at all. An
expert to which fewer are routed is rounded to nearest.
"""

_MOST_THREADS = 16
_CHUNK_ELEMENTS = 1 << 21


class CalibratedSource:
    """A `BlockSource`: int4 weights as `calibrate` made them, all others as `source` reads them. A context manager."""

    def __init__(self, source: QuantizedSource, blocks: Sequence[BlockSpec], folder: Path) -> None:
        """`blocks` are those that are packed; the file without a name is made in `folder` by `calibrate`."""
        self._source, self._folder = source, folder
        self._low_bit = {
            (tensor.name, tensor.expert): (tensor, tensor.panels)
            for block in blocks
            for tensor in block.tensors
            if tensor.panels is not None and not source.has_codes(tensor)  # they are packed as they are
        }
        self._panels = [panels for _, panels in self._low_bit.values()]
        self._int4 = [panels for panels in self._panels if panels.low_bit.group]
        self._file: int | None = None
        self._offsets: dict[tuple[str, int | None], int] = {}
        self._end = 0
        self._digest = xxhash.xxh3_128()
        self._last: tuple[Sequence[torch.Tensor], list[int], InputMoments] | None = None

    @property
    def num_calibrated(self) -> int:
        """Int4 matrices that were rounded with their inputs."""
        return len(self._offsets)

    @property
    def num_nearest(self) -> int:
        """Int4 matrices that could be and were not: fewer than LEAST_INPUTS tokens reached them."""
        return len(self._int4) - len(self._offsets)

    def calibrate(
        self, model: CalibrationModel, windows: Sequence[Sequence[int]], progress: BlockProgress | None = None
    ) -> str:
        """Round all int4 weights, in one pass of `windows` through `model`; a checksum of what came out.

        Raises as `CalibrationModel.run` does; CheckpointError for a weight that is not finite; OSError for the disk.
        """
        size = sum(panels.num_panels * panels.panel_bytes for panels in self._int4)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            self._file = os.dup(file.fileno())
        if size:
            os.posix_fallocate(self._file, 0, size)
        threads = min(_MOST_THREADS, num_threads())
        with ErrorFeedback(threads) as feedback:

            def observe(spec: TensorSpec, inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor | None:
                return self._observe(feedback, spec, inputs, weight)

            model.run(windows, observe, progress, more_bytes=self._most_bytes(threads))
        self._last = None
        return self._digest.hexdigest()

    def require(self, blocks: Sequence[BlockSpec]) -> None:
        """As the source's."""
        self._source.require(blocks)

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor:
        """As the source's, of what is stored."""
        offset = self._offsets.get((spec.name, spec.expert))
        if offset is None or spec.panels is None:
            return self._source.read(spec, row_start, row_stop)
        assert self._file is not None
        width = spec.panels.panel_bytes
        result = torch.empty(row_stop - row_start, width, dtype=torch.uint8)
        view, done = result.view(-1).numpy().data, 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], offset + row_start * width + done)
            if not count:
                raise OSError(f"the file of rounded weights ended at byte {offset + row_start * width + done}")
            done += count
        return result

    def reads_apart(self, spec: TensorSpec) -> bool:
        """As the source's."""
        return (spec.name, spec.expert) in self._offsets or self._source.reads_apart(spec)

    def __enter__(self) -> CalibratedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _most_bytes(self, threads: int) -> int:
        """Beside the model: of the largest matrix the codes and the values to go on with, in bf16; H and its factors;
        a panel; and what each thread rounds.
        """
        return (
            max(panels.rows * panels.columns for panels in self._panels) * (1 + 2)
            + max(panels.columns * min(panels.columns, BLOCK_COLUMNS) for panels in self._panels) * 4 * 3
            + max(panels.panel_bytes for panels in self._panels)
            + threads * CHUNK_BYTES
        )

    def _observe(
        self, feedback: ErrorFeedback, spec: TensorSpec, inputs: Sequence[torch.Tensor], weight: torch.Tensor
    ) -> torch.Tensor | None:
        if (found := self._low_bit.get((spec.name, spec.expert))) is None:
            return None
        stored, panels = found
        low_bit = panels.low_bit
        require_finite(torch.stack(torch.aminmax(weight)), spec.name, low_bit.name)
        moments = self._moments(inputs) if low_bit.group else None
        if moments is None or moments.count < LEAST_INPUTS or not moments.finite:
            return _values(weight, low_bit, None)
        rounded = feedback.round(weight, low_bit, moments)
        self._write(stored, panels, rounded)
        return _values(weight, low_bit, rounded)

    def _moments(self, inputs: Sequence[torch.Tensor]) -> InputMoments:
        """Of `inputs`; the same as before if the matrix before was multiplied with the same (queries, keys, values)."""
        versions = [part._version for part in inputs]
        if self._last is not None:
            before, versions_before, moments = self._last
            # The tensors before are still held: nothing else can have come to their places.
            if versions == versions_before and [one.data_ptr() for one in before] == [one.data_ptr() for one in inputs]:
                return moments
        self._last = None
        moments = InputMoments(inputs[0].shape[1])
        for part in inputs:
            moments.add(part)
        self._last = inputs, versions, moments
        return moments

    def _write(self, spec: TensorSpec, panels: Panels, rounded: Rounded) -> None:
        assert self._file is not None
        self._digest.update(f"{spec.name} {spec.expert}".encode())
        step = max(1, _CHUNK_ELEMENTS // panels.columns // BLOCK_ROWS) * BLOCK_ROWS
        for number in range(panels.num_panels):
            panel = torch.zeros(panels.panel_bytes, dtype=torch.uint8)
            first, last_row = panels.rows_of(number, number + 1)
            for start in range(first, last_row, step):
                rows = slice(start, min(start + step, last_row))
                write_rows(views_of(panel, panels), panels, start - first, Rounded(*(part[rows] for part in rounded)))
            data = panel.numpy().data
            self._digest.update(data)
            _write_all(self._file, data, self._end + number * panels.panel_bytes)
        self._offsets[spec.name, spec.expert] = self._end
        self._end += panels.num_panels * panels.panel_bytes


def calibrate(
    source: CalibratedSource,
    text: CalibrationText,
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    facts: ModelFacts,
    *,
    memory: int | None,
    extra: dict[str, Any],
    progress: BlockProgress,
) -> Callable[[], str]:
    """What `pack` calls to `prepare`: calibrate `source` on `text`, and put into `extra` what came of it.

    The text is read at once. Raises InputError: too short, no tokenizer, one of another model.
    """
    if not source.num_nearest:
        raise InputError(
            f"--calibrate: {checkpoint.folder} has no weight that would be rounded to int4 now; leave --calibrate out"
        )
    windows = text.windows(load_tokenizer(checkpoint.folder), facts.context_length)
    if (largest := max(map(max, windows))) >= facts.vocab_size:
        raise InputError(
            f"the tokenizer in {checkpoint.folder} gives token {largest}, the model has {facts.vocab_size}; use the "
            "tokenizer that belongs to the model"
        )

    def prepare() -> str:
        with CalibrationModel(checkpoint, config, facts, memory=memory) as model:
            checksum = source.calibrate(model, windows, progress)
        extra[CALIBRATION_KEY] = text.to_json() | {
            "file": text.file.name,
            "tokens": sum(map(len, windows)),
            "matrices": source.num_calibrated,
            "nearest": source.num_nearest,
        }
        return checksum

    return prepare


def _values(weight: torch.Tensor, low_bit: LowBitFormat, rounded: Rounded | None) -> torch.Tensor:
    """What the low-bit weight stands for, bf16: `rounded`, or `weight` rounded to nearest; some rows at a time."""
    values = torch.empty(weight.shape, dtype=torch.bfloat16)
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        if rounded is None:
            part = round_to_nearest(weight[rows].float(), low_bit)
        else:
            part = Rounded(*(one[rows] for one in rounded))
        values[rows] = values_of(part, low_bit)
    return values


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
