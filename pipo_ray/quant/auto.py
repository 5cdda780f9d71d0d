"""`--precision auto`: measure, choose, and see on the text that it holds. Needs torch; runs in the packing process.

A loss of perplexity and a KL divergence are the same number where the model knows its text: perplexity is e to the mean
loss per token, and if the text is as the model expects it, rounding adds the KL divergence from the original to that
loss. So x % more perplexity allow ln(1 + x / 100) nats of divergence. What is chosen with that is then measured as a
whole, and chosen again with less as long as its divergence, or its perplexity itself, is above the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from pipo_ray.compiled.support import machine_panel_bytes
from pipo_ray.errors import InputError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.graph import load_config
from pipo_ray.model.inspect import find_facts
from pipo_ray.model.layout import block_layout
from pipo_ray.model.linear_experts import experts_are_linear
from pipo_ray.model.tokenizer import load_tokenizer
from pipo_ray.quant.calibration import CalibrationModel
from pipo_ray.quant.calibration_text import CalibrationText
from pipo_ray.quant.knapsack import Choice, choose
from pipo_ray.quant.measure import Measurement, Progress, measure_sensitivity, passes_missing
from pipo_ray.quant.panels import machine_layout
from pipo_ray.quant.policy import PolicyModel
from pipo_ray.quant.sensitivity import Candidates, Measured, Sensitivity, find_candidates, measurement_key
from pipo_ray.quant.target import Chosen, Target
from pipo_ray.report.quality import Quality
from pipo_ray.session.memory import format_least, format_size
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.source import TensorSource

WINDOW_TOKENS = 512
"""Few for a model's whole context, enough for its blocks: attention takes memory with the square."""

MEASURED_TOKENS = 1024
"""For the order of blocks, and how one compares with another: twice as many change no choice."""

VERIFIED_TOKENS = 4096
"""For what is chosen: perplexity varies more from token to token than divergence does."""

_MOST_TRIES = 6
_TIGHTENING = 0.97


@dataclass(frozen=True)
class Subject:
    """An opened checkpoint and what can be chosen for it."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    facts: ModelFacts
    candidates: Candidates

    @classmethod
    @contextmanager
    def open(cls, source: str | Path) -> Iterator[Subject]:
        """The checkpoint folder `source`. Raises what reading it raises."""
        with Checkpoint.open(source) as checkpoint:
            config = load_config(checkpoint.folder)
            model, trace, facts = find_facts(config, torch.bfloat16, checkpoint.folder)
            aliases = TensorSource(model, checkpoint, torch.bfloat16).aliases
            tables = {aliases.get(name, name) for unit in trace.units if unit.kind == "lookup" for name in unit.tensors}
            blocks = block_layout(model, trace, aliases)
            has_experts = any(tensor.expert is not None for block in blocks for tensor in block.tensors)
            linear = has_experts and experts_are_linear(config)
            candidates = find_candidates(
                blocks, tables, machine_layout(), linear_experts=linear, panel_bytes=machine_panel_bytes()
            )
            yield cls(checkpoint, config, facts, candidates)

    def windows(self, text: CalibrationText, length: int, most_tokens: int) -> list[list[int]]:
        """Of `text` in the model's tokens. Raises InputError for one that is too short."""
        tokenizer = load_tokenizer(self.checkpoint.folder)
        return text.windows(tokenizer, min(self.facts.context_length, length), most_tokens)


def choose_policy(
    source: str | Path,
    target: Target,
    *,
    cache: Path,
    text: CalibrationText,
    progress: Progress,
    memory: int | None = None,
) -> Chosen:
    """The policy for the checkpoint folder `source` that reaches `target`, measured on `text`.

    What is measured is kept in `cache`, block by block: it goes on where it stopped, and another target needs none of
    it again. The process takes at most `memory` bytes.

    Raises, before anything is measured, InputError: a target that is impossible, a text that is too short, a model of
    which nothing can be quantized; BudgetError for too little memory; and what reading the checkpoint raises.
    """
    progress("inspect", 0, 0)
    with Subject.open(source) as subject:
        _require_possible(subject.candidates, target)
        windows = _windows(subject, text)
        with _sensitivity_of(subject, windows, text, cache, progress, memory, more_passes=1) as (measured, measurement):
            choice, quality = _reach(measurement, measured, target)
            measurement.finish()
    increase = quality.perplexity / measurement.original.perplexity - 1
    policy = measured.policy(choice.formats)
    least = None if policy.is_low_bit or target.max_loss is None else measured.least_rounding()
    return Chosen(policy, choice.nbytes + measured.fixed_bytes, quality.kl, increase, quality.count, least)


