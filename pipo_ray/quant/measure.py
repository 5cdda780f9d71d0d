"""Measures what rounding does to a model's output: passes of the calibration model over a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from pipo_ray.model.blocks import TensorSpec
from pipo_ray.quant.calibration import CalibrationModel, WeightChange
from pipo_ray.quant.formats import SIXTEEN_BITS, LowBitFormat
from pipo_ray.quant.rounding import round_to_nearest, values_of
from pipo_ray.quant.sensitivity import Candidates, Sensitivity
from pipo_ray.report.quality import COMPARING_BYTES, LogitsFile, Quality

Progress = Callable[[str, int, int], None]

PHASE = "sensitivity"
"""Of the progress."""

_ERROR_TOKENS = 512
"""More do not change how one format's error compares with another's."""

_CHUNK_ELEMENTS = 1 << 22
"""Of a weight, so many are rounded at once: 16 MiB in float32, and several times that on the way."""

_ROUNDING_BYTES = 8 * 4 * _CHUNK_ELEMENTS


class Measurement:
    """The original's logits of `windows`, kept in `scratch`, against which changed weights are compared. `progress`
    hears of about `passes` passes as one phase, in bytes of `pass_bytes` each. Close it.

    Raises BudgetError before anything is read if any of the passes needs more memory than the model may take;
    ResourceError for `scratch`, and what `CalibrationModel.logits` raises.
    """

    def __init__(
        self,
        model: CalibrationModel,
        windows: Sequence[Sequence[int]],
        vocab_size: int,
        scratch: Path,
        progress: Progress,
        *,
        passes: int = 1,
        pass_bytes: int = 1,
    ) -> None:
        self._model, self._windows, self._progress = model, windows, progress
        self._passes_done, self._passes, self._pass_bytes = 0, passes, pass_bytes
        # Beside the model: what a weight is rounded to, and what either kind of pass makes on its way there.
        self._more_bytes = COMPARING_BYTES + _ROUNDING_BYTES + model.largest_matrix_bytes
        model.require_memory(windows, self._more_bytes)
        self.original = Quality()
        self._kept = LogitsFile(scratch, windows, vocab_size)
        try:
            with closing(self._model.logits(windows, None, self._report, self._more_bytes)) as passed:
                for number, logits in enumerate(passed):
                    self._kept.write(number, logits.numpy())
                    self.original.add(windows[number], logits.numpy(), logits.numpy())
        except BaseException:
            self.close()
            raise
        self._passes_done = 1

    def close(self) -> None:
        """The logits go."""
        self._kept.close()

    def finish(self) -> None:
        """No more passes come."""
        total = self._passes_done * self._pass_bytes
        self._progress(PHASE, total, total)

    def compare(self, formats: Mapping[str, str], num_windows: int | None = None) -> Quality:
        """The model with the weights named in `formats` rounded, on the first `num_windows` windows, or all."""
        windows = self._windows[:num_windows]
        quality = Quality()
        with closing(self._model.logits(windows, rounded_to(formats), self._report, self._more_bytes)) as passed:
            for number, logits in enumerate(passed):
                quality.add(windows[number], logits.numpy(), self._kept.read(number))
        self._end_pass()
        return quality

    def errors(self, candidates: Candidates, num_windows: int | None = None) -> dict[str, dict[str, float]]:
        """Of every candidate in each of its formats, the relative change of its product with its inputs (squares); 0
        for a weight that no token of the text reaches.
        """
        sizes = {one.name: [name for name in one.sizes if name != SIXTEEN_BITS] for one in candidates.weights}
        powers = dict.fromkeys(sizes, 0.0)
        changes = {name: dict.fromkeys(formats, 0.0) for name, formats in sizes.items()}

        def observe(spec: TensorSpec, inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
            if (formats := sizes.get(spec.name)) is None:
                return
            rows = _some_rows(inputs)
            step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
            for start in range(0, len(weight), step):
                part = weight[start : start + step].float()
                powers[spec.name] += float((rows @ part.T).square_().sum())
                for name in formats:
                    change = _rounded(part, name) - part
                    changes[spec.name][name] += float((rows @ change.T).square_().sum())

        self._model.run(self._windows[:num_windows], observe, self._report, more_bytes=self._more_bytes)
        self._end_pass()
        return {
            name: {k: change / powers[name] if powers[name] else 0.0 for k, change in some.items()}
            for name, some in changes.items()
        }

    def _report(self, done: int, total: int) -> None:
        whole = max(self._passes, self._passes_done + 1) * self._pass_bytes
        passed = self._passes_done * self._pass_bytes + self._pass_bytes * done // total
        self._progress(PHASE, min(passed, whole - 1), whole)

    def _end_pass(self) -> None:
        self._passes_done += 1


def _some_rows(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """At most _ERROR_TOKENS rows of all of them, evenly; the rest is never copied."""
    step, before, chosen = -(-sum(map(len, inputs)) // _ERROR_TOKENS), 0, []
    for part in inputs:
        chosen.append(part[-before % step :: step])
        before += len(part)
    return torch.cat(chosen)


def passes_missing(candidates: Candidates, known: Sensitivity) -> int:
    """What `measure_sensitivity` will take."""
    return len(_unmeasured(candidates, known)) + _wants_errors(candidates, known)


def measure_sensitivity(
    measurement: Measurement, candidates: Candidates, known: Sensitivity, num_windows: int, keep: Callable[[], None]
) -> None:
    """Fill `known` with what is not in it yet, on the first `num_windows` windows: a pass for all errors, and one for
    each block. `keep` is called behind each.
    """
    if _wants_errors(candidates, known):
        known.errors = measurement.errors(candidates, num_windows)
        keep()
    for block in _unmeasured(candidates, known):
        formats = {one.name: one.coarsest for one in candidates.blocks[block]}
        known.divergences[block] = measurement.compare(formats, num_windows).kl
        keep()


def _unmeasured(candidates: Candidates, known: Sensitivity) -> list[str]:
    return [block for block in candidates.blocks if block not in known.divergences]


def _wants_errors(candidates: Candidates, known: Sensitivity) -> bool:
    return any(one.name not in known.errors for one in candidates.weights)


def rounded_to(formats: Mapping[str, str]) -> WeightChange:
    """The weights named in `formats` as they are in them, others as they were."""

    def change(spec: TensorSpec, weight: torch.Tensor) -> torch.Tensor:
        name = formats.get(spec.name, SIXTEEN_BITS)
        if name == SIXTEEN_BITS:
            return weight
        # float16 has 11 bits for what an int8 has 7 of; bfloat16 would add as much error as int8 makes.
        result = torch.empty_like(weight, dtype=torch.float16 if weight.itemsize == 2 else torch.float32)
        step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, len(weight), step):
            result[start : start + step] = _rounded(weight[start : start + step].float(), name)
        return result

    return change


def _rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    low_bit = LowBitFormat.parse(name)
    return values_of(round_to_nearest(weight, low_bit), low_bit)
