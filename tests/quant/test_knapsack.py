from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipo_ray.quant.knapsack as knapsack
from pipo_ray.errors import InputError
from pipo_ray.quant.knapsack import Choice, Item, Option, choose

NUMBERS = st.integers(0, 40)
OPTIONS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4)
TABLES = st.lists(OPTIONS, min_size=1, max_size=5)
Table = list[list[tuple[int, int, int]]]


def items_of(table: Table) -> list[Item]:
    """Option number `n` of item number `i` has bytes, 64ths of a nat, and a cost that a speed model would give."""
    return [
        Item(str(i), tuple(Option(str(n), nbytes, loss / 64) for n, (nbytes, loss, _) in enumerate(options)))
        for i, options in enumerate(table)
    ]


def brute_force(table: Table, max_bytes: float, max_loss: float, minimized: int) -> float | None:
    sums = [tuple(map(sum, zip(*picked, strict=True))) for picked in itertools.product(*table)]
    costs = [one[minimized] for one in sums if one[0] <= max_bytes and one[1] / 64 <= max_loss]
    return min(costs, default=None)


def check(choice: Choice, table: Table, minimized: int, unit: float = 1.0) -> None:
    """The sums are those of the formats."""
    picked = [options[int(choice.formats[str(i)])] for i, options in enumerate(table)]
    assert choice.nbytes == sum(one[0] for one in picked)
    assert choice.loss == sum(one[1] for one in picked) / 64
    assert choice.cost == pytest.approx(sum(one[minimized] for one in picked) * unit)


@given(TABLES, st.integers(0, 120))
def test_the_least_loss_at_a_size(table: Table, max_bytes: int) -> None:
    best = brute_force(table, max_bytes, math.inf, 1)
    if best is None:
        with pytest.raises(InputError, match=r"a size of .* is impossible: the least is"):
            choose(items_of(table), max_bytes=max_bytes)
        return
    choice = choose(items_of(table), max_bytes=max_bytes)
    assert choice.nbytes <= max_bytes
    assert choice.loss * 64 == best
    assert choice.bound == pytest.approx(choice.cost)
    check(choice, table, 1, 1 / 64)


@given(TABLES, st.integers(0, 120))
def test_the_least_size_with_a_loss(table: Table, loss: int) -> None:
    best = brute_force(table, math.inf, loss / 64, 0)
    if best is None:
        with pytest.raises(InputError, match="nats is impossible: the least is"):
            choose(items_of(table), max_loss=loss / 64)
        return
    choice = choose(items_of(table), max_loss=loss / 64)
    assert (choice.nbytes, choice.loss * 64 <= loss) == (best, True)
    check(choice, table, 0)


@given(TABLES, st.integers(0, 120), st.integers(0, 120))
def test_a_speed_model_with_both_limits(table: Table, max_bytes: int, loss: int) -> None:
    def seconds(item: Item, option: Option) -> float:
        return table[int(item.name)][int(option.format)][2]

    best = brute_force(table, max_bytes, loss / 64, 2)
    if best is None:
        with pytest.raises(InputError, match="impossible: the least"):
            choose(items_of(table), max_bytes=max_bytes, max_loss=loss / 64, cost=seconds)
        return
    choice = choose(items_of(table), max_bytes=max_bytes, max_loss=loss / 64, cost=seconds)
    assert choice.nbytes <= max_bytes
    assert choice.loss * 64 <= loss
    assert choice.bound - 1e-9 <= best <= choice.cost  # it may miss the best, and then says so
    check(choice, table, 2)


def test_a_speed_model_with_one_limit() -> None:
    items = [Item("a", (Option("int4", 4, 0.3), Option("int8", 8, 0.1), Option("16bit", 16, 0.0)))]
    # A machine on which int8 takes longest of all.
    slow = {"int4": 1.0, "int8": 5.0, "16bit": 2.0}
    assert choose(items, max_loss=0.2, cost=lambda _, option: slow[option.format]).formats == {"a": "16bit"}
    assert choose(items, max_loss=0.2).formats == {"a": "int8"}


@settings(max_examples=10)
@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_more_partial_choices_than_are_kept(seed: int, share: float) -> None:
    number = random.Random(seed).random
    items = [Item(str(i), tuple(Option(str(n), int(1e6 * number()), number()) for n in range(4))) for i in range(60)]
    low, high = (sum(pick(option.nbytes for option in item.options) for item in items) for pick in (min, max))
    limit = low + share * (high - low)
    exact = choose(items, max_bytes=limit)
    assert exact.bound == pytest.approx(exact.cost)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_MOST_STATES", 4)
        thinned = choose(items, max_bytes=limit)
    assert thinned.nbytes <= limit
    assert thinned.bound <= exact.cost + 1e-9 <= thinned.cost + 2e-9


def test_no_limit_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="max_bytes, max_loss or both"):
        choose([])
