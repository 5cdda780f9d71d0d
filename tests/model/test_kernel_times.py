"""How long a GPU computed, from its kernels' begins and ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.model.kernel_times import covered

POINTS = st.integers(0, 60)


@given(st.lists(st.tuples(POINTS, POINTS).map(lambda ends: (min(ends), max(ends))), max_size=12))
def test_what_several_intervals_cover_counts_once(intervals: list[tuple[int, int]]) -> None:
    inside = [any(begin <= point < end for begin, end in intervals) for point in range(61)]
    assert covered(intervals) == sum(inside)