def measure_model(
    source: str | Path, *, cache: Path, text: CalibrationText, progress: Progress, memory: int | None = None
) -> Measured:
    """What a choice for the checkpoint folder `source` rests on. Arguments and errors as of `choose_policy`."""
    progress("inspect", 0, 0)
    with Subject.open(source) as subject:
        windows = _windows(subject, text)
        windows = windows[: windows_with(windows, MEASURED_TOKENS)]
        with _sensitivity_of(subject, windows, text, cache, progress, memory, more_passes=0) as (measured, measurement):
            measurement.finish()
            return measured


@contextmanager
def _sensitivity_of(
    subject: Subject,
    windows: Sequence[Sequence[int]],
    text: CalibrationText,
    cache: Path,
    progress: Progress,
    memory: int | None,
    *,
    more_passes: int,
) -> Iterator[tuple[Measured, Measurement]]:
    """What is measured, or was, on the first of `windows`; and all of them ready for `more_passes`."""
    checkpoint, candidates = subject.checkpoint, subject.candidates
    num_measured = windows_with(windows, MEASURED_TOKENS)
    file = cache / f"{measurement_key(checkpoint, text)}.json"
    known = Sensitivity.load(file, sum(map(len, windows[:num_measured])))
    passes = 1 + passes_missing(candidates, known) + more_passes
    pass_bytes = sum(header.nbytes for header in checkpoint.tensors.values())
    with (
        CalibrationModel(checkpoint, subject.config, subject.facts, memory=memory) as model,
        closing(
            Measurement(model, windows, subject.facts.vocab_size, cache, progress, passes=passes, pass_bytes=pass_bytes)
        ) as measurement,
    ):
        measure_sensitivity(measurement, candidates, known, num_measured, lambda: _keep(known, file))
        items = tuple(known.items(candidates))
        yield Measured(items, candidates.others, candidates.fixed_bytes, PolicyModel.of(checkpoint)), measurement


def _windows(subject: Subject, text: CalibrationText) -> list[list[int]]:
    if not subject.candidates.weights:
        raise InputError("--precision auto: no tensor of this model can be quantized; use --precision 16bit")
    return subject.windows(text, WINDOW_TOKENS, VERIFIED_TOKENS)


def _require_possible(candidates: Candidates, target: Target) -> None:
    least = candidates.fixed_bytes + sum(min(one.sizes.values()) for one in candidates.weights)
    if target.max_bytes is not None and target.max_bytes < least:
        most = candidates.fixed_bytes + sum(max(one.sizes.values()) for one in candidates.weights)
        raise InputError(
            f"--max-size {format_size(target.max_bytes)} is too little for this model: with the fewest bits it takes "
            f"{format_least(least)}, at 16 bits {format_size(most)}; give at least {format_least(least)}"
        )


def windows_with(windows: Sequence[Sequence[int]], tokens: int) -> int:
    """How many of the first windows have so many tokens together; all, if they do not."""
    total = 0
    for number, window in enumerate(windows, start=1):
        total += len(window)
        if total >= tokens:
            return number
    return len(windows)


def _keep(known: Sensitivity, file: Path) -> None:
    with suppress(OSError):  # without a cache it is measured anew every time
        known.save(file)


def _reach(measurement: Measurement, measured: Measured, target: Target) -> tuple[Choice, Quality]:
    """The choice for `target`, and its quality."""
    if target.max_bytes is not None:
        choice = choose(measured.items, max_bytes=target.max_bytes - measured.fixed_bytes)
        return choice, measurement.compare(choice.formats)
    assert target.max_loss is not None
    allowed = limit = math.log1p(target.max_loss)
    for left in reversed(range(_MOST_TRIES)):
        choice = choose(measured.items, max_loss=allowed)
        quality = measurement.compare(choice.formats)
        lost = max(quality.kl, math.log(quality.perplexity / measurement.original.perplexity))
        if lost <= limit:
            break
        # In proportion, from what was predicted of it; at last nothing is rounded, which holds whatever the text.
        allowed = _TIGHTENING * min(allowed, choice.loss) * limit / lost if left > 1 else 0.0
    return choice, quality
