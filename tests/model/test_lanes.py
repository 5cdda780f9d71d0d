"""Several requests walk through one model in lockstep, one at a time, in an order that does not depend on luck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.model.lanes import Lanes


def walk_all(places: list[list[int]], pause_s: float = 0.0) -> list[tuple[int, int]]:
    """Each lane arrives at its places; the (lane, place) in the order in which they went on."""
    lanes = Lanes(len(places))
    seen: list[tuple[int, int]] = []
    running: list[int] = []

    def body(lane: int) -> Callable[[], int]:
        def walk() -> int:
            for place in places[lane]:
                lanes.arrive(place)
                assert lanes.current == lane
                running.append(lane)
                assert len(running) == 1, "two lanes at once"
                if pause_s:
                    time.sleep(pause_s)
                seen.append((lane, place))
                running.pop()
            return lane * 10

        return walk

    assert lanes.run([body(lane) for lane in range(len(places))]) == [lane * 10 for lane in range(len(places))]
    return seen


@settings(max_examples=40)
@given(st.lists(st.sets(st.integers(0, 12), max_size=8).map(sorted), min_size=1, max_size=5))
def test_the_one_that_is_furthest_behind_goes_first(places: list[list[int]]) -> None:
    """A lane goes on to a place only when every other one has got there, or will not come: in the order of places, "
    "then of lanes."""
    seen = walk_all(places)
    assert sorted(seen) == sorted((lane, place) for lane, mine in enumerate(places) for place in mine)
    assert [place for _, place in seen] == sorted(place for _, place in seen)
    assert walk_all(places) == seen
    for place in range(13):
        assert [lane for lane, at in seen if at == place] == sorted(lane for lane, at in seen if at == place)


def test_one_at_a_time() -> None:
    walk_all([list(range(10)) for _ in range(4)], pause_s=0.0005)


def test_the_first_exception_ends_all() -> None:
    lanes = Lanes(3)
    reached: list[int] = []

    def good() -> None:
        for place in range(100):
            lanes.arrive(place)
            reached.append(place)

    def bad() -> None:
        lanes.arrive(0)
        lanes.arrive(5)
        raise KeyError("gone")

    begin = time.perf_counter()
    with pytest.raises(KeyError, match="gone"):
        lanes.run([good, bad, good])
    assert time.perf_counter() - begin < 5
    assert max(reached) <= 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]


def test_an_exception_before_the_first_place_ends_all() -> None:
    lanes = Lanes(2)

    def bad() -> None:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        lanes.run([lambda: lanes.arrive(1), bad])


def test_a_lane_that_ends_early_lets_the_others_go_on() -> None:
    assert walk_all([[], [0, 1, 2], [1]]) == [(1, 0), (1, 1), (2, 1), (1, 2)]
