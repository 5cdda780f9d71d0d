"""From tensors of the module graph to the codes that a quantized checkpoint has for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.foreign.checkpoint import ForeignCheckpoint
from pipo_ray.quant.foreign.weight import ForeignWeight
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.rounding import Rounded
from pipo_ray.store.source import RowSources, TensorSource


class ForeignCodes:
    """The codes of a quantized checkpoint, by the names of the module graph that `tensors` resolves.

    A graph tensor may be put together from the rows of several checkpoint tensors (fused experts, fused projections):
    the rows of their codes go the same way.
    """

    def __init__(self, tensors: TensorSource, checkpoint: ForeignCheckpoint) -> None:
        self._tensors, self._checkpoint, self._weights = tensors, checkpoint, checkpoint.weights
        self._sources = cache(self._find_sources)

    def is_foreign(self, spec: TensorSpec) -> bool:
        """Whether any of it was quantized in the checkpoint."""
        return any(self._is_quantized(key) for key in self._tensors.checkpoint_keys(spec.name))

    def _is_quantized(self, key: str) -> bool:
        return key in self._weights and self._weights[key].is_quantized

    def low_bit(self, spec: TensorSpec) -> LowBitFormat | None:
        """The coarsest format of ours that holds all its codes; None if there is none, or no codes."""
        found = self._sources(spec.name, spec.expert)
        if found is None:
            return None
        formats = [weight.low_bit for weight in self._parts(found)]
        own = [one for one in formats if one is not None]
        if len(own) < len(formats) or len({one.bits for one in own}) > 1:
            return None
        # Groups are powers of 2: the smallest divides the others.
        return LowBitFormat(own[0].bits, min(one.group for one in own), all(one.symmetric for one in own))

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> Callable[[], Rounded] | None:
        """The function that reads and decodes rows of the weight, not of its panels, for the thread that wants them.
        None if the format asked for in `spec.panels` does not hold the codes.
        """
        found = self._sources(spec.name, spec.expert)
        if found is None or not self._keeps(spec):
            return None
        assert spec.panels is not None
        return partial(self._read, found.runs(row_start, row_stop), spec.panels.low_bit)

    def _read(self, runs: Sequence[tuple[str, int, int]], low_bit: LowBitFormat) -> Rounded:
        rounded = [self._weights[key].rows(start, stop).rounded(low_bit) for key, start, stop in runs]
        if len(rounded) == 1:
            return rounded[0]
        return Rounded(*(torch.cat(tensors) for tensors in zip(*rounded, strict=True)))

    def describe(self, blocks: Sequence[BlockSpec]) -> dict[str, Any]:
        """What becomes of the checkpoint's quantized weights in `blocks`, as `describe_source` takes it."""
        counts: Counter[str] = Counter()
        for tensor in (tensor for block in blocks for tensor in block.tensors):
            if self.is_foreign(tensor):
                kind = (
                    "dequantized" if tensor.panels is None else "repacked" if self._keeps(tensor) else "rounded_again"
                )
                counts[kind] += 1
        survey = self._checkpoint.survey
        return {
            "label": self._checkpoint.source.label,
            **{kind: counts[kind] for kind in ("repacked", "dequantized", "rounded_again")},
            "groups": survey.groups,
            "exact_groups": survey.exact,
        }

    def _keeps(self, spec: TensorSpec) -> bool:
        found = self._sources(spec.name, spec.expert)
        assert spec.panels is not None
        low_bit = spec.panels.low_bit
        return found is not None and all(weight.fits(low_bit) for weight in self._parts(found))

    def _parts(self, found: RowSources) -> list[ForeignWeight]:
        return [self._weights[found.keys[which]] for which in found.places[0].unique().tolist()]

    def _find_sources(self, name: str, expert: int | None) -> RowSources | None:
        if not any(self._is_quantized(key) for key in self._tensors.checkpoint_keys(name)):
            return None
        found = self._tensors.row_sources(name, expert)
        if found is None or any(key not in self._weights for key in found.keys):
            return None
        return found
