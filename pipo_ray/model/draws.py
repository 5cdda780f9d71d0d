"""Random tokens from whole-numbered weights (`weight_unit.py`), many rows at once, for a GPU.

The CPU's are in `cpu_draws.py`. What is not a sum is one number's own, a comparison, or a largest number, and exact as
well: a row does not depend on the others. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipo_ray.model.scores import column
from pipo_ray.model.weight_unit import unit
from pipo_ray.params import SamplingParams


def scaled(rows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Probabilities in whole units of the weights, but not rounded: exp(rows - largest) * unit.

    `rows`: float32 [num_rows, vocab_size]; `largest`: float32 [num_rows, 1]. Returns float32 of the shape of `rows`.
    """
    return torch.sub(rows, largest).exp_().mul_(float(unit(rows.shape[-1])))


def whole(scaled_probabilities: torch.Tensor) -> torch.Tensor:
    """The weights, int64 of the same shape."""
    return scaled_probabilities.long()


def cuts(params: SamplingParams, vocab_size: int) -> tuple[bool, bool]:
    """Whether top-k and top-p leave tokens out."""
    return 0 < params.top_k < vocab_size, params.top_p < 1.0


def cut(scaled_probabilities: torch.Tensor, scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The weights, with 0 where min-p, top-k or top-p leaves a token out, in this order.

    `scaled_probabilities`: float32 [num_rows, vocab_size], may be changed; `scores`: float32, what they come from;
    `params`: one per row, of which all have the same `cuts`. Returns int64 [num_rows, vocab_size].
    """
    device, vocab_size = scores.device, scores.shape[-1]
    top_k, top_p = cuts(params[0], vocab_size)
    # Neither min-p nor top-k takes the most probable token away, and so what either leaves out does not depend on the
    # other.
    if any(row.min_p for row in params):
        least = column([row.min_p * unit(vocab_size) for row in params], torch.float32, device)
        scaled_probabilities.masked_fill_(scaled_probabilities < least, 0.0)
    if top_k:
        largest = scores.topk(max(row.top_k for row in params), dim=-1).values
        least = largest.gather(1, column([row.top_k - 1 for row in params], torch.int64, device))
        scaled_probabilities.masked_fill_(scores < least, 0.0)
    return keep_top_p(scaled_probabilities, [row.top_p for row in params]) if top_p else whole(scaled_probabilities)


def keep_top_p(scaled_probabilities: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """The weights, 0 but for the largest that together reach `top_p` of the sum; of equal weights the lower id stays.

    `scaled_probabilities`: float32 [num_rows, vocab_size]; `top_p`: one per row, in (0, 1). Returns int64 [num_rows,
    vocab_size]. The same tokens as transformers' TopPLogitsWarper leaves, whose cumulative sum of float32 is neither
    exact nor, on CUDA, repeatable.
    """
    # Half the memory, and half the time, of sorting the weights, which are in the same order.
    descending = whole(scaled_probabilities.sort(dim=-1, descending=True).values)
    cumulative = descending.cumsum(dim=-1)
    limit = (cumulative[:, -1:].double() * column(top_p, torch.float64, cumulative.device)).ceil().long()
    last = torch.searchsorted(cumulative, limit).clamp_(max=cumulative.shape[-1] - 1)
    del cumulative
    least = descending.gather(1, last)
    del descending
    weights = whole(scaled_probabilities)
    above, equal = weights > least, weights == least
    num_equal = last + 1 - above.sum(dim=-1, keepdim=True)
    return torch.where(above | (equal & (equal.cumsum(dim=-1) <= num_equal)), weights, 0)


def draw(weights: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """For each row the first id with whose weight the sum is above the row's number (in [0, 1)) of the whole sum.

    `weights`: int64 [num_rows, vocab_size] with sums of at most 2^62. Returns int64 [num_rows, 1]. A row without
    weights, or with negative ones (from NaN), gives a valid id without meaning.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    point = (total.double() * column(numbers, torch.float64, weights.device)).long()
    point = torch.minimum(point, total - 1)  # the product may have been rounded up
    return torch.searchsorted(cumulative, point, right=True).clamp_(0, weights.shape[-1] - 1)


def most_probable(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of each row's `count` largest numbers in descending order; of equals the lower id comes first.

    `rows`: float32 [num_rows, vocab_size] without NaN. Returns int64 [num_rows, count].
    """
    # topk leaves open which of equals it takes, and logits of 16 bits are often equal. So no two keys are: the bits of
    # a float (-0.0 made 0.0), the negative ones turned round, are ordered as the floats are; the id follows.
    bits = (rows + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() * 2**32
    keys -= torch.arange(rows.shape[-1], device=rows.device)
    return keys.topk(count, dim=-1).indices
