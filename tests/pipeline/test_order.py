"""The order of loads: nobody waits for ever, nothing is overwritten while it is held."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan.sweep_strategies import Events, Sweep, steps, sweeps

from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.plan.pieces import SweepPlan, plan_sweep


@st.composite
def cases(draw: st.DrawFn) -> tuple[SweepPlan, Events, dict[int, int], int]:
    """A sweep, some resident pieces, and slots: just enough, or a few more."""
    sweep: Sweep = draw(sweeps())
    plan = plan_sweep(*sweep, {})
    resident = draw(st.lists(st.sampled_from(range(len(plan.pieces))), unique=True, max_size=3))
    slots = max(plan.max_held, 1) + draw(st.integers(0, 2))
    return plan, sweep[2], {piece: row for row, piece in enumerate(resident)}, slots


def naive_slots(plan: SweepPlan, events: Events, loads: LoadOrder, num_slots: int, sweeps: int) -> list[int]:
    """The slot of each load of the first sweeps: a queue of free slots, played through."""
    free = deque(range(num_slots))
    used: list[int] = []
    for sweep in range(sweeps):
        held = {}
        for step, position in steps(plan, events):
            if loads.load_number(sweep, position) is None:
                continue
            if step == "acquire":
                held[position] = free.popleft()
                used.append(held[position])
            else:
                free.append(held.pop(position))
    return used


@given(cases())
def test_slots_are_a_queue(case: tuple[SweepPlan, Events, dict[int, int], int]) -> None:
    plan, events, resident, num_slots = case
    loads = LoadOrder(plan.order, plan.releases, resident, num_slots)
    expected = naive_slots(plan, events, loads, num_slots, 7)
    assert len(expected) == 7 * loads.loads_per_sweep
    assert [loads.slot(load) for load in range(len(expected))] == expected
    # Backwards, and after far jumps, it is the same.
    assert [loads.slot(load) for load in reversed(range(len(expected)))] == expected[::-1]
    if expected:
        far = 10**9 * loads.loads_per_sweep
        there = [loads.slot(far + n) for n in range(loads.loads_per_sweep)]
        fresh = LoadOrder(plan.order, plan.releases, resident, num_slots)
        assert [fresh.slot(far + n) for n in range(loads.loads_per_sweep)] == there
        assert [loads.slot(load) for load in range(len(expected))] == expected


@given(cases(), st.integers(0, 6), st.data())
def test_places_of_many_pieces_are_those_of_each(
    case: tuple[SweepPlan, Events, dict[int, int], int], sweep: int, data: st.DataObject
) -> None:
    plan, _, resident, num_slots = case
    loads = LoadOrder(plan.order, plan.releases, resident, num_slots)
    assume(loads.loads_per_sweep)
    base = sweep * loads.loads_per_sweep
    start, stop = sorted(data.draw(st.integers(0, len(plan.order))) for _ in range(2))
    numbers, slots = loads.places(base, start, stop)
    assert len(numbers) == len(slots) == stop - start
    for position, number, slot in zip(range(start, stop), numbers, slots, strict=True):
        load = loads.load_number(base, position)
        if load is None:
            assert number < base
            assert slot == -1 - loads.resident_row(position)
        else:
            assert (number, slot) == (load, loads.slot(load))


@given(cases(), st.randoms(use_true_random=False))
def test_loader_and_compute_never_block_each_other(
    case: tuple[SweepPlan, Events, dict[int, int], int], random: object
) -> None:
    """However the two take turns, the loader fills free slots only, and everything is computed in the end."""
    plan, events, resident, num_slots = case
    loads = LoadOrder(plan.order, plan.releases, resident, num_slots)
    num_sweeps = 5
    total = num_sweeps * loads.loads_per_sweep
    in_slot: list[int | None] = [None] * num_slots
    work = [
        (step, loads.load_number(sweep * loads.loads_per_sweep, position))
        for sweep in range(num_sweeps)
        for step, position in steps(plan, events)
    ]
    work = [(step, load) for step, load in work if load is not None]
    next_load = at = 0
    while at < len(work):
        step, load = work[at]
        assert load is not None
        can_fill = next_load < total and in_slot[loads.slot(next_load)] is None
        can_compute = step == "release" or in_slot[loads.slot(load)] == load
        assert can_fill or can_compute, "deadlock"
        if can_fill and (not can_compute or random.random() < 0.5):  # type: ignore[attr-defined]
            in_slot[loads.slot(next_load)] = next_load
            next_load += 1
        else:
            assert in_slot[loads.slot(load)] == load
            if step == "release":
                in_slot[loads.slot(load)] = None
            at += 1


@given(cases(), st.integers(0, 3))
def test_the_load_before_had_the_same_slot(
    case: tuple[SweepPlan, Events, dict[int, int], int], first_sweep: int
) -> None:
    plan, _, resident, num_slots = case
    loads = LoadOrder(plan.order, plan.releases, resident, num_slots)
    first = first_sweep * loads.loads_per_sweep
    latest: dict[int, int] = {}
    for load in range(first, first + 7 * loads.loads_per_sweep):
        assert loads.load_before(load, first) == latest.get(loads.slot(load))
        latest[loads.slot(load)] = load


@given(cases(), st.integers(2, 3), st.data())
def test_several_loaders_each_go_as_far_as_slots_allow(
    case: tuple[SweepPlan, Events, dict[int, int], int], num_loaders: int, data: st.DataObject
) -> None:
    """Whoever is how slow, each fills a slot only when it is its turn, and everything is computed in the end."""
    plan, events, resident, num_slots = case
    loads = LoadOrder(plan.order, plan.releases, resident, num_slots)
    drives = data.draw(st.lists(st.integers(0, num_loaders - 1), min_size=len(plan.pieces), max_size=len(plan.pieces)))
    random = data.draw(st.randoms(use_true_random=False))
    num_sweeps = 5
    work: list[tuple[str, int]] = []
    todo: list[deque[int]] = [deque() for _ in range(num_loaders)]
    for sweep in range(num_sweeps):
        for step, position in steps(plan, events):
            load = loads.load_number(sweep * loads.loads_per_sweep, position)
            if load is not None:
                work.append((step, load))
                if step == "acquire":
                    todo[drives[plan.order[position]]].append(load)
    in_slot: list[int | None] = [None] * num_slots
    released: set[int | None] = {None}
    at = 0
    while at < len(work):
        step, load = work[at]
        can_fill = [
            loader
            for loader, own in enumerate(todo)
            if own and in_slot[loads.slot(own[0])] is None and loads.load_before(own[0], 0) in released
        ]
        can_compute = step == "release" or in_slot[loads.slot(load)] == load
        assert can_fill or can_compute, "deadlock"
        if can_fill and (not can_compute or random.random() < 0.5):
            filled = todo[random.choice(can_fill)].popleft()
            in_slot[loads.slot(filled)] = filled
        else:
            assert in_slot[loads.slot(load)] == load, "a later load has its slot"
            if step == "release":
                in_slot[loads.slot(load)] = None
                released.add(load)
            at += 1


@given(cases())
def test_load_numbers_and_resident_rows(case: tuple[SweepPlan, Events, dict[int, int], int]) -> None:
    plan, _, resident, num_slots = case
    loads = LoadOrder(plan.order, plan.releases, resident, num_slots)
    numbers = []
    for position, piece in enumerate(plan.order):
        number = loads.load_number(100, position)
        if piece in resident:
            assert number is None
            assert loads.resident_row(position) == resident[piece]
        else:
            numbers.append(number)
    assert numbers == list(range(100, 100 + loads.loads_per_sweep))


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="1 slots are too few: load 1"):
        LoadOrder((0, 1), (1, 0), {}, 1)
