"""Which format for which weights: a multiple-choice knapsack on measured losses. Imports no torch.

Every item (a weight, or weights that must agree) takes one of its options; bytes, losses and costs add up over the
items. That losses add is an approximation, and a good one: KL divergences are squares of small errors that have nothing
to do with each other (the bundled model's blocks in int4 one by one add up to 93 % of all of them at once).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipo_ray.errors import InputError
from pipo_ray.session.memory import format_size

Numbers = npt.NDArray[np.float64]

_MOST_STATES = 1 << 14
_MOST_PRICES = 40
_SLACK = 1e-12  # sums of the same numbers in another order


@dataclass(frozen=True)
class Option:
    """A format that an item may have, the bytes that it takes in the store, and what it adds to the model's loss."""

    format: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Item:
    """What gets one format: a tensor's name, and its options."""

    name: str
    options: tuple[Option, ...]


Cost = Callable[[Item, Option], float]
"""A model of what is to be least, such as seconds of a sweep."""


@dataclass(frozen=True)
class Choice:
    """A format for every item by its name, and the sums. No choice within the limits costs less than `bound`, which is
    `cost` where this one is the best.
    """

    formats: dict[str, str]
    nbytes: int
    loss: float
    cost: float
    bound: float


def choose(
    items: Sequence[Item], *, max_bytes: float | None = None, max_loss: float | None = None, cost: Cost | None = None
) -> Choice:
    """The choice that costs least and takes at most `max_bytes` and `max_loss` (one of them, or both).

    `cost` is by default the loss where only `max_bytes` is given, else the bytes. With one limit the choice is the best
    one, unless more than 16384 partial choices are undecided on the way (hundreds of items whose bytes and losses are
    all different): then they are thinned out, and `Choice.bound` says how much better another could be. With two limits
    it is the best that a price on bytes finds (a Lagrange multiplier), and `bound` says the same.

    Raises InputError if nothing is within the limits, and names the least that is possible.
    """
    if max_bytes is None and max_loss is None:
        raise ValueError("choose wants max_bytes, max_loss or both")
    nbytes = [np.array([float(option.nbytes) for option in item.options]) for item in items]
    losses = [np.array([option.loss for option in item.options]) for item in items]
    if cost is not None:
        costs = [np.array([float(cost(item, option)) for option in item.options]) for item in items]
    else:
        costs = losses if max_loss is None else nbytes
    if max_bytes is not None and (least := _sum_of_least(nbytes)) > max_bytes:
        raise InputError(
            f"a size of {format_size(int(max_bytes))} is impossible: the least is {format_size(int(least))}"
        )
    if max_loss is not None and (least := _sum_of_least(losses)) > max_loss * (1 + _SLACK):
        raise InputError(f"a loss of {max_loss:.3g} nats is impossible: the least is {least:.3g}")
    if max_loss is None or max_bytes is None:
        uses, limit = (nbytes, max_bytes) if max_loss is None else (losses, max_loss)
        assert limit is not None
        found = _search(costs, uses, limit)
    else:
        found = _search_two(costs, nbytes, losses, max_bytes, max_loss)
    chosen = [item.options[index] for item, index in zip(items, found.options, strict=True)]
    return Choice(
        {item.name: option.format for item, option in zip(items, chosen, strict=True)},
        sum(option.nbytes for option in chosen),
        sum(option.loss for option in chosen),
        _sum_of(costs, found.options),
        found.bound,
    )


class _Found(NamedTuple):
    """An option's number for every item, and what nothing better can cost less than."""

    options: list[int]
    bound: float


def _sum_of_least(values: Sequence[Numbers]) -> float:
    return sum(float(one.min()) for one in values)


def _sum_of(values: Sequence[Numbers], options: Sequence[int]) -> float:
    return sum(float(one[index]) for one, index in zip(values, options, strict=True))


def _search_two(
    costs: list[Numbers], nbytes: list[Numbers], losses: list[Numbers], max_bytes: float, max_loss: float
) -> _Found:
    """Put a price on bytes: the one at which choices that are too large and choices that are not cost the same."""
    large = _search(costs, losses, max_loss)
    if _sum_of(nbytes, large.options) <= max_bytes:
        return large
    small = _search(nbytes, losses, max_loss)
    if (least := _sum_of(nbytes, small.options)) > max_bytes:
        raise InputError(
            f"a size of {format_size(int(max_bytes))} with a loss of {max_loss:.3g} nats is impossible: the least "
            f"size with that loss is {format_size(int(least))}"
        )
    bound = large.bound
    for _ in range(_MOST_PRICES):
        (large_cost, large_bytes), (small_cost, small_bytes) = (
            (_sum_of(costs, one.options), _sum_of(nbytes, one.options)) for one in (large, small)
        )
        price = max(0.0, small_cost - large_cost) / (large_bytes - small_bytes)
        priced = [one + price * size for one, size in zip(costs, nbytes, strict=True)]
        found = _search(priced, losses, max_loss)
        bound = max(bound, found.bound - price * max_bytes)
        known = large_cost + price * large_bytes
        if _sum_of(priced, found.options) >= known - _SLACK * abs(known):
            break
        if _sum_of(nbytes, found.options) <= max_bytes:
            small = found
        else:
            large = found
    return _Found(small.options, min(bound, _sum_of(costs, small.options)))


