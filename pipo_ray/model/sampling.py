"""From logits to tokens. Stateless: what a row needs is computed from its token ids, so nothing is lost with a process.

The order of the steps and the reported log probabilities (of the raw distribution) are vLLM's.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch

from pipo_ray.errors import PipoError
from pipo_ray.model import cpu_draws, draws
from pipo_ray.model.sampling_memory import DRAWING_BYTES, GREEDY_BYTES, SORTING_BYTES, rows_at_once
from pipo_ray.model.scores import changes_scores, process_logits
from pipo_ray.model.seen_tokens import SeenTokens
from pipo_ray.model.weight_unit import unit
from pipo_ray.params import SamplingParams


@dataclass(frozen=True)
class SequenceSampling:
    """What the choice of a sequence's next token depends on, besides its logits.

    `seed` is `params.seed` or the request's `fresh_seed()`; `sample_index` tells the `n` samples of a request apart.
    `eos_token_ids` are the model's; they are suppressed until `params.min_tokens` are generated. `seen`, one object for
    all tokens of a sequence, saves time where there are penalties, and changes no result.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    generated_token_ids: Sequence[int]
    sample_index: int = 0
    eos_token_ids: Sequence[int] = ()
    seen: SeenTokens | None = None

    @property
    def t(self) -> int:
        """The number of the next token, from 0."""
        return len(self.generated_token_ids)

    @property
    def number(self) -> float:
        """The next token's random number."""
        return uniform(self.seed, self.t, self.sample_index)


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
def sample_tokens(
    logits: torch.Tensor | Sequence[torch.Tensor], sequences: Sequence[SequenceSampling]
) -> list[SampledToken]:
    """Choose the next token of every row.

    `logits`: [num_rows, vocab_size], or its rows one by one, floating point, on the compute device; not changed.
    `sequences`: one per row.
    A row's result is bit for bit the same whatever the other rows are. Waits for the device once.
    Raises PipoError where a row has NaN, infinity, or no token with a finite logit.
    """
    rows = list(logits)
    if len(rows) != len(sequences):
        raise ValueError(f"{len(rows)} rows of logits for {len(sequences)} sequences")
    if not rows:
        return []
    if rows[0].device.type == "cpu":
        found: list[Sequence[float]] = [_sample_row(row, one) for row, one in zip(rows, sequences, strict=True)]
    else:
        found = _sample_groups(rows, sequences)
    return [_result(values, row, len(rows[0]), sequences[row]) for row, values in enumerate(found)]


def _sample_groups(rows: Sequence[torch.Tensor], sequences: Sequence[SequenceSampling]) -> list[Sequence[float]]:
    """What `_result` reads, of every row."""
    groups = list(_groups(sequences, len(rows[0])))
    packed = [
        _sample_rows(torch.stack([rows[i] for i in group]).float(), [sequences[i] for i in group]) for group in groups
    ]
    values = torch.cat([part.view(-1) for part in packed]).tolist()
    found: list[Sequence[float]] = [()] * len(sequences)
    start = 0
    for group, part in zip(groups, packed, strict=True):
        for row in group:
            end = start + part.shape[1]
            found[row] = values[start:end]
            start = end
    return found


def _groups(sequences: Sequence[SequenceSampling], vocab_size: int) -> Iterator[list[int]]:
    """Rows that are sampled from at once: of one kind, and not too many for the memory."""
    kinds = [_kind(sequence, vocab_size) for sequence in sequences]
    for (bytes_per_logit, *_), group in groupby(sorted(range(len(kinds)), key=kinds.__getitem__), kinds.__getitem__):
        rows = list(group)
        at_once = rows_at_once(vocab_size, bytes_per_logit)
        yield from (rows[start : start + at_once] for start in range(0, len(rows), at_once))


def _kind(sequence: SequenceSampling, vocab_size: int) -> tuple[int, bool, bool, bool, bool, int]:
    """What makes a row's sequence of operations; first the memory it takes."""
    params = sequence.params
    changes = changes_scores(sequence)
    top_k, top_p = (False, False) if params.greedy else draws.cuts(params, vocab_size)
    logprobs = -1 if params.logprobs is None else params.logprobs
    drawing = GREEDY_BYTES if params.greedy and not changes else DRAWING_BYTES
    bytes_per_logit = SORTING_BYTES if top_k or top_p or logprobs >= 0 else drawing
    return bytes_per_logit, params.greedy, changes, top_k, top_p, logprobs


