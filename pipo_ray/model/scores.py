"""What a request changes about its logits before a token is chosen: bias, minimum length, penalties, temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pipo_ray.model.host_values import to_device
from pipo_ray.model.seen_tokens import SeenTokens

if TYPE_CHECKING:
    from pipo_ray.model.sampling import SequenceSampling

# Token ids of a row, none of them twice, and a number for each.
Entries = tuple[npt.NDArray[np.int64], npt.NDArray[np.floating[Any]]]

_NONE: Entries = np.empty(0, np.int64), np.empty(0, np.float64)
_LARGEST = float(np.finfo(np.float32).max)


def changes_scores(sequence: SequenceSampling) -> bool:
    """Whether `process_logits` changes anything."""
    params = sequence.params
    return bool(
        (not params.greedy and params.temperature != 1.0)
        or params.logit_bias
        or sequence.t < params.min_tokens
        or params.penalizes
    )


def process_logits(raw: torch.Tensor, sequences: Sequence[SequenceSampling]) -> torch.Tensor:
    """Bias, minimum length and penalties, then for random sampling the temperature: in vLLM's order.

    `raw`: float32 [num_rows, vocab_size], not changed; `sequences`: one per row. Returns float32 of the same shape,
    with -inf for what must not be chosen. Every operation is one number's own, so rows do not touch each other.
    """
    scores = raw.clone()
    _add(scores, [_additions(sequence) for sequence in sequences])
    _repeat_less(scores, [_repetition(sequence) for sequence in sequences])
    _add(scores, [_penalties(sequence) for sequence in sequences])
    temperatures = [1.0 if s.params.greedy else min(s.params.temperature, _LARGEST) for s in sequences]
    if any(temperature != 1.0 for temperature in temperatures):
        scores /= column(temperatures, torch.float32, scores.device)
    return scores


def column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One number per row, as [num_rows, 1] on `device`, without waiting for it."""
    return to_device(torch.tensor(values, dtype=dtype)[:, None], device)


def _additions(sequence: SequenceSampling) -> Entries:
    params = sequence.params
    additions = dict(params.logit_bias or {})
    if sequence.t < params.min_tokens:
        additions |= dict.fromkeys((*sequence.eos_token_ids, *(params.stop_token_ids or ())), -math.inf)
    return np.fromiter(additions, np.int64, len(additions)), np.fromiter(additions.values(), np.float64, len(additions))


def _penalties(sequence: SequenceSampling) -> Entries:
    """OpenAI's formula."""
    params = sequence.params
    if not (params.presence_penalty or params.frequency_penalty):
        return _NONE
    ids, counts = _seen(sequence).generated()
    return ids, -params.presence_penalty - params.frequency_penalty * counts


def _repetition(sequence: SequenceSampling) -> Entries:
    penalty = sequence.params.repetition_penalty
    if penalty == 1.0:
        return _NONE
    ids = _seen(sequence).distinct()
    return ids, np.full(len(ids), penalty)


def _seen(sequence: SequenceSampling) -> SeenTokens:
    seen = sequence.seen or SeenTokens(sequence.prompt_token_ids)
    seen.follow(sequence.generated_token_ids)
    return seen


def _add(scores: torch.Tensor, rows: Sequence[Entries]) -> None:
    """Add to single scores, in place."""
    if (places := _places(scores, rows)) is not None:
        scores.view(-1).index_add_(0, *places)  # no position occurs twice, so the order of the additions is no matter


def _repeat_less(scores: torch.Tensor, rows: Sequence[Entries]) -> None:
    """The repetition penalty, in place: transformers' RepetitionPenaltyLogitsProcessor."""
    if (places := _places(scores, rows)) is not None:
        flat, (positions, penalties) = scores.view(-1), places
        found = flat[positions]
        flat[positions] = torch.where(found < 0, found * penalties, found / penalties)


def _places(scores: torch.Tensor, rows: Sequence[Entries]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Positions int64 [n] in the flat scores, and numbers float32 [n], of every row's entries; None if there are none.

    Ids beyond the head's rows (a tokenizer may have more) are left out.
    """
    lengths = [len(ids) for ids, _ in rows]
    if not any(lengths):
        return None
    vocab_size = scores.shape[-1]
    ids = np.concatenate([ids for ids, _ in rows])
    numbers = np.concatenate([numbers for _, numbers in rows]).astype(np.float32)
    positions = ids + np.repeat(np.arange(len(rows)) * vocab_size, lengths)
    inside = ids < vocab_size
    return (
        to_device(torch.from_numpy(positions[inside]), scores.device),
        to_device(torch.from_numpy(numbers[inside]), scores.device),
    )
