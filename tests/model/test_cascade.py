"""Attention to prefixes that lie once in a pool: against float64 over each sequence's tokens in one piece."""

from __future__ import annotations

import random

import hypothesis
import pytest
import torch
from harness import CPU
from hypothesis import given
from hypothesis import strategies as st
from pool_sweeps import DIM, HEADS, KV_HEADS, Sweeps, Written

from pipo_ray.model import cascade
from pipo_ray.model.cascade import Sharer
from pipo_ray.model.kv_pool import KVPool


@hypothesis.settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([None, None, 1, 3, 8, 20]), st.sampled_from([1, 3, 100]))
def test_random_trees_of_sequences(seed: int, window: int | None, slab_rows: int) -> None:
    """Sequences begin behind any of another's tokens, also in the sweep that computes them, and end, so that ranges
    move and lie in any order.
    """
    chance = random.Random(seed)
    torch.manual_seed(seed)
    sweeps = Sweeps(KVPool(70, CPU), window)
    live: list[Written] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "SLAB_ELEMENTS", slab_rows * HEADS * DIM)
        for _ in range(12):
            batch: dict[Written, int] = {}
            for one in live:
                room = one.cache.capacity - one.cache.length
                if room and chance.random() < 0.8:
                    batch[one] = chance.choice([1, min(room, 4)])
            for _ in range(chance.randrange(3)):
                capacity = chance.randint(1, 12)
                _make_room(chance, live, batch, sweeps.pool.num_tokens - capacity)
                if sum(one.cache.capacity for one in live) + capacity > sweeps.pool.num_tokens:
                    break
                live.append(Written.behind(sweeps.pool, capacity, *_prefix(chance, live, batch)))
                batch[live[-1]] = chance.randint(1, capacity)
            if batch:
                sweeps.run(list(batch.items()))
    assert window is not None or sweeps.at_once


def _make_room(chance: random.Random, live: list[Written], batch: dict[Written, int], most: int) -> None:
    """Drop those on whom nobody stands, until the others' capacities are together `most` or nobody is left."""
    while sum(one.cache.capacity for one in live) > most:
        stood_on = {id(other) for one in live for other, _ in one.prefix}
        free = [one for one in live if id(one) not in stood_on and one not in batch]
        if not free:
            return
        live.remove(gone := chance.choice(free))
        gone.cache.drop()


def _prefix(chance: random.Random, live: list[Written], batch: dict[Written, int]) -> list[tuple[Written, int]]:
    """Some of the first tokens of one of `live`, those included that the sweep adds."""
    if not live or chance.random() < 0.2:
        return []
    source = chance.choice(live)
    line = [*source.prefix, (source, source.cache.length + batch.get(source, 0))]
    left, result = chance.randint(1, sum(count for _, count in line)), []
    for one, count in line:
        if left > 0:
            result.append((one, min(left, count)))
            left -= count
    return [part for part in result if part[1]]


def test_one_call_for_all_who_see_the_same() -> None:
    """Two on one prefix, one on more of it, and one behind one of them; a row without prefixes is a single call."""
    pool = KVPool(100, CPU)
    sweeps = Sweeps(pool)
    a, alone = Written.behind(pool, 30), Written.behind(pool, 9)
    sweeps.run([(a, 20), (alone, 4)])
    assert [causal for _, causal in sweeps.calls] == [True]
    b, c, d = (Written.behind(pool, 9, (a, count)) for count in (16, 16, 20))
    sweeps.calls.clear()
    sweeps.run([(b, 3), (alone, 1), (c, 2), (d, 1)])
    (own, causal), (shared, last) = sweeps.calls
    assert (own.num_sequences, causal, last) == (4, True, False)
    assert shared.query_bounds.tolist() == [0, 5, 6]
    assert shared.key_lengths.tolist() == [16, 20]
    e = Written.behind(pool, 9, (a, 16), (b, 3))
    sweeps.calls.clear()
    sweeps.run([(c, 1), (e, 2)])
    assert [(ranges.key_lengths.tolist(), ranges.query_bounds.tolist()) for ranges, _ in sweeps.calls[1:]] == [
        ([16], [0, 3]), ([3], [0, 2]),
    ]  # fmt: skip


def test_a_prefix_lies_in_the_pool_once() -> None:
    """Ten sequences of five tokens behind a hundred, where there is room for a hundred and fifty."""
    pool = KVPool(150, CPU)
    sweeps = Sweeps(pool)
    base = Written.behind(pool, 100)
    sweeps.run([(base, 100)])
    ones = [Written.behind(pool, 5, (base, 100)) for _ in range(10)]
    sweeps.run([(one, 5) for one in ones])
    assert [one.cache.length for one in ones] == [5] * 10
    assert sum(one.cache.nbytes for one in [base, *ones]) == 2 * 150 * 2 * KV_HEADS * DIM * 4


def test_what_nobody_sees_any_more_is_not_asked_for() -> None:
    """By a window that ends in the second part, or before it."""
    sharer = Sharer(first_row=0, num_rows=1, start=30, parts=((50, 10), (7, 15)))  # positions 0 - 9, 10 - 24
    assert sharer.seen(None) == ((50, 10), (7, 15))
    assert sharer.seen(30) == ((51, 9), (7, 15))
    assert sharer.seen(8) == ((20, 2),)
    assert sharer.seen(6) == ()
    assert Sharer(0, 4, 30, sharer.parts).seen(8) is None
    assert Sharer(0, 4, 30, sharer.parts).seen(6) == ()


def test_a_cache_that_is_gone_is_not_read() -> None:
    """What lies in its place may be anybody's."""
    pool = KVPool(30, CPU)
    sweeps = Sweeps(pool)
    base = Written.behind(pool, 10)
    sweeps.run([(base, 10)])
    one = Written.behind(pool, 5, (base, 8))
    base.cache.drop()
    with pytest.raises(ValueError, match="not there any more"):
        sweeps.run([(one, 1)])