def _sample_rows(raw: torch.Tensor, sequences: list[SequenceSampling]) -> torch.Tensor:
    """What `_result` reads, of rows of one kind, float32 [num_rows, vocab_size]: float64 [num_rows, columns]."""
    params = sequences[0].params
    first = raw.argmax(dim=-1, keepdim=True)
    largest = raw.gather(1, first)
    probabilities = draws.scaled(raw, largest)
    columns = [draws.whole(probabilities).sum(dim=-1, keepdim=True).double()]
    scores, token, top_score = raw, first, largest
    if changes_scores(sequences[0]):
        scores = process_logits(raw, sequences)
        token = scores.argmax(dim=-1, keepdim=True)
        top_score = scores.gather(1, token)
        if not params.greedy:
            probabilities = draws.scaled(scores, top_score)
    if not params.greedy:
        weights = draws.cut(probabilities, scores, [sequence.params for sequence in sequences])
        token = draws.draw(weights, [sequence.number for sequence in sequences])
    value = largest if token is first else raw.gather(1, token)
    columns += [token, largest, value, top_score]
    if params.logprobs is not None:
        ids = draws.most_probable(raw, min(params.logprobs, raw.shape[1]))
        columns += [(raw > value).sum(dim=-1, keepdim=True), ids, raw.gather(1, ids)]
    return torch.cat(columns, dim=1)


def _sample_row(logits: torch.Tensor, sequence: SequenceSampling) -> list[float]:
    """What `_result` reads, of a row [vocab_size] on the CPU."""
    params = sequence.params
    raw: cpu_draws.Floats = logits.float().numpy()
    token = int(raw.argmax())  # NumPy's is many times as fast as torch's; of equals both find the first
    top_score = largest = raw[token]
    if not np.isfinite(largest):
        return [math.nan] * 5
    probabilities = cpu_draws.scaled(raw, largest)
    weights = cpu_draws.whole(probabilities)
    total = float(weights.sum())
    scores = raw
    if changes_scores(sequence):
        scores = process_logits(torch.from_numpy(raw)[None], [sequence])[0].numpy()
        token = int(scores.argmax())
        top_score = scores[token]
        if not np.isfinite(top_score):
            return [math.nan] * 5
        if not params.greedy:
            probabilities = cpu_draws.scaled(scores, top_score)
            weights = cpu_draws.whole(probabilities)
    if not params.greedy:
        ids, weights = cpu_draws.cut(weights, scores, probabilities, params)
        place = cpu_draws.draw(weights, sequence.number)
        token = place if ids is None else int(ids[place])
    value = raw[token]
    values = [total, token, float(largest), float(value), float(top_score)]
    if params.logprobs is not None:
        most = cpu_draws.most_probable(raw, min(params.logprobs, len(raw)))
        values += [float(np.count_nonzero(raw > value)), *most.tolist(), *raw[most].tolist()]
    return values


def _result(values: Sequence[float], row: int, vocab_size: int, sequence: SequenceSampling) -> SampledToken:
    """From the sum of the row's weights, the token, the largest logit, the token's, and the largest score. Where
    logprobs are wanted, then the number of logits above the token's, the ids of the most probable tokens, and their
    logits.
    """
    total, token, largest, value, top_score = values[:5]
    if not (math.isfinite(largest) and math.isfinite(value) and math.isfinite(top_score)):
        raise PipoError(
            f"row {row} of the logits has NaN, infinity, or no token that may be chosen; "
            "the checkpoint may be damaged (pipo verify), or its numbers too large for the precision (--dtype float32)"
        )
    token_id, normalizer = int(token), math.log(total / unit(vocab_size))
    logprob = value - largest - normalizer
    if sequence.params.logprobs is None:
        return SampledToken(token_id, logprob)
    k = (len(values) - 6) // 2
    ids, logits = [int(i) for i in values[6 : 6 + k]], values[6 + k :]
    top = [(i, logit - largest - normalizer, rank) for rank, (i, logit) in enumerate(zip(ids, logits, strict=True), 1)]
    chosen = [entry for entry in top if entry[0] == token_id] or [(token_id, logprob, max(k, int(values[5])) + 1)]
    return SampledToken(token_id, logprob, (*chosen, *(entry for entry in top if entry[0] != token_id)))