def _search(costs: list[Numbers], uses: list[Numbers], limit: float) -> _Found:
    """The cheapest choice that uses at most `limit` of one thing.

    Item by item, all partial choices are kept that none beats in both cost and use (Nemhauser and Ullmann, 1969), but
    those from which even fractions of options could not lead to anything cheaper than a greedy choice.
    """
    relaxed = [_Relaxation(costs[number:], uses[number:]) for number in range(len(costs) + 1)]
    greedy = relaxed[0].greedy(limit)
    ceiling = _sum_of(costs, greedy)
    slack = _SLACK * max(1.0, abs(ceiling))
    use, cost = np.zeros(1), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    thinned = False
    for number, rest in enumerate(relaxed[1:]):
        count = len(use)
        use, cost = np.add.outer(uses[number], use).ravel(), np.add.outer(costs[number], cost).ravel()
        hopeful = np.flatnonzero(cost + rest.least_cost(limit - use) <= ceiling + slack)
        if thinned and not len(hopeful):
            return _Found(greedy, float(relaxed[0].least_cost(np.array([limit]))[0]))
        order = hopeful[np.lexsort((cost[hopeful], use[hopeful]))]
        running = np.minimum.accumulate(cost[order])
        kept = order[np.concatenate([[True], running[1:] < running[:-1]])]
        if len(kept) > _MOST_STATES:
            kept = kept[np.linspace(0, len(kept) - 1, _MOST_STATES).astype(np.int64)]
            thinned = True
        steps.append((kept // count, kept % count))
        use, cost = use[kept], cost[kept]
    options: list[int] = []
    state = len(use) - 1  # the one with the greatest use costs least
    for chosen, before in reversed(steps):
        options.append(int(chosen[state]))
        state = int(before[state])
    options.reverse()
    if thinned:
        best = min(options, greedy, key=lambda one: _sum_of(costs, one))
        return _Found(best, float(relaxed[0].least_cost(np.array([limit]))[0]))
    return _Found(options, _sum_of(costs, options))


class _Relaxation:
    """The same with fractions of options allowed: the lower convex hull of each item's options (Sinha and Zoltners,
    1979), whose steps from one option to the next are taken in the order of what they save per use.
    """

    def __init__(self, costs: Sequence[Numbers], uses: Sequence[Numbers]) -> None:
        hulls = [_hull(cost, use) for cost, use in zip(costs, uses, strict=True)]
        self._first = [hull[0] for hull in hulls]
        steps = [
            (float(costs[item][b] - costs[item][a]), float(uses[item][b] - uses[item][a]), item, b)
            for item, hull in enumerate(hulls)
            for a, b in itertools.pairwise(hull)
        ]
        self._steps = sorted(steps, key=lambda step: step[0] / step[1])
        use = [_sum_of(uses, self._first), *(step[1] for step in self._steps)]
        cost = [_sum_of(costs, self._first), *(step[0] for step in self._steps)]
        self._use, self._cost = np.cumsum(use), np.cumsum(cost)

    def least_cost(self, limits: Numbers) -> Numbers:
        """What all items cost at least with so much to use; infinite where it is not enough for them."""
        result = np.interp(limits, self._use, self._cost)
        return np.where(limits < self._use[0] - _SLACK * max(1.0, abs(self._use[0])), np.inf, result)

    def greedy(self, limit: float) -> list[int]:
        """Whole options: the steps in their order as far as they fit."""
        options = list(self._first)
        left = limit - float(self._use[0])
        stopped: set[int] = set()
        for _, use, item, option in self._steps:
            if item in stopped or use > left:
                stopped.add(item)
                continue
            options[item] = option
            left -= use
        return options


def _hull(cost: Numbers, use: Numbers) -> list[int]:
    """Numbers of the options on the lower convex hull, from the least use to the least cost."""
    hull: list[int] = []
    for index in np.lexsort((cost, use)):
        if hull and cost[index] >= cost[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            if (cost[b] - cost[a]) * (use[index] - use[a]) < (cost[index] - cost[a]) * (use[b] - use[a]):
                break
            hull.pop()
        hull.append(int(index))
    return hull
