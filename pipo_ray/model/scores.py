"""What a request changes about its logits before a token is chosen: bias, minimum length, penalties, temperature."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipo_ray.model.host_values import to_device

if TYPE_CHECKING:
    from pipo_ray.model.sampling import SequenceSampling

_LARGEST = float(np.finfo(np.float32).max)


def changes_scores(sequence: SequenceSampling) -> bool:
    """Whether `process_logits` changes anything."""
    params = sequence.params
    return bool(
        (not params.greedy and params.temperature != 1.0)
        or params.logit_bias
        or sequence.t < params.min_tokens
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
    )


def process_logits(raw: torch.Tensor, sequences: Sequence[SequenceSampling]) -> torch.Tensor:
    """Bias, minimum length and penalties, then for random sampling the temperature: in vLLM's order.

    `raw`: float32 [num_rows, vocab_size], not changed; `sequences`: one per row. Returns float32 of the same shape,
    with -inf for what must not be chosen. Every operation is one number's own, so rows do not touch each other.
    """
    scores = raw.clone()
    _add(scores, [_additions(sequence) for sequence in sequences])
    _repeat_less(scores, sequences)
    _add(scores, [_penalties(sequence) for sequence in sequences])
    temperatures = [1.0 if s.params.greedy else min(s.params.temperature, _LARGEST) for s in sequences]
    if any(temperature != 1.0 for temperature in temperatures):
        scores /= column(temperatures, torch.float32, scores.device)
    return scores


def column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One number per row, as [num_rows, 1] on `device`, without waiting for it."""
    return to_device(torch.tensor(values, dtype=dtype)[:, None], device)


def _additions(sequence: SequenceSampling) -> Mapping[int, float]:
    params = sequence.params
    additions = params.logit_bias or {}
    if sequence.t < params.min_tokens:
        ends = (*sequence.eos_token_ids, *(params.stop_token_ids or ()))
        additions = {**additions, **dict.fromkeys(ends, -math.inf)}
    return additions


def _penalties(sequence: SequenceSampling) -> Mapping[int, float]:
    """OpenAI's formula."""
    params = sequence.params
    if not (params.presence_penalty or params.frequency_penalty):
        return {}
    counts = Counter(sequence.generated_token_ids)
    return {i: -params.presence_penalty - params.frequency_penalty * n for i, n in counts.items()}


def _repeat_less(scores: torch.Tensor, sequences: Sequence[SequenceSampling]) -> None:
    """The repetition penalty, in place: transformers' RepetitionPenaltyLogitsProcessor."""
    factors: list[Mapping[int, float]] = []
    for sequence in sequences:
        penalty = sequence.params.repetition_penalty
        seen = {*sequence.prompt_token_ids, *sequence.generated_token_ids} if penalty != 1.0 else ()
        factors.append(dict.fromkeys(seen, penalty))
    if (places := _places(scores, factors)) is not None:
        flat, (positions, penalties) = scores.view(-1), places
        found = flat[positions]
        flat[positions] = torch.where(found < 0, found * penalties, found / penalties)


def _add(scores: torch.Tensor, additions: Sequence[Mapping[int, float]]) -> None:
    """Add to single scores, in place."""
    if (places := _places(scores, additions)) is not None:
        scores.view(-1).index_add_(0, *places)  # no position occurs twice, so the order of the additions is no matter


def _places(scores: torch.Tensor, rows: Sequence[Mapping[int, float]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Positions int64 [n] in the flat scores, and numbers float32 [n], of every row's token ids; None if there are
    none. Ids beyond the head's rows (a tokenizer may have more) are left out.
    """
    if not any(rows):
        return None
    vocab_size = scores.shape[-1]
    lengths = [len(row) for row in rows]
    ids = np.concatenate([np.fromiter(row, np.int64, len(row)) for row in rows])
    numbers = np.concatenate([np.fromiter(row.values(), np.float32, len(row)) for row in rows])
    positions = ids + np.repeat(np.arange(len(rows)) * vocab_size, lengths)
    inside = ids < vocab_size
    return (
        to_device(torch.from_numpy(positions[inside]), scores.device),
        to_device(torch.from_numpy(numbers[inside]), scores.device),
    )
