"""From logits to tokens. Stateless: what a row needs is computed from its token ids, so nothing is lost with a process.

The order of the steps and the reported log probabilities (of the raw distribution) are vLLM's.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from pipo_ray.errors import PipoError
from pipo_ray.model.host_values import to_device
from pipo_ray.params import SamplingParams

# Tokens are drawn with whole-numbered weights, probabilities in units of 2^-52. Sums of whole numbers are exact in any
# order, so the token does not depend on how a device splits a cumulative sum (of floats, CUDA's differs from run to
# run).
ONE = 2**52


@dataclass(frozen=True)
class SequenceSampling:
    """What the choice of a sequence's next token depends on, besides its logits.

    `seed` is `params.seed` or the request's `fresh_seed()`; `sample_index` tells the `n` samples of a request apart.
    `eos_token_ids` are the model's; they are suppressed until `params.min_tokens` are generated.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    generated_token_ids: Sequence[int]
    sample_index: int = 0
    eos_token_ids: Sequence[int] = ()

    @property
    def t(self) -> int:
        """The number of the next token, from 0."""
        return len(self.generated_token_ids)


@dataclass(frozen=True)
class SampledToken:
    """A row's result. `logprob` is the chosen token's under the raw logits, natural logarithm.

    `top_logprobs` is empty unless `params.logprobs` was given; then (token id, logprob, rank from 1) of the chosen
    token, followed by the `params.logprobs` most probable tokens without it, in order; of equals the lower id comes
    first.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float, int], ...] = field(default=())


def fresh_seed() -> int:
    """A seed for a request that came without one: 63 random bits from the operating system."""
    return secrets.randbits(63)


def uniform(seed: int, t: int, sample_index: int = 0) -> float:
    """The random number of token `t`, in [0, 1), on every device: 53 bits of BLAKE2b over (seed, sample_index, t)."""
    message = struct.pack("<QQQ", seed % 2**64, sample_index, t)
    return (int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 11) / 2**53


@torch.inference_mode()
def sample_tokens(logits: torch.Tensor, sequences: Sequence[SequenceSampling]) -> list[SampledToken]:
    """Choose the next token of every row.

    `logits`: [num_rows, vocab_size], floating point, on the compute device; not changed. `sequences`: one per row.
    A row's result is bit for bit the same whatever the other rows are. Waits for the device once.
    Raises PipoError where a row has NaN or no token with a finite logit.
    """
    if logits.shape[:-1] != (len(sequences),):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(sequences)} sequences")
    if not sequences:
        return []
    changed = [_changes_order(sequence) for sequence in sequences]
    # Exact, so a row does not depend on the others, and the first of equals, as torch.argmax promises.
    argmax = logits.argmax(dim=-1) if not all(changed) else None
    packed = []
    for row, sequence in enumerate(sequences):
        # A fresh allocation has the same alignment for every row; CUDA's reductions depend on it in the last bit.
        raw = logits[row].to(torch.float32, copy=True)
        if argmax is not None and not changed[row]:
            token = argmax[row : row + 1]
            score = raw[token]
        else:
            scores = process_logits(raw, sequence)
            token = scores.argmax(dim=-1, keepdim=True) if sequence.params.greedy else draw_token(scores, sequence)
            score = scores[token]
        packed.append(_pack(raw, token, score, sequence.params.logprobs))
    values = torch.cat(packed).tolist()
    results, start = [], 0
    for row, (sequence, part) in enumerate(zip(sequences, packed, strict=True)):
        results.append(_unpack(values[start : start + len(part)], row, sequence.params.logprobs))
        start += len(part)
    return results


def process_logits(raw: torch.Tensor, sequence: SequenceSampling) -> torch.Tensor:
    """Bias, minimum length and penalties, then for random sampling temperature, min-p and top-k: all but top-p.

    `raw`: float32 [vocab_size], not changed. Returns float32 [vocab_size] with -inf for what must not be chosen.
    """
    params = sequence.params
    scores = raw.clone()
    if params.logit_bias:
        _add(scores, params.logit_bias)
    if sequence.t < params.min_tokens:
        ids = [i for i in (*sequence.eos_token_ids, *(params.stop_token_ids or ())) if i < len(scores)]
        scores.index_fill_(0, _to_device(ids, torch.int64, scores.device), -math.inf)
    rows = scores[None]
    if params.repetition_penalty != 1.0:
        ids = list(set(sequence.prompt_token_ids).union(sequence.generated_token_ids))
        input_ids = _to_device(ids, torch.int64, scores.device)[None]
        rows = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(input_ids, rows)
    if (params.presence_penalty or params.frequency_penalty) and sequence.generated_token_ids:
        counts = Counter(sequence.generated_token_ids)
        _add(rows[0], {i: -params.presence_penalty - params.frequency_penalty * n for i, n in counts.items()})
    if params.greedy:
        return rows[0]
    # The warpers below look at the scores only, not at the ids.
    ids_unused = torch.LongTensor()
    if params.temperature != 1.0:
        rows = TemperatureLogitsWarper(params.temperature)(ids_unused, rows)
    if params.min_p > 0.0:
        rows = MinPLogitsWarper(params.min_p)(ids_unused, rows)
    if 0 < params.top_k < len(scores):
        rows = TopKLogitsWarper(params.top_k)(ids_unused, rows)
    return rows[0]


def draw_token(scores: torch.Tensor, sequence: SequenceSampling) -> torch.Tensor:
    """Draw from softmax(scores) cut to its top-p part, with the random number of (seed, sample_index, t).

    `scores`: float32 [vocab_size]. Returns int64 [1] on the same device, without waiting for it.
    """
    weights = (torch.softmax(scores, dim=-1) * ONE).long()
    if sequence.params.top_p < 1.0:
        weights = keep_top_p(weights, sequence.params.top_p)
    cumulative = weights.cumsum(dim=0)
    total = cumulative[-1:]
    point = (total.double() * uniform(sequence.seed, sequence.t, sequence.sample_index)).long()
    point = torch.minimum(point, total - 1)  # the product may have been rounded up
    # The first token whose cumulative weight is above the point. NaN in the scores can point behind the last token; the
    # caller finds the NaN, but must not index with it.
    return torch.searchsorted(cumulative, point, right=True).clamp_(0, len(scores) - 1)


def keep_top_p(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set to 0 all but the largest weights that together reach `top_p` of the sum; of equal weights the lower id stays.

    `weights`: int64 [vocab_size], 0 or above, with a sum of at most about 2^52; `top_p` in (0, 1).
    Returns int64 [vocab_size]. The same tokens as transformers' TopPLogitsWarper leaves, whose cumulative sum of
    float32 is neither exact nor, on CUDA, repeatable, and whose sort of a whole vocabulary takes 25 ms on a CPU.
    """
    total = weights.sum()
    limit = (total.double() * top_p).ceil().long()
    descending = _sorted_descending(weights, top_p)
    last = torch.searchsorted(descending.cumsum(dim=0), limit[None]).clamp_(max=len(descending) - 1)
    least = descending[last]
    above, equal = weights > least, weights == least
    num_equal = last + 1 - above.sum()
    return torch.where(above | (equal & (equal.cumsum(dim=0) <= num_equal)), weights, 0)


