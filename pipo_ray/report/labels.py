"""Where the labels of points in a picture go, so that each can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence

Place = tuple[float, float]
"""x to the right and y upwards, in points (1/72 inch), as are all sizes here."""

Box = tuple[Place, Place]
"""Lower left corner; width and height."""

_GAP = 4.0
"""Between a label and its point, or another label, at least."""

_STEP = 2.0


def spread_labels(points: Sequence[Place], sizes: Sequence[Place], frame: tuple[Place, Place]) -> list[Place]:
    """The lower left corner of each point's label, whose width and height are in `sizes`: as near to the point as it
    can be within `frame` (its lower left and upper right corner) without covering a point, or a label placed before.

    One for which there is no room anywhere goes where it covers least.
    """
    taken: list[Box] = [(point, (0.0, 0.0)) for point in points]
    for point, size in zip(points, sizes, strict=True):
        taken.append((_corner(point, size, frame, taken), size))
    return [corner for corner, _ in taken[len(points) :]]


def _corner(point: Place, size: Place, frame: tuple[Place, Place], taken: Sequence[Box]) -> Place:
    (left, bottom), (right, top) = frame
    across, upwards = _steps(left, right - size[0]), _steps(bottom, top - size[1])
    corners = sorted(((x, y) for x in across for y in upwards), key=lambda corner: _distance(point, corner, size))

    def hidden(corner: Place) -> float:
        return sum(_overlap(corner, size, *box) for box in taken)

    return next((corner for corner in corners if not hidden(corner)), None) or min(corners, key=hidden)


def _steps(first: float, last: float) -> list[float]:
    return [first + _STEP * number for number in range(int(max(0.0, last - first) / _STEP) + 1)]


def _overlap(corner: Place, size: Place, other: Place, other_size: Place) -> float:
    """How much of a square of points two boxes share that are each half of _GAP wider on every side."""
    shared = 1.0
    for at, length, other_at, other_length in zip(corner, size, other, other_size, strict=True):
        shared *= max(0.0, min(at + length, other_at + other_length) - max(at, other_at) + _GAP)
    return shared


def _distance(point: Place, corner: Place, size: Place) -> float:
    """From a point to the nearest of a box."""
    sides = [max(at - where, 0.0, where - at - length) for where, at, length in zip(point, corner, size, strict=True)]
    return math.hypot(*sides)
