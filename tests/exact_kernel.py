"""What the kernel for sequences of different lengths computes, from its arguments alone, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from pipo_ray.model.cascade import KeyRanges


def exact_kernel(
    query: Tensor, keys: Tensor, values: Tensor, ranges: KeyRanges, scale: float, *, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `cascade.Kernel`; of any dtype, on any device. Queries that belong to no sequence get NaN, as do those that
    see nothing.
    """
    assert ranges.query_bounds.dtype == ranges.key_firsts.dtype == ranges.key_lengths.dtype == torch.int32
    assert len(ranges.query_bounds) == len(ranges.key_firsts) == ranges.num_sequences + 1
    assert causal or window is None
    bounds, firsts, lengths = (
        numbers.tolist() for numbers in (ranges.query_bounds, ranges.key_firsts, ranges.key_lengths)
    )
    mean = torch.full((*query.shape[:2], values.shape[2]), torch.nan, dtype=torch.float64, device=query.device)
    log_sum = torch.full((query.shape[1], query.shape[0]), torch.nan, dtype=torch.float64, device=query.device)
    for number, (first, length) in enumerate(zip(firsts[:-1], lengths, strict=True)):
        rows = slice(bounds[number], bounds[number + 1])
        asked = query[rows].transpose(0, 1).double()
        assert 0 < asked.shape[1] <= ranges.most_queries
        assert length <= ranges.most_keys
        assert 0 <= first <= first + length <= firsts[-1] == len(keys)
        group = query.shape[1] // keys.shape[1]
        k, v = (
            pool[first : first + length].transpose(0, 1).double().repeat_interleave(group, 0) for pool in (keys, values)
        )
        scores = asked @ k.transpose(1, 2) * scale
        if causal:
            at = torch.arange(length - asked.shape[1], length, device=query.device)[:, None]
            keys_at = torch.arange(length, device=query.device)[None]
            hidden = keys_at > at
            if window is not None:
                hidden |= keys_at <= at - window
            scores.masked_fill_(hidden, -torch.inf)
        mean[rows] = (torch.softmax(scores, -1) @ v).transpose(0, 1)
        log_sum[:, rows] = torch.logsumexp(scores, -1)
    return mean.to(query.dtype), log_sum.float()