def _sorted_descending(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The weights in descending order; on the CPU without the small ones that top-p drops in any case."""
    if weights.device.type != "cpu":
        return weights.sort(descending=True).values
    # Sorting takes most of the time. What is below the average of all that is to be dropped is dropped for certain,
    # often nearly the whole vocabulary; on a GPU, counting the rest would mean waiting for it. NumPy sorts 4 times as
    # fast as torch.
    certain = max(0, int((1.0 - top_p) * int(weights.sum()) / len(weights)) - 1)
    rest = weights[weights > certain]
    if not len(rest):  # only where the scores have NaN, which the caller reports
        return weights
    return torch.from_numpy(np.sort(rest.numpy())[::-1].copy())


def _changes_order(sequence: SequenceSampling) -> bool:
    """Whether the token may be another one than the argmax of the raw logits."""
    params = sequence.params
    return bool(
        not params.greedy
        or params.logit_bias
        or sequence.t < params.min_tokens
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
    )


def _to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device)


def _add(scores: torch.Tensor, additions: Mapping[int, float]) -> None:
    """Add to single scores, in place. Ids beyond the head's rows (a tokenizer may have more) are left out."""
    inside = {token_id: value for token_id, value in additions.items() if token_id < len(scores)}
    ids = _to_device(list(inside), torch.int64, scores.device)
    scores.index_add_(0, ids, _to_device(list(inside.values()), scores.dtype, scores.device))


def _pack(raw: torch.Tensor, token: torch.Tensor, score: torch.Tensor, num_logprobs: int | None) -> torch.Tensor:
    """What the host wants to know of a row, float64 [3] or [4 + 2k] (ids are exact in it): one copy brings all rows."""
    normalizer = raw.logsumexp(dim=0, keepdim=True)
    value = raw[token]
    parts = [token.double(), score.double(), (value - normalizer).double()]
    if num_logprobs is not None:
        parts.append((raw > value).sum(dim=0, keepdim=True).double() + 1)
        top = raw.topk(min(num_logprobs, len(raw)))
        parts += [top.indices.double(), (top.values - normalizer).double()]
    return torch.cat(parts)


def _unpack(values: list[float], row: int, num_logprobs: int | None) -> SampledToken:
    token_id, score, logprob = int(values[0]), values[1], values[2]
    if not (math.isfinite(logprob) and math.isfinite(score)):
        raise PipoError(
            f"row {row} of the logits has NaN, infinity, or no token that may be chosen; "
            "the checkpoint may be damaged (pipo verify), or its numbers too large for the precision (--dtype float32)"
        )
    if num_logprobs is None:
        return SampledToken(token_id, logprob)
    k = (len(values) - 4) // 2
    ids, logprobs = [int(i) for i in values[4 : 4 + k]], values[4 + k :]
    # topk leaves the order of equals open.
    top = [(i, lp, rank) for rank, (lp, i) in enumerate(sorted(zip(logprobs, ids, strict=True), key=_descending), 1)]
    chosen = [entry for entry in top if entry[0] == token_id] or [(token_id, logprob, max(k + 1, int(values[3])))]
    return SampledToken(token_id, logprob, (*chosen, *(entry for entry in top if entry[0] != token_id)))


def _descending(entry: tuple[float, int]) -> tuple[float, int]:
    return -entry[0], entry[1]
