"""A quantized checkpoint, seen as if its weights were float32 under their plain names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipo_ray.errors import CheckpointError, UnsupportedModelError
from pipo_ray.quant.foreign import awq, compressed_tensors, fp8, gptq, mxfp4
from pipo_ray.quant.foreign.detect import SourceFormat, plain_config, source_format
from pipo_ray.quant.foreign.reading import TensorFiles
from pipo_ray.quant.foreign.weight import ForeignWeight, Survey
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.safetensors_file import TensorHeader

_Finder = Callable[[TensorFiles, SourceFormat], dict[str, ForeignWeight]]
_FORMATS: dict[str, tuple[_Finder, tuple[str, ...]]] = {
    "gptq": (gptq.find_weights, gptq.PARTS),
    "awq": (awq.find_weights, awq.PARTS),
    "compressed-tensors": (compressed_tensors.find_weights, compressed_tensors.PARTS),
    "fp8": (fp8.find_weights, fp8.PARTS),
    "mxfp4": (mxfp4.find_weights, mxfp4.PARTS),
}


def open_foreign(checkpoint: Checkpoint) -> ForeignCheckpoint | None:
    """`checkpoint` as a ForeignCheckpoint if it is quantized, else None. Raises as `ForeignCheckpoint.view` does."""
    source = source_format(checkpoint.config, checkpoint.folder)
    return None if source is None else ForeignCheckpoint.view(checkpoint, source)


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """A Checkpoint whose quantized tensors are replaced by plain ones, float32, dequantized when they are read.

    `weights` are the quantized ones by plain name; other tensors are as they are in the files. `survey` is what the
    scales of all of them are like. `whole` is the checkpoint as it is.
    """

    source: SourceFormat = field(kw_only=True)
    weights: Mapping[str, ForeignWeight] = field(kw_only=True)
    survey: Survey = field(kw_only=True)
    whole: Checkpoint = field(kw_only=True)

    @classmethod
    def view(cls, checkpoint: Checkpoint, source: SourceFormat) -> ForeignCheckpoint:
        """See `checkpoint`, which stays open and is read through, in this way. All its scales are read and checked.

        Raises CheckpointError: parts of a weight that are missing or do not fit together, scales that are zero or not
        finite, no quantized weight at all.
        """
        if source.method not in _FORMATS:
            raise UnsupportedModelError(f"{checkpoint.folder}: {source.label} in safetensors cannot be read")
        find, parts = _FORMATS[source.method]
        weights = find(TensorFiles(checkpoint), source)
        if not weights:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder}: config.json says {source.label}, and no tensor is; use the "
                "config.json that belongs to these weights"
            )
        tensors = {
            name: header
            for name, header in checkpoint.tensors.items()
            if name not in weights and not name.endswith(parts)
        }
        files = {name: checkpoint.files[name] for name in tensors}
        for name, weight in weights.items():
            tensors[name] = TensorHeader(name, "F32", weight.shape, 0, 4 * math.prod(weight.shape))
            files[name] = weight.file
        survey = sum((weight.survey() for weight in weights.values()), Survey(0, 0))
        return cls(
            checkpoint.folder, plain_config(checkpoint.config), checkpoint.shards, tensors, files,
            checkpoint._descriptors, checkpoint._buffered, checkpoint._buffers, checkpoint._lock,
            source=source, weights=weights, survey=survey, whole=checkpoint,
        )  # fmt: skip

    @property
    def origin(self) -> Path:
        """As of the checkpoint as it is."""
        return self.whole.origin

    def fingerprint(self) -> str:
        """As of the checkpoint as it is."""
        return self.whole.fingerprint()

    def is_plain(self, name: str) -> bool:
        """As a Checkpoint's."""
        return name not in self.weights and super().is_plain(name)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """As a Checkpoint's; for a quantized weight bytes of float32 values."""
        weight = self.weights.get(name)
        if weight is None:
            return super().read(name, start, stop)
        columns = weight.shape[-1]
        first, last = start // 4 // columns, -(-stop // 4 // columns)
        values = (
            weight.rows(first, last).values().reshape(-1)[start // 4 - first * columns : stop // 4 - first * columns]
        )
        result: NDArray[np.uint8] = values.contiguous().view(torch.uint8).numpy()
        return result
