from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.report.labels import spread_labels

FRAME = ((30.0, 20.0), (190.0, 140.0))
PLACES = st.tuples(st.floats(30, 190), st.floats(20, 140))


@settings(max_examples=30)
@given(st.lists(PLACES, min_size=1, max_size=5), st.floats(10, 60))
def test_no_label_covers_a_point_or_another_label(points: list[tuple[float, float]], width: float) -> None:
    size = (width, 9.0)
    corners = spread_labels(points, [size] * len(points), FRAME)
    assert corners == spread_labels(points, [size] * len(points), FRAME)
    for number, (x, y) in enumerate(corners):
        assert 30 <= x <= 190 - width
        assert 20 <= y <= 131
        assert not [1 for px, py in points if x < px < x + width and y < py < y + 9]
        others = corners[:number]
        assert not [1 for ox, oy in others if abs(ox - x) < width and abs(oy - y) < 9]


def test_a_label_alone_is_beside_its_point() -> None:
    for px, py in ((100.0, 80.0), (189.0, 139.0), (30.0, 20.0)):
        ((x, y),) = spread_labels([(px, py)], [(40.0, 9.0)], FRAME)
        assert max(x - px, px - x - 40, y - py, py - y - 9) < 8
        assert max(x - px, px - x - 40, y - py, py - y - 9) > 0  # and not over it


def test_where_there_is_no_room_labels_are_still_placed() -> None:
    assert spread_labels([(1.0, 1.0)] * 3, [(50.0, 9.0)] * 3, ((0.0, 0.0), (20.0, 5.0))) == [(0.0, 0.0)] * 3
