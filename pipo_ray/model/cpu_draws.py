"""Random tokens from whole-numbered weights on the CPU, one row at a time: what `draws.py` does on a GPU for many.

In NumPy, on one thread: its comparisons and exponentials take a fraction of torch's processor time, and what is left
out of a vocabulary is not looked at again, where a GPU would have to be waited for to learn how much is left.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipo_ray.model.weight_unit import unit
from pipo_ray.params import SamplingParams

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_BLOCK = 256  # logits whose largest one is looked at first


def scaled(row: Floats, largest: np.float32) -> Floats:
    """Probabilities in whole units of the weights, but not rounded: exp(row - largest) * unit; float32 [vocab_size]."""
    found = row - largest
    np.exp(found, out=found)
    found *= np.float32(unit(len(row)))
    return found


def whole(scaled_probabilities: Floats) -> Integers:
    """The weights, int64 [vocab_size]."""
    return scaled_probabilities.astype(np.int64)


def cut(
    weights: Integers, scores: Floats, scaled_probabilities: Floats, params: SamplingParams
) -> tuple[Integers | None, Integers]:
    """The ids that min-p, top-k and top-p leave, ascending, and their weights; None for all ids.

    `weights`: int64 [vocab_size]; `scores` and `scaled_probabilities`: float32, what they come from.
    """
    ids = None
    if 0 < params.top_k < len(scores):
        ids = np.flatnonzero(scores >= kth_largest(scores, params.top_k))
    # Neither min-p nor top-k takes the most probable token away, and so what either leaves out does not depend on the
    # other.
    if params.min_p > 0.0:
        bound = np.float32(params.min_p) * np.float32(unit(len(scores)))
        likely = scaled_probabilities >= bound
        ids = np.flatnonzero(likely) if ids is None else ids[likely[ids]]
    if ids is not None:
        weights = weights[ids]
    if params.top_p < 1.0:
        kept = top_p_places(weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def top_p_places(weights: Integers, top_p: float) -> Integers:
    """Where the largest weights are that together reach `top_p` of the sum, ascending; of equal weights the first stay.

    `weights`: int64 [n], 0 or above, with a sum of at most 2^62 and above 0; `top_p` in (0, 1). As `draws.keep_top_p`.
    """
    total = int(weights.sum())
    limit = math.ceil(float(total) * top_p)
    # Sorting takes most of the time. What is not above the average of all that is to be dropped is dropped for certain,
    # often nearly the whole vocabulary.
    places = np.flatnonzero(weights > max(0, total - limit) // len(weights))
    weights = weights[places]
    descending = np.sort(weights)[::-1]
    last = min(int(np.searchsorted(descending.cumsum(), limit)), len(descending) - 1)
    least = descending[last]
    above, equal = weights > least, np.flatnonzero(weights == least)
    above[equal[: last + 1 - np.count_nonzero(above)]] = True
    kept: Integers = places[above]
    return kept


def draw(weights: Integers, number: float) -> int:
    """The place of the first weight with whose addition the sum is above `number` (in [0, 1)) of the whole sum.

    `weights`: int64 [n] with a sum of at most 2^62 and above 0.
    """
    cumulative = weights.cumsum()
    total = int(cumulative[-1])
    point = min(int(float(total) * number), total - 1)  # the product may have been rounded up
    return int(np.searchsorted(cumulative, point, side="right"))


def kth_largest(row: Floats, k: int) -> np.float32:
    """The k-th largest number of `row`, float32 [n] without NaN, n at least k."""
    if (num_blocks := len(row) // _BLOCK) >= k:
        # The k-th largest of the blocks' largest is a lower bound. Few numbers are above it.
        largest = row[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).max(axis=1)
        row = row[row >= np.partition(largest, -k)[-k]]
    found: np.float32 = np.partition(row, -k)[-k]
    return found


def most_probable(row: Floats, count: int) -> Integers:
    """The ids of the `count` largest numbers in descending order; of equals the lower id comes first.

    `row`: float32 [vocab_size] without NaN. Returns int64 [count]. As `draws.most_probable`.
    """
    if count == 0:
        return np.empty(0, np.int64)
    ids = np.flatnonzero(row >= kth_largest(row, count))
    return ids[np.argsort(-row[ids], kind="stable")[:count]]
